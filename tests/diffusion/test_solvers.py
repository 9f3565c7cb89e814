"""Each step table equals the recursion it stands for, as the papers and the peer write it."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastprior.diffusion.schedule import BETA_SCHEDULES, NoiseScheduler
from fastprior.diffusion.solvers import PEERS, SOLVERS, SPACED, SPACINGS, choose_solver, step_table


def make_schedule(name: str, timesteps: int) -> NoiseScheduler:
    return NoiseScheduler(beta_schedule=name, timesteps=timesteps, loss_type="l2")


SCHEDULES = st.builds(make_schedule, st.sampled_from(sorted(BETA_SCHEDULES)), st.integers(25, 400))
ETAS = st.floats(0, 1)
CHOICES = [*((solver, None) for solver in SOLVERS), *((s, spacing) for s in SPACED for spacing in SPACINGS)]


SHORT = st.builds(make_schedule, st.sampled_from(["cosine", "jsd"]), st.integers(1, 8))


def run(table, network, x, noises, prediction):
    """The loop of the sampler, in fp64."""
    x0 = torch.zeros_like(x)
    for t, (p, q, a, b, c, s), noise in zip(table.times, table.rows, noises):
        estimate = p * x + q * network(x, t, prediction)
        x, x0 = a * x + b * estimate + c * x0 + s * noise, estimate
    return x


class Network:
    """A smooth made-up x0 predictor, expressed as whatever the prediction is."""

    def __init__(self, schedule, dim=4):
        self.schedule, self.w = schedule, torch.randn(dim, dim, dtype=torch.float64) / dim

    def x0(self, x, t):
        return torch.tanh(x @ self.w + t / 1000)

    def __call__(self, x, t, prediction):
        alpha = self.schedule.alphas_cumprod[t].double()
        x0 = self.x0(x, t)
        if prediction == "x0":
            return x0
        if prediction == "v":
            return (alpha.sqrt() * x - x0) / (1 - alpha).sqrt()
        return (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()


def ddpm(schedule, network, x, noises, steps, eta):
    betas, bars = schedule.betas.double(), schedule.alphas_cumprod.double()
    for t, noise in zip(reversed(range(schedule.num_timesteps)), noises):
        before = bars[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
        x0 = network.x0(x, t)
        mean = (before.sqrt() * betas[t] * x0 + (1 - betas[t]).sqrt() * (1 - before) * x) / (1 - bars[t])
        variance = betas[t] * (1 - before) / (1 - bars[t])
        x = mean + (variance.sqrt() * noise if t else 0)
    return x


def ddim(schedule, network, x, noises, steps, eta):
    """DALLE2-pytorch's: its grid, the variances of one timestep earlier, the noise prediction of the time itself."""
    bars, shifted = schedule.alphas_cumprod.double(), schedule.alphas_cumprod_prev.double()
    grid = torch.linspace(-1.0, schedule.num_timesteps, steps + 1)[:-1].int().tolist()[::-1]
    for (t, after), noise in zip(zip(grid[:-1], grid[1:]), noises):
        x0 = network.x0(x, t)
        if after < 0:
            return x0
        eps = (x - bars[t].sqrt() * x0) / (1 - bars[t]).sqrt()
        sigma = eta * ((1 - shifted[t] / shifted[after]) * (1 - shifted[after]) / (1 - shifted[t])).sqrt()
        x = x0 * shifted[after].sqrt() + (1 - shifted[after] - sigma**2).clamp(min=0).sqrt() * eps
        x = x + (sigma * noise if after > 0 else 0)
    return x


def bars_at(schedule, times):
    return [*schedule.alphas_cumprod.double()[times], torch.tensor(1.0, dtype=torch.float64)]


