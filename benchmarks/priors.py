"""The priors that are measured, ours and the peers' with the same weights; their runs, and single steps of them."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastprior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.engine import shapes
from fastprior.engine.runs import Run
from fastprior.engine.steps import STEPS_AT_ONCE, StepInputs
from fastprior.kernels import ops
from fastprior.models.dalle2.layers import l2norm
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.pipelines.runs import PromptRun
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior.loop import CachedSteps

D2_SMALL = dict(dim=768, depth=12, dim_head=64, heads=12, max_text_len=77, normformer=True, num_timesteps=1000)
D2_LARGE = D2_SMALL | dict(depth=24, heads=32, max_text_len=256)  # LAION's prior for ViT-L/14
PT_1B = dict(num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=768, num_embeddings=77)
D2 = {"D2-small": D2_SMALL, "D2-large": D2_LARGE}
UNCLIP = dict(clip_sample_range=5.0, prediction_type="sample", variance_type="fixed_small_log")
# of a GPU: seconds of a whole run at batch 1, share of the floor, and cond_scale -> batch -> ratio to the compiled peer
GOALS = {
    "D2-small": dict(seconds=6.2e-3, share=0.5, ratios={1.0: {1: 3, 8: 5, 64: 15}, 3.0: {1: 6, 8: 10, 64: 30}}),
    "D2-large": dict(seconds=13e-3, share=0.6, ratios={1.0: {1: 4, 8: 10, 64: 40}, 3.0: {1: 8, 8: 20, 64: 80}}),
    "PT-1B": dict(seconds=15.5e-3, share=0.8, ratios={1.0: {1: 1.4, 8: 3, 64: 12}, 4.0: {1: 1.4, 8: 6, 64: 18}}),
}
quick = False


def shrink() -> None:
    """Make all models tiny, and runs short: see `--quick`."""
    global quick
    quick = True
    for sizes in D2.values():
        sizes.update(dim=64, depth=2, dim_head=32, heads=2, max_text_len=9)
    PT_1B.update(num_attention_heads=2, attention_head_dim=32, num_layers=2, embedding_dim=64, num_embeddings=9)


def fewer_layers() -> None:
    """Make all models shallow, but as wide as they are: their steps launch the same kernels, less often."""
    for sizes in D2.values():
        sizes.update(depth=2)
    PT_1B.update(num_layers=2)


def as_on_gpu(device: torch.device) -> bool:
    """Whether to do all that is for GPUs; it is tried with `--quick` too."""
    return device.type == "cuda" or quick


def steps(count: int) -> int:
    return min(count, 5) if quick else count


def batch_size(count: int) -> int:
    return min(count, 2) if quick else count


def build(module, device, model: str = "D2-small") -> nn.Module:
    torch.manual_seed(0)
    sizes = D2[model]
    net = module.DiffusionPriorNetwork(**sizes)
    prior = module.DiffusionPrior(net, image_embed_dim=sizes["dim"], timesteps=1000, cond_drop_prob=0.1)
    return prior.eval().to(device)


@functools.cache
def ours(device, model: str = "D2-small") -> nn.Module:
    return build(fastprior, device, model)


@functools.cache
def peers(device, model: str = "D2-small") -> nn.Module:
    import dalle2_pytorch  # ours are measured without it too

    return build(dalle2_pytorch, device, model)


def pair(device, model: str = "D2-small"):
    """(ours, the peer's): the same seed makes the same weights."""
    return ours(device, model), peers(device, model)


def text(prompts: int, device) -> dict:
    """Random captions of full length, of CLIP's 77 tokens at most."""
    draw, dim, length = torch.Generator().manual_seed(prompts), D2_SMALL["dim"], D2_SMALL["max_text_len"]
    embed, encodings = torch.randn(prompts, dim, generator=draw), torch.randn(prompts, length, dim, generator=draw)
    return dict(text_embed=l2norm(embed).to(device), text_encodings=encodings.to(device))


def pt_text(prompts: int, tokens: int, device) -> TextEncoding:
    """Random encodings of prompts of `tokens` tokens, padded to the longest."""
    dim, length = PT_1B["embedding_dim"], PT_1B["num_embeddings"]
    draw = torch.Generator().manual_seed(prompts)
    embeds, encodings = torch.randn(prompts, dim, generator=draw), torch.randn(prompts, length, dim, generator=draw)
    mask = (torch.arange(length) < tokens).expand(prompts, -1)
    return TextEncoding(embeds.to(device), encodings.to(device), mask.to(device))


def pt_prior(device, make: type[nn.Module] = PriorTransformer, layers: int | None = None) -> nn.Module:
    """A `PriorTransformer`, ours or diffusers', with the architecture of Kandinsky and Karlo, and random weights."""
    torch.manual_seed(0)
    with torch.device(device):  # a billion weights, drawn where they are to lie
        prior = make(**PT_1B | (dict(num_layers=layers) if layers and not quick else {}))
    with torch.no_grad():
        for weight in (prior.positional_embedding, prior.prd_embedding, prior.clip_std):
            weight.normal_()
    return prior.eval().to(device)


def step_weights(net: nn.Module) -> int:
    """Of a `DiffusionPriorNetwork` or `PriorTransformer`: how many a step reads, each once."""
    if hasattr(net, "transformer_blocks"):
        read = net.transformer_blocks, net.proj_in, net.proj_to_clip_embeddings
    else:
        read = (net.causal_transformer,)
    return sum(p.numel() for module in read for p in module.parameters() if p.ndim == 2)


def step_of(model: str, dtype: torch.dtype, device, compile: bool = True) -> tuple[Callable[[], Any], int, int, int]:
    """Steps at batch 1, without guidance (which reads one row of a table more of D2).

    Returns:
        what runs them, for as often as wanted; how many: one, or where runs make several in a call as many; the weights
        that each reads once; the tokens that go through them.
    """
    if model == "PT-1B":
        return _pt_step(dtype, device, compile)
    prior = copy.deepcopy(ours(device, model))
    plan = prior.sampling_plan(64, 1.0)
    net = prior.net.to(dtype)
    with torch.no_grad():
        steps = CachedSteps(net, plan)
        inputs = steps.prefill(text(1, device), 1)
        run, count = _several(steps.run(inputs, 1.0, 1)) or (_as_in_runs(steps.step, inputs, net.dim, compile), 1)
    return run, count, step_weights(net), plan.suffix_tokens


def _pt_step(dtype: torch.dtype, device, compile: bool) -> tuple[Callable[[], Any], int, int, int]:
    prior, dim = pt_prior(device).to(dtype), PT_1B["embedding_dim"]
    schedule = DiffusersSchedule("UnCLIPScheduler", **UNCLIP)
    table = schedule.table(25)
    with torch.no_grad():
        encoding = pt_text(1, PT_1B["num_embeddings"], device)
        encoding = encoding._replace(embeds=encoding.embeds.to(dtype), encodings=encoding.encodings.to(dtype))
        cond = prior.prefill(*encoding, torch.tensor(table.times, device=device))
        prompt = PromptRun(prior, schedule, table, encoding, [0], 1, 1, False, 1.0)
        inputs = StepInputs(cond, table.rows.to(device, torch.float32))
        of_steps = _several(prompt.prepared(prior, inputs))
    run, count = of_steps or (_as_in_runs(prompt.step(prior), inputs, dim, compile), 1)
    return run, count, step_weights(prior), 3


def _several(run: Run | None) -> tuple[Callable[[], Any], int] | None:
    """What makes the first steps of a run, and how many; None without one."""
    if run is None:
        return None
    run.start(torch.randn_like(run.x))
    several = [None] * min(STEPS_AT_ONCE, run.steps)
    return lambda: run(0, several), len(several)


def _as_in_runs(step: Callable, inputs: StepInputs, dim: int, compile: bool) -> Callable[[], Any]:
    """A step whose kernels share a workspace, which is cleared once and not for each of them."""
    step, workspace, device = shapes.compiled(step) if compile else step, ops.Workspace(), inputs.rows.device
    state = torch.randn(3, 1, dim, device=device)
    scale, index = torch.ones((), device=device), torch.tensor(2, device=device)

    @torch.no_grad()
    def run():
        with ops.sharing(workspace):
            return step(inputs, scale, *state, index)

    return run
