"""Step tables made from scheduler configurations give what diffusers' schedulers give, for the same generator."""

import json

import numpy as np
import pytest
import torch

from fastprior.diffusion.diffusers_schedules import DEFAULTS, DiffusersSchedule
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.diffusion.solvers import SPACED, SPACINGS, step_table
from fastprior.kernels import reference
from helpers.priors import relative_error

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by

KARLO = dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
KANDINSKY = dict(KARLO, clip_sample_range=10.0)
COSINE = dict(beta_schedule="squaredcos_cap_v2")
SHAP_E = dict(beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True)
CASES = [
    ("UnCLIPScheduler", KARLO, 25),
    ("UnCLIPScheduler", KANDINSKY, 1000),
    ("UnCLIPScheduler", dict(num_train_timesteps=30), 30),
    ("UnCLIPScheduler", dict(KARLO, clip_sample=False, prediction_type="epsilon", num_train_timesteps=200), 2),
    ("DDPMScheduler", dict(KANDINSKY, **COSINE), 25),
    ("DDPMScheduler", dict(KARLO, **COSINE, variance_type="fixed_small", num_train_timesteps=100), 100),
    ("DDPMScheduler", dict(prediction_type="v_prediction", timestep_spacing="trailing"), 7),
    ("DDPMScheduler", dict(variance_type="fixed_large", beta_schedule="scaled_linear", timestep_spacing="linspace"), 9),
    ("DDPMScheduler", dict(beta_schedule="sigmoid", steps_offset=1, clip_sample=False), 10),
    ("DDPMScheduler", dict(trained_betas=[0.01, 0.02, 0.05, 0.1], num_train_timesteps=4), 4),
    *(
        ("DDIMScheduler", dict(KARLO, **COSINE, prediction_type=prediction, clip_sample_range=0.5, eta=eta), 12)
        for prediction in ("sample", "epsilon", "v_prediction")
        for eta in (0.0, 0.7)
    ),
    ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"), 25),
    ("DDIMScheduler", dict(prediction_type="sample", timestep_spacing="trailing", eta=1.0), 1),
    ("HeunDiscreteScheduler", dict(SHAP_E, clip_sample=True), 16),
    ("HeunDiscreteScheduler", dict(SHAP_E, prediction_type="epsilon"), 5),
    ("HeunDiscreteScheduler", dict(prediction_type="v_prediction", timestep_spacing="leading"), 8),
    ("HeunDiscreteScheduler", dict(beta_schedule="scaled_linear", timestep_spacing="trailing"), 1),
]


def network(x, t):
    """A smooth made-up prediction that depends on x and t, and leaves the range that is clamped."""
    mix = torch.randn(x.shape[-1], x.shape[-1], generator=torch.Generator().manual_seed(3)) / x.shape[-1] ** 0.5
    return 3 * torch.tanh(x @ mix + float(t) / 500)


def their_run(scheduler, steps, eta, x0=None, strength=1.0):
    """The loop of the pipelines: initial noise, then `scheduler.step` with the time that follows."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps[steps - int(steps * strength) :] if x0 is not None else scheduler.timesteps
    x = torch.randn(3, 8, generator=generator)
    x = scheduler.add_noise(x0, x, times[:1].repeat(3)) if x0 is not None else x * scheduler.init_noise_sigma
    kind = type(scheduler).__name__
    for i, t in enumerate(times):
        kwargs = {} if kind == "HeunDiscreteScheduler" else dict(generator=generator)
        if kind == "DDIMScheduler":
            kwargs["eta"] = eta
        if kind == "UnCLIPScheduler":
            kwargs["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        pred = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(pred, t, x, **kwargs).prev_sample
    return x, generator


def our_run(schedule, steps, eta, x0=None, strength=1.0):
    generator = torch.Generator().manual_seed(0)
    table = schedule.table(steps, eta=eta, strength=strength)
    x = torch.randn(3, 8, generator=generator)
    x = schedule.add_noise(x0, x, table.times[0]) if x0 is not None else x * table.noise_scale
    rows, last = table.rows.float(), torch.zeros_like(x)
    for index, t in enumerate(table.times):
        noise = torch.randn(3, 8, generator=generator) if table.draws_noise[index] else torch.zeros_like(x)
        pred = network(x, t)
        third = pred if table.uses_prediction else last
        fixed = rows, torch.tensor(index), schedule.clamp, schedule.radius
        args = reference.StepArgs(x, pred, None, torch.tensor(1.0), third, noise, *fixed)
        x, last = reference.diffusion_step(args)
    return x, generator


def pair(kind, config):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, kind)(**{k: v for k, v in config.items() if k in DEFAULTS[kind]})
    return DiffusersSchedule(kind, **config), theirs


@pytest.mark.parametrize("kind, config, steps", CASES)
def test_runs_equal_diffusers(kind, config, steps):
    config = dict(config)
    eta = config.pop("eta", 0.0)
    ours, theirs = pair(kind, config)
    (x, generator), (wanted, their_generator) = our_run(ours, steps, eta), their_run(theirs, steps, eta)
    assert relative_error(x, wanted) < TOLERANCE
    assert generator.get_state().equal(their_generator.get_state())


@pytest.mark.parametrize("kind", ["UnCLIPScheduler", "DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("strength", [0.3, 0.99, 1.0])
def test_runs_from_noised_embeddings_equal_diffusers(kind, strength):
    ours, theirs = pair(kind, dict(KANDINSKY, **COSINE))
    x0 = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    assert (
        relative_error(our_run(ours, 25, 0.0, x0, strength)[0], their_run(theirs, 25, 0.0, x0, strength)[0]) < TOLERANCE
    )


@pytest.mark.parametrize("kind, config, steps", [CASES[0], CASES[4], CASES[10], CASES[18]])
def test_reads_the_files_that_diffusers_writes(kind, config, steps, tmp_path):
    config = {key: value for key, value in config.items() if key != "eta"}
    ours, theirs = pair(kind, config)
    theirs.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "scheduler_config.json"):
        read = DiffusersSchedule.from_pretrained(path)
        assert read.kind == kind and (read.clamp, read.radius) == (ours.clamp, ours.radius)
        assert read.table(steps).rows.equal(ours.table(steps).rows)


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("solver, spacing", [(s, spacing) for s in SPACED for spacing in (None, *SPACINGS)])
def test_solvers_in_place_of_a_schedulers_own(kind, solver, spacing):
    """The tables of a prior with the same betas, whatever the scheduler."""
    wanted = NoiseScheduler(beta_schedule="cosine", timesteps=100, loss_type="l2")
    ours = DiffusersSchedule(kind, trained_betas=wanted.betas.tolist(), num_train_timesteps=100)
    eta = dict(eta=0.5) if solver == "ddim_trailing" else {}
    for steps in (1, 2, 9, 100):
        table = ours.table(steps, solver=solver, spacing=spacing, **eta)
        other = step_table(wanted, solver, steps, "noise", spacing=spacing, **eta)
        assert (table.times, table.draws_noise, table.spacing) == (other.times, other.draws_noise, other.spacing)
        assert torch.allclose(table.rows, other.rows, rtol=1e-3, atol=1e-5)
        assert table.solver == solver and not table.uses_prediction and table.noise_scale == 1
    part = ours.table(8, solver=solver, spacing=spacing, strength=0.5, **eta)
    whole = ours.table(8, solver=solver, spacing=spacing, **eta)
    assert part.times == whole.times[4:] and part.rows[0, 4] == 0, "there is no last x0 at first"
    assert part.rows[2:].equal(whole.rows[6:])


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("number", [torch.tensor, np.int64], ids=["torch", "numpy"])
def test_numbers_of_other_libraries(kind, number):
    ours = DiffusersSchedule(kind)
    got, wanted = ours.table(number(5)), ours.table(5)
    assert got.times == wanted.times and got.rows.equal(wanted.rows)


def test_a_configuration_taken_over_from_another_scheduler():
    """`DDPMScheduler.from_config(unclip.config)`, as StableUnCLIP is put together."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler.from_config(diffusers.UnCLIPScheduler(**KARLO).config)
    ours = DiffusersSchedule("DDPMScheduler", **theirs.config)
    assert relative_error(our_run(ours, 25, 0.0)[0], their_run(theirs, 25, 0.0)[0]) < TOLERANCE