def ddim_trailing(schedule, network, x, noises, times, eta):
    bars = bars_at(schedule, times)
    for t, bar, after, noise in zip(times, bars[:-1], bars[1:], noises):
        x0 = network.x0(x, t)
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        sigma = eta * ((1 - after) / (1 - bar)).sqrt() * (1 - bar / after).sqrt()
        x = after.sqrt() * x0 + (1 - after - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise
    return x


def dpm_solver_pp(schedule, network, x, noises, times, eta):
    """Algorithm 2 of the DPM-Solver++ paper, with the last step, to noise 0, of first order: x0 itself."""
    bars = bars_at(schedule, times)
    lambdas = [torch.log(bar.sqrt() / (1 - bar).sqrt()) for bar in bars[:-1]]
    previous = None
    for i, t in enumerate(times):
        x0 = network.x0(x, t)
        if i == len(times) - 1:
            return x0
        h = lambdas[i + 1] - lambdas[i]
        d = x0
        if previous is not None:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = ((1 - bars[i + 1]) / (1 - bars[i])).sqrt() * x - bars[i + 1].sqrt() * (torch.exp(-h) - 1) * d
        previous = x0
    return x


def sde_dpm_solver_pp(schedule, network, x, noises, times, eta):
    """Draws of the posterior q(x_after | x, x0), as DDPM's, of the x0 that the last two make likely half a step on."""
    bars = bars_at(schedule, times)
    lambdas = [0.5 * (torch.log(bar) - torch.log1p(-bar)) for bar in bars]
    previous = None
    for i, (t, noise) in enumerate(zip(times, noises)):
        x0, bar, after = network.x0(x, t), bars[i], bars[i + 1]
        middle = x0
        if 0 < i < len(times) - 1:
            middle = x0 + (x0 - previous) * (lambdas[i + 1] - lambdas[i]) / (2 * (lambdas[i] - lambdas[i - 1]))
        beta = 1 - bar / after
        mean = (after.sqrt() * beta * middle + (bar / after).sqrt() * (1 - after) * x) / (1 - bar)
        x, previous = mean + ((1 - after) / (1 - bar) * beta).sqrt() * noise, x0
    return x


TEXTBOOK = {
    "ddpm": ddpm, "ddim": ddim, "ddim_trailing": ddim_trailing, "dpm++": dpm_solver_pp, "sde-dpm++": sde_dpm_solver_pp,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("solver, spacing", CHOICES)
@settings(max_examples=20, deadline=None)
@given(schedule=SCHEDULES, fraction=st.floats(0.01, 1), eta=ETAS, prediction=st.sampled_from(["x0", "v", "noise"]))
def test_table_equals_the_textbook_recursion(solver, spacing, schedule, fraction, eta, prediction):
    total = schedule.num_timesteps
    steps = total if solver == "ddpm" else max(2, round(fraction * total))
    assume(prediction != "noise" or schedule.alphas_cumprod[-1] > 0)  # jsd ends without signal
    table = step_table(schedule, solver, steps, prediction, eta if solver.startswith("ddim") else None, spacing)
    torch.manual_seed(0)
    network, noises = Network(schedule), torch.randn(steps, 3, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    wanted = TEXTBOOK[solver](schedule, network, x, noises, list(table.times) if solver in SPACED else steps, eta)
    got = run(table, network, x, noises, prediction)
    # The buffers are fp32, so each holds its own rounding of 6e-8. Where the last alphas_cumprod is small, x0 is read
    # off v or noise by dividing by its root, and the table and the recursion differ by that rounding, magnified.
    recip = schedule.sqrt_recip_alphas_cumprod
    magnified = 1 if prediction == "x0" else recip[recip.isfinite()].max().item()
    tolerance = 1e-4 * max(1.0, magnified)
    assert got.isfinite().all()
    # a schedule may end at embeddings far smaller than the noise that it begins with, whose share is rounded too
    assert (got - wanted).abs().max() < tolerance * wanted.abs().max() + 1e-6 * steps**0.5 * x.abs().max()
    assert not torch.allclose(wanted, x)


@settings(max_examples=20, deadline=None)
@given(schedule=SCHEDULES | SHORT, fraction=st.floats(0.01, 1))
def test_shape_of_the_tables(schedule, fraction):
    """Whatever the schedule, down to one of a single time, and to runs over all of its times."""
    total = schedule.num_timesteps
    steps = max(1, round(fraction * total))
    for solver, spacing in CHOICES:
        if solver == "ddpm" and steps < total:
            continue
        table, evaluations = step_table(schedule, solver, steps, spacing=spacing), steps - (solver == "ddim")
        assert len(table) == evaluations == len(table.draws_noise) == len(table.rows)
        assert table.spacing == (spacing or ("trailing" if solver in SPACED else None))
        assert all(before > after for before, after in itertools.pairwise(table.times))
        assert all(type(t) is int and 0 <= t < total for t in table.times)
        assert solver == "ddim" or steps < total or table.times == tuple(reversed(range(total)))
        assert table.rows.isfinite().all()
        for draws, row in zip(table.draws_noise, table.rows):
            assert draws or row[5] == 0
        if evaluations:
            rounding = 1e-4 if solver == "ddpm" else 1e-6  # of its buffers in fp32, where 1 - ā cancels
            assert table.rows[-1, 2:].tolist() == pytest.approx([0, 1, 0, 0], abs=rounding), "the run ends at x0"
            assert solver == "ddpm" or not table.draws_noise[-1]
            if "dpm++" in solver:
                assert set(table.draws_noise[:-1]) <= {solver == "sde-dpm++"}
            assert table.rows[0, 4] == 0, "there is no last x0 at first"


@pytest.mark.parametrize("prediction", ["x0", "v", "noise"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", SPACED)
def test_one_step_and_all_steps(solver, spacing, prediction):
    """One step gives the x0 of its time, whatever the prediction; over all times every spacing is the same."""
    schedule, x, noise = make_schedule("cosine", 40), torch.randn(3, 4, dtype=torch.float64), torch.zeros(40, 3, 4)
    network = Network(schedule)
    one = step_table(schedule, solver, 1, prediction, spacing=spacing)
    x0 = network.x0(x, one.times[0])
    tolerance = 1e-6 / schedule.alphas_cumprod[one.times[0]].sqrt().item()  # ā is fp32, and x0 read off by its root
    assert (run(one, network, x, noise, prediction) - x0).abs().max() < (1e-6 if prediction == "x0" else tolerance)
    every, other = (step_table(schedule, solver, 40, prediction, spacing=s) for s in (spacing, "trailing"))
    assert every.times == other.times and torch.equal(every.rows, other.rows)


def test_ancestral_ddim_over_all_times_is_ddpm():
    schedule = make_schedule("cosine", 40)
    got, wanted = (step_table(schedule, *solver).rows for solver in (("ddim_trailing", 40), ("ddpm", None)))
    assert torch.allclose(got, wanted, atol=1e-5), (got - wanted).abs().max()


def test_deterministic_solvers_converge_to_the_exact_solution():
    """For normal data of deviation c the best denoiser and the probability flow ODE's solution have closed forms."""
    schedule = NoiseScheduler(beta_schedule="linear", timesteps=1000, loss_type="l2")
    bars, c = schedule.alphas_cumprod.double(), 0.5

    def network(x, t, prediction):
        return bars[t].sqrt() * c**2 * x / (bars[t] * c**2 + 1 - bars[t])

    x = torch.ones(1, 1, dtype=torch.float64)
    exact = c / (bars[-1] * c**2 + 1 - bars[-1]).sqrt()

    def error(solver, steps, **kwargs):
        out = run(step_table(schedule, solver, steps, **kwargs), network, x, torch.zeros(steps, 1, 1), "x0")
        return abs(out.item() / exact.item() - 1)

    assert error("ddim_trailing", 1000, eta=0.0) < 0.01
    assert error("dpm++", 50) < 0.01 < error("ddim_trailing", 50, eta=0.0)
    assert error("dpm++", 50) < error("dpm++", 10) / 4


def cosine_time(log_snr: float, timesteps: int) -> float:
    """When a cosine schedule has a half log-SNR, by its closed form."""
    s = 0.008
    alpha = 1 / (1 + math.exp(-2 * log_snr)) * math.cos(s / (1 + s) * math.pi / 2) ** 2
    return (math.acos(math.sqrt(alpha)) / (math.pi / 2) * (1 + s) - s) * timesteps - 1


@pytest.mark.parametrize("steps", [1, 4, 8, 12, 16])
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_times_of_a_cosine_schedule(spacing, steps):
    schedule = make_schedule("cosine", 1000)
    alpha = schedule.alphas_cumprod[0].double().item()
    first, end = -3.5, 0.5 * math.log(alpha / (1 - alpha))
    parts = [i / steps for i in range(steps)]
    if spacing == "logsnr":
        levels = [first + part * (end - first) for part in parts]
    else:
        most, least = math.exp(-first), math.exp(-end)
        levels = [-math.log((most ** (1 / 7) + part * (least ** (1 / 7) - most ** (1 / 7))) ** 7) for part in parts]
    times = step_table(schedule, "dpm++", steps, spacing=spacing).times
    assert times[0] == 980
    assert all(abs(t - cosine_time(level, 1000)) < 0.6 for t, level in zip(times, levels)), times


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_times_where_a_schedule_ends_early_or_late(spacing):
    """A schedule that never gets as noisy as a run begins with is visited from its end, one without signal is not."""

    def times(alphas: torch.Tensor) -> tuple[int, ...]:
        schedule.alphas_cumprod = alphas
        return step_table(schedule, "dpm++", 5, spacing=spacing).times

    schedule = make_schedule("jsd", 100)
    assert schedule.alphas_cumprod[-1] == 0 and times(schedule.alphas_cumprod)[0] == 98
    alphas = torch.linspace(0.99, 0.1, 100)
    found = times(alphas)
    assert found[0] == 99
    levels = 0.5 * torch.logit(alphas[list(found)].double())
    if spacing == "karras":
        levels = (-levels / 7).exp()
    assert levels.diff().abs().max() < 1.1 * levels.diff().abs().min()
    assert times(torch.linspace(1e-4, 1e-9, 100)) == (4, 3, 2, 1, 0), "all of it is noisier than a run begins with"
    noiseless = torch.cat((torch.ones(1), make_schedule("cosine", 1000).alphas_cumprod[1:]))
    schedule = make_schedule("cosine", 1000)
    found = times(noiseless)
    assert (
        found[0] == 980 and found[1] > 700 and step_table(schedule, "dpm++", 5, spacing=spacing).rows.isfinite().all()
    )


@pytest.mark.parametrize("solver", SPACED)
def test_a_step_without_signal_is_the_limit_of_one_with_little(solver):
    schedule, nearly = make_schedule("jsd", 50), make_schedule("jsd", 50)
    nearly.alphas_cumprod[-1] = 1e-12
    for steps in (1, 2, 7, 50):
        for prediction in ("x0", "v"):
            got, wanted = (step_table(s, solver, steps, prediction).rows for s in (schedule, nearly))
            assert got.isfinite().all() and torch.allclose(got[:, 2:], wanted[:, 2:], atol=0.06), got - wanted
    with pytest.raises(ValueError, match="timesteps=7; .* it ends without signal, .* a prediction of noise"):
        step_table(schedule, solver, 7, "noise")


DIFFUSERS = {"dpm++": "dpmsolver++", "sde-dpm++": "sde-dpmsolver++"}
PREDICTIONS = {"x0": "sample", "v": "v_prediction", "noise": "epsilon"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", DIFFUSERS)
def test_runs_equal_diffusers(solver, spacing, prediction):
    """At the same times, with the same noise."""
    torch.manual_seed(0)
    diffusers = pytest.importorskip("diffusers")
    schedule = make_schedule("linear", 1000)
    theirs = diffusers.DPMSolverMultistepScheduler(
        trained_betas=schedule.betas.tolist(), algorithm_type=DIFFUSERS[solver], solver_order=2,
        prediction_type=PREDICTIONS[prediction], lower_order_final=False,
    )  # fmt: skip
    for steps in (1, 2, 3, 12, 40):
        table = step_table(schedule, solver, steps, prediction, spacing=spacing)
        network, noises = Network(schedule), torch.randn(steps, 3, 4, dtype=torch.float64)
        x = wanted = torch.randn(3, 4, dtype=torch.float64)
        theirs.set_timesteps(timesteps=list(table.times))
        for t, noise in zip(table.times, noises):
            wanted = theirs.step(network(wanted, t, prediction), t, wanted, variance_noise=noise).prev_sample
        got = run(table, network, x, noises, prediction)
        # their coefficients are fp32, in which 1 - ā and steps in log-SNR cancel where there is little noise
        assert (got - wanted).abs().max() < 3e-3 * wanted.abs().max(), steps


def test_default_solver_is_the_peers_rule():
    assert choose_solver(None, 1000, 1000) == "ddpm" and choose_solver(None, 1000, 999) == "ddim"
    assert choose_solver("dpm++", 1000, 1000) == "dpm++" and choose_solver(None, 1000, None) == "ddpm"
    schedule = make_schedule("cosine", 30)
    assert len(step_table(schedule, None, None)) == 30 and step_table(schedule, None, 9).solver == "ddim"


@pytest.mark.parametrize("kind", [torch.tensor, np.int64], ids=["torch", "numpy"])
@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"ddpm"}))
def test_numbers_of_other_libraries(solver, kind):
    schedule = make_schedule("cosine", 30)
    got, wanted = (step_table(schedule, solver, steps) for steps in (kind(5), 5))
    assert got.times == wanted.times and got.rows.equal(wanted.rows)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(solver="euler", steps=10), "solver='euler'; it must be one of 'ddpm', 'ddim'"),
        (dict(solver="ddim", steps=101), "timesteps=101; the schedule has 100, so it must be 1 to 100"),
        (dict(solver="ddim", steps=0), "timesteps=0; the schedule has 100"),
        (dict(solver="ddpm", steps=50), "timesteps=50; the ddpm solver visits all 100"),
        (dict(solver="dpm++", steps=50, eta=0.5), "eta=0.5; the dpm\\+\\+ solver has no eta"),
        (dict(solver="ddim", steps=50, eta=1.5), "eta=1.5; it must be between 0 and 1"),
        (dict(solver="sde-dpm++", steps=50, eta=1.0), "eta=1.0; the sde-dpm\\+\\+ solver has no eta"),
        (dict(solver="dpm++", steps=5, spacing="cosine"), "spacing='cosine'; it must be one of 'trailing', 'logsnr'"),
        (dict(solver="dpm++", steps=5, spacing=["logsnr"]), "spacing=.*; it must be one of 'trailing', 'logsnr'"),
        (dict(solver="ddim", steps=5, spacing="trailing"), "spacing='trailing'; the ddim solver has times of its own"),
        (dict(solver="ddpm", steps=100, spacing="logsnr"), "spacing='logsnr'; the ddpm solver has times of its own"),
        (dict(solver=None, steps=None, spacing="karras"), "spacing='karras'; the ddpm solver has times of its own"),
    ],
)
def test_bad_arguments(kwargs, message):
    schedule = NoiseScheduler(beta_schedule="cosine", timesteps=100, loss_type="l2")
    with pytest.raises(ValueError, match=message):
        step_table(schedule, **kwargs)


