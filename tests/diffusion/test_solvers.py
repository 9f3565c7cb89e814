"""Each step table equals the recursion it stands for, as the papers and the peer write it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprior.diffusion.schedule import BETA_SCHEDULES, NoiseScheduler
from fastprior.diffusion.solvers import SOLVERS, choose_solver, step_table, trailing_times

SCHEDULES = st.builds(
    lambda name, timesteps: NoiseScheduler(beta_schedule=name, timesteps=timesteps, loss_type="l2").double(),
    st.sampled_from(sorted(set(BETA_SCHEDULES) - {"jsd"})),  # jsd ends at alphas_cumprod = 0
    st.integers(25, 400),
)
ETAS = st.floats(0, 1)


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


def trailing_bars(schedule, steps):
    times = trailing_times(schedule.num_timesteps, steps)
    return times, [*schedule.alphas_cumprod.double()[times], torch.tensor(1.0, dtype=torch.float64)]


def ddim_trailing(schedule, network, x, noises, steps, eta):
    times, bars = trailing_bars(schedule, steps)
    for t, bar, after, noise in zip(times, bars[:-1], bars[1:], noises):
        x0 = network.x0(x, t)
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        sigma = eta * ((1 - after) / (1 - bar)).sqrt() * (1 - bar / after).sqrt()
        x = after.sqrt() * x0 + (1 - after - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise
    return x


def dpm_solver_pp(schedule, network, x, noises, steps, eta):
    """Algorithm 2 of the DPM-Solver++ paper, with the last step, to noise 0, of first order: x0 itself."""
    times, bars = trailing_bars(schedule, steps)
    lambdas = [torch.log(bar.sqrt() / (1 - bar).sqrt()) for bar in bars[:-1]]
    previous = None
    for i, t in enumerate(times):
        x0 = network.x0(x, t)
        if i == steps - 1:
            return x0
        h = lambdas[i + 1] - lambdas[i]
        d = x0
        if previous is not None:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = ((1 - bars[i + 1]) / (1 - bars[i])).sqrt() * x - bars[i + 1].sqrt() * (torch.exp(-h) - 1) * d
        previous = x0
    return x


TEXTBOOK = {"ddpm": ddpm, "ddim": ddim, "ddim_trailing": ddim_trailing, "dpm++": dpm_solver_pp}


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@settings(max_examples=40, deadline=None)
@given(schedule=SCHEDULES, fraction=st.floats(0.01, 1), eta=ETAS, prediction=st.sampled_from(["x0", "v", "noise"]))
def test_table_equals_the_textbook_recursion(solver, schedule, fraction, eta, prediction):
    total = schedule.num_timesteps
    steps = total if solver == "ddpm" else max(2, round(fraction * total))
    table = step_table(schedule, solver, steps, prediction, eta if solver.startswith("ddim") else None)
    torch.manual_seed(0)
    network, noises = Network(schedule), torch.randn(steps, 3, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    wanted = TEXTBOOK[solver](schedule, network, x, noises, steps, eta)
    got = run(table, network, x, noises, prediction)
    # The buffers are fp32, so each holds its own rounding of 6e-8. Where the last alphas_cumprod is small, x0 is read
    # off v or noise by dividing by its root, and the table and the recursion differ by that rounding, magnified.
    magnified = 1 if prediction == "x0" else schedule.sqrt_recip_alphas_cumprod.max().item()
    tolerance = 1e-4 * max(1.0, magnified)
    assert got.isfinite().all()
    # a schedule may end at embeddings far smaller than the noise that it begins with, whose share is rounded too
    assert (got - wanted).abs().max() < tolerance * wanted.abs().max() + 1e-6 * steps**0.5 * x.abs().max()
    assert not torch.allclose(wanted, x)


@settings(max_examples=50, deadline=None)
@given(schedule=SCHEDULES, fraction=st.floats(0.01, 1))
def test_shape_of_the_tables(schedule, fraction):
    steps = max(1, round(fraction * schedule.num_timesteps))
    for solver, evaluations in (("ddim", steps - 1), ("ddim_trailing", steps), ("dpm++", steps)):
        table = step_table(schedule, solver, steps)
        assert len(table) == evaluations == len(table.draws_noise) == len(table.rows)
        assert list(table.times) == sorted(table.times, reverse=True)
        assert all(0 <= t < schedule.num_timesteps for t in table.times)
        assert table.rows.isfinite().all()
        for draws, row in zip(table.draws_noise, table.rows):
            assert draws or row[5] == 0
        if evaluations:
            assert table.rows[-1, 2:].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-6), "the run ends at x0"


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


def test_default_solver_is_the_peers_rule():
    assert choose_solver(None, 1000, 1000) == "ddpm" and choose_solver(None, 1000, 999) == "ddim"
    assert choose_solver("dpm++", 1000, 1000) == "dpm++"


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(solver="euler", steps=10), "solver='euler'; it must be one of 'ddpm', 'ddim'"),
        (dict(solver="ddim", steps=101), "timesteps=101; the schedule has 100, so it must be 1 to 100"),
        (dict(solver="ddim", steps=0), "timesteps=0; the schedule has 100"),
        (dict(solver="ddpm", steps=50), "timesteps=50; the ddpm solver visits all 100"),
        (dict(solver="dpm++", steps=50, eta=0.5), "eta=0.5; the dpm\\+\\+ solver has no eta"),
        (dict(solver="ddim", steps=50, eta=1.5), "eta=1.5; it must be between 0 and 1"),
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


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_buffer_of_the_schedule_is_asked_for_once(solver):
    """On a device each number of one would be waited for."""
    schedule, asked = NoiseScheduler(beta_schedule="cosine", timesteps=20, loss_type="l2"), []

    class Watched:
        def __getattr__(self, name):
            asked.append(name)
            return getattr(schedule, name)

    table = step_table(Watched(), solver, 20, "v")
    buffers = [name for name in asked if torch.is_tensor(getattr(schedule, name))]
    assert len(buffers) == len(set(buffers)) > 0
    assert torch.equal(table.rows, step_table(schedule, solver, 20, "v").rows)