@pytest.mark.parametrize(
    "kind, config, message",
    [
        ("PNDMScheduler", {}, "kind='PNDMScheduler'; it must be one of 'UnCLIPScheduler', 'DDPMScheduler'"),
        ("DDPMScheduler", dict(clip_samples=True), "clip_samples=True is no entry .*; the nearest is 'clip_sample'"),
        ("DDPMScheduler", dict(variance_type="learned_range"), "variance_type='learned_range'; for a DDPMScheduler"),
        ("DDIMScheduler", dict(thresholding=True), "thresholding=True; for a DDIMScheduler it must be False"),
        ("UnCLIPScheduler", dict(beta_schedule="linear"), "beta_schedule='linear'; .* must be 'squaredcos_cap_v2'"),
        ("DDPMScheduler", dict(trained_betas=[0.1]), "trained_betas has 1 entries; num_train_timesteps says 1000"),
        ("HeunDiscreteScheduler", dict(use_beta_sigmas=True), "use_beta_sigmas=True; .* it must be False"),
    ],
)
def test_configurations_that_are_refused(kind, config, message):
    with pytest.raises(ValueError, match=message):
        DiffusersSchedule(kind, **config)


@pytest.mark.parametrize(
    "kind, kwargs, message",
    [
        ("UnCLIPScheduler", dict(steps=1), "num_inference_steps=1; .* of 1000 timesteps it must be 2 to 1000"),
        ("DDPMScheduler", dict(steps=1001), "num_inference_steps=1001; .* it must be 1 to 1000"),
        ("DDPMScheduler", dict(steps=9, eta=0.5), "eta=0.5; a DDPMScheduler has no eta"),
        ("DDIMScheduler", dict(steps=9, eta=1.5), "eta=1.5; it must be between 0 and 1"),
        ("DDIMScheduler", dict(steps=10, strength=0.05), "strength=0.05; .* at least 1 / num_inference_steps, 0.1"),
        ("DDIMScheduler", dict(steps=10, strength=1.2), "strength=1.2; it must be at most 1"),
        ("HeunDiscreteScheduler", dict(steps=10, strength=0.5), "strength=0.5; .* runs from pure noise"),
    ],
)
def test_runs_that_are_refused(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiffusersSchedule(kind).table(**kwargs)


def test_an_offset_past_the_end_is_refused():
    with pytest.raises(ValueError, match="steps_offset=5; with 1000 steps of 1 it leaves the 1000 timesteps"):
        DiffusersSchedule("DDIMScheduler", steps_offset=5).table(1000)


@pytest.mark.parametrize("content", ["[]", "{}", "nonsense", json.dumps({"beta_end": 1})])
def test_files_that_are_no_configuration(content, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no scheduler_config.json"):
        DiffusersSchedule.from_pretrained(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="scheduler_config.json does not exist"):
        DiffusersSchedule.from_pretrained(tmp_path)