def test_bad_schedules():
    with pytest.raises(ValueError, match="beta_schedule='cos'; it must be one of 'cosine'"):
        NoiseScheduler(beta_schedule="cos", timesteps=10, loss_type="l2")
    with pytest.raises(ValueError, match="loss_type='mse'; it must be one of 'l1', 'l2', 'huber'"):
        NoiseScheduler(beta_schedule="cosine", timesteps=10, loss_type="mse")
    with pytest.raises(ValueError, match="timesteps=0; it must be at least 1"):
        NoiseScheduler(beta_schedule="cosine", timesteps=0, loss_type="l2")
    with pytest.raises(ValueError, match="beta_schedule='linear' with timesteps=10 has betas up to 2"):
        NoiseScheduler(beta_schedule="linear", timesteps=10, loss_type="l2")


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_schedule_stays_fp32(cast):
    schedule = NoiseScheduler(beta_schedule="cosine", timesteps=1000, loss_type="l2")
    before = {name: t.clone() for name, t in schedule.state_dict().items()}
    getattr(schedule, cast)()
    for name, t in schedule.state_dict().items():
        assert t.dtype == torch.float32 and torch.equal(t, before[name])
    assert math.isclose(schedule.alphas_cumprod[0].item(), 1, rel_tol=1e-3)


@pytest.mark.parametrize("solver, spacing", [(s, None) for s in PEERS] + [(s, "logsnr") for s in SPACED])
def test_each_buffer_of_the_schedule_is_asked_for_once(solver, spacing):
    """On a device each number of one would be waited for."""
    schedule, asked = NoiseScheduler(beta_schedule="cosine", timesteps=20, loss_type="l2"), []

    class Watched:
        def __getattr__(self, name):
            asked.append(name)
            return getattr(schedule, name)

    table = step_table(Watched(), solver, 20, "v", spacing=spacing)
    buffers = [name for name in asked if torch.is_tensor(getattr(schedule, name))]
    assert len(buffers) == len(set(buffers)) > 0
    assert torch.equal(table.rows, step_table(schedule, solver, 20, "v", spacing=spacing).rows)
