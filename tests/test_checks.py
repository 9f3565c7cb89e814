"""Arguments that give no meaningful result are refused: one error with the argument, its value and the rule."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fastprior import DiffusionPrior, DiffusionPriorNetwork
from fastprior.checks import check_choice, check_count, check_number, check_share
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.optimizer import get_optimizer
from fastprior.serving import PriorSampler

NAN, INF, HUGE = math.nan, math.inf, 10**12
NO_COUNT = (0, -1, HUGE, True, "3", 3.0, NAN, None, [3])
NO_SHARE = (-0.1, 1.1, NAN, INF, HUGE, "0.1", [0.1])


def network(**changed):
    sizes = dict(dim=8, depth=1, dim_head=4, heads=2, num_timesteps=10, max_text_len=3)
    return DiffusionPriorNetwork(**sizes | changed)


def prior(**changed):
    given = dict(net=network(), image_embed_dim=8, timesteps=10, condition_on_text_encodings=False)
    return DiffusionPrior(**given | changed)


def transformer(**changed):
    sizes = dict(num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8, num_embeddings=3)
    return PriorTransformer(**sizes | changed)


def scheduler(**changed):
    return NoiseScheduler(**dict(beta_schedule="cosine", timesteps=10, loss_type="l2") | changed)


def diffusers_scheduler(**changed):
    return DiffusersSchedule(changed.pop("kind", "DDPMScheduler"), **changed)


def optimizer(**changed):
    return get_optimizer([torch.nn.Parameter(torch.ones(2, 2))], **changed)


def sampler(**changed):
    return PriorSampler(prior(), compile=False, **changed)


def average(**changed):
    ema = pytest.importorskip("fastprior.trainer.ema")
    return ema.EMA(prior(), **{name.removeprefix("ema_"): value for name, value in changed.items()})


def sample(**changed):
    text = normalize(torch.ones(1, 8), dim=-1)
    return prior(cond_drop_prob=0.1).sample(text_embed=text, **dict(progress=False, timesteps=3) | changed)


def serve(**changed):
    return sampler()(normalize(torch.ones(1, 8), dim=-1), **changed)


COUNTS = {
    network: "dim depth dim_head heads num_time_embeds num_image_embeds num_text_embeds",
    transformer: "num_attention_heads attention_head_dim num_layers embedding_dim num_embeddings",
    scheduler: "timesteps",
    prior: "timesteps image_channels",
    diffusers_scheduler: "num_train_timesteps",
    sampler: "samples_per_prompt",
    sample: "num_samples_per_batch",
}
SHARES = {
    network: "attn_dropout ff_dropout",
    transformer: "dropout",
    prior: "cond_drop_prob text_cond_drop_prob image_cond_drop_prob",
    average: "ema_min_value",
}
OTHERS = [  # what is called, an argument, and values that it cannot have
    (network, "num_timesteps", (0, -1, HUGE, True, "3", 3.0)),
    (network, "max_text_len", (-1, HUGE, True, "3", 3.0, None)),
    (network, "text_dim", (0, HUGE, "3")),
    (network, "ff_mult", (0, -1, NAN, INF, HUGE, "4")),
    (network, "dot_scale", (NAN, INF, "1")),
    (transformer, "additional_embeddings", (-1, HUGE, "4", NAN)),
    (transformer, "time_embed_dim", (-1, HUGE, "4", 2.5)),
    (transformer, "time_embed_act_fn", ("exec", None, 1, ["silu"], {})),
    (transformer, "norm_in_type", ("batch", 1, ["layer"])),
    (scheduler, "beta_schedule", ("cubic", None, 1, ["cosine"], {})),
    (scheduler, "loss_type", ("l3", None, ["l2"])),
    (scheduler, "p2_loss_weight_gamma", (NAN, INF, "1")),
    (prior, "image_embed_scale", (NAN, INF, -INF, 0, -1, "2", [2.0], 10**400)),
    (prior, "sample_timesteps", (0, -1, 11, HUGE, True, "3", 3.0, NAN)),
    (prior, "clamp", (0, -1, NAN, "l3")),
    (sample, "cond_scale", (NAN, INF, "2", [2.0])),
    (sample, "timesteps", (0, -1, 11, HUGE, True, "3", 3.0, NAN)),
    (sample, "eta", (NAN, -0.1, 1.1, INF, "1")),
    (sample, "solver", ("euler", 1, ["ddim"])),
    (serve, "cond_scale", (NAN, INF, "2")),
    (sampler, "batch_sizes", ((), (0,), (HUGE,), (True,), ("8",), (1.0,), "8", 8)),
    (sampler, "graph_memory", (0, -1, NAN, "1G")),
    (sampler, "timesteps", (0, -1, 11, "3", NAN)),
    (optimizer, "lr", (NAN, INF, -1, "1", None)),
    (optimizer, "wd", (NAN, INF, -0.1)),
    (optimizer, "eps", (NAN, -1)),
    (optimizer, "betas", ((0.9, NAN), (1, 0.9), (-0.1, 0.9))),
    (average, "ema_beta", (NAN, 1, -0.1, "1")),
    (average, "ema_update_after_step", (-1, NAN, "1", True)),
    (average, "ema_update_every", (0, -1, NAN, 1.5)),
    (average, "ema_inv_gamma", (0, NAN, INF)),
    (average, "ema_power", (NAN, INF)),
    (diffusers_scheduler, "kind", ("PNDMScheduler", None, 1, ["DDPMScheduler"], {})),
    (diffusers_scheduler, "beta_start", (NAN, INF, -0.1, 1, "0.1")),
    (diffusers_scheduler, "beta_end", (NAN, 2)),
    (diffusers_scheduler, "clip_sample_range", (NAN, -1, None, "1")),
    (diffusers_scheduler, "steps_offset", (-1, "1", HUGE, 0.5)),
    (diffusers_scheduler, "trained_betas", ([NAN] * 1000, ["1"] * 1000, [2.0] * 1000, "abc", 1)),
    (diffusers_scheduler, "timestep_spacing", ("x", 1, ["leading"])),
]
CASES = [(make, name, NO_COUNT) for make, names in COUNTS.items() for name in names.split()]
CASES += [(make, name, NO_SHARE) for make, names in SHARES.items() for name in names.split()]
CASES += OTHERS


def case(make, given, *values):
    """A parameter; what imports accelerate or torch._dynamo is slow."""
    marks = [pytest.mark.slow] if make in (average, optimizer) else []
    return pytest.param(
        make, given, *values, marks=marks, id=f"{make.__name__}-{' '.join([given] if values else given)}"
    )


@pytest.mark.parametrize("make, name, values", [case(*given) for given in CASES])
def test_nonsense_is_refused(make, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"(^|: ){name}\b.*; .*(must|has)") as caught:
            make(**{name: value})
            print(f"{name}={value!r} was taken")
        assert len(str(caught.value)) < 500


TAKEN = [
    (prior, dict(cond_drop_prob=0)),
    (prior, dict(cond_drop_prob=1, text_cond_drop_prob=np.float32(0.5), image_cond_drop_prob=True)),
    (prior, dict(sample_timesteps=10, image_embed_scale=3)),
    (prior, dict(image_embed_scale=torch.tensor(2.0), clamp=INF)),
    (prior, dict(sample_timesteps=None, image_embed_scale=None, image_embed_dim=np.int64(8))),
    (network, dict(attn_dropout=0, ff_dropout=1, ff_mult=2, max_text_len=0, num_timesteps=None)),
    (network, dict(ff_mult=0.5, depth=np.int64(2))),
    (transformer, dict(additional_embeddings=0, time_embed_dim=0, dropout=0)),
    (scheduler, dict(timesteps=1)),
    (sample, dict(cond_scale=0, eta=0)),
    (sample, dict(cond_scale=-1.5, eta=1)),
    (sample, dict(cond_scale=np.float64(2), timesteps=np.int64(2), num_samples_per_batch=1)),
    (sample, dict(cond_scale=torch.tensor(2.0))),
    (sampler, dict(batch_sizes=[8, 1, 8], graph_memory=1e9)),
    (optimizer, dict(lr=0, wd=0, betas=[0.0, 0.5])),
    (average, dict(ema_beta=0, ema_update_after_step=0, ema_power=-1)),
    (diffusers_scheduler, dict(beta_start=0, steps_offset=1, clip_sample=False)),
]


@pytest.mark.parametrize("make, given", [case(*given) for given in TAKEN])
def test_what_clients_give_is_taken(make, given):
    made = make(**given)
    assert not torch.is_tensor(made) or made.isfinite().all()


def test_the_rule_is_named():
    for check, value, rule in (
        (lambda value: check_count("a", value), 0, "a=0; it must be at least 1"),
        (lambda value: check_count("a", value), 2**40, "a=1099511627776; it must be at most 1,048,576"),
        (lambda value: check_count("a", value, 0), "x", "a='x'; it must be an integer of at least 0"),
        (lambda value: check_number("a", value), NAN, "a=nan; it must be a finite number"),
        (lambda value: check_number("a", value, above=0, most=2), 3, "a=3; it must be a finite number and more than 0"),
        (lambda value: check_share("a", value), 2, "a=2; it must be between 0 and 1"),
        (lambda value: check_choice("a", value, ("b", "c")), [1], "a=[1]; it must be one of 'b', 'c'"),
    ):
        with pytest.raises(ValueError, match=re.escape(rule)):
            check(value)
