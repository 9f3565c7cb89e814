"""Whole runs that are measured, ours and the peers', for the same noise: what compares them is in the benchmarks."""

import contextlib
import copy
import functools
import io

import priors
import torch
from priors import PT_1B, UNCLIP, pair, pt_prior, pt_text, text

from fastprior import PriorPipeline
from fastprior.kernels import ops
from fastprior.pipelines.text_encoding import TextEncoding

SEED = 7
SCALE = 4.0  # of guidance, as diffusers' prior pipelines have it
LAYERS = {"cpu": 4, "cuda": PT_1B["num_layers"]}


def pt_steps() -> int:
    return priors.steps(25)


def peer_run(prior, batch: int, cond_scale: float, device, steps: int) -> torch.Tensor:
    torch.manual_seed(SEED)
    shape = batch, prior.image_embed_dim
    with contextlib.redirect_stderr(io.StringIO()):
        return prior.p_sample_loop(shape, text_cond=text(batch, device), cond_scale=cond_scale, timesteps=steps)


def our_run(prior, batch: int, cond_scale: float, device, steps: int | None = None) -> torch.Tensor:
    torch.manual_seed(SEED)
    steps = priors.steps(64) if steps is None else steps
    kwargs = dict(text_cond=text(batch, device), cond_scale=cond_scale, timesteps=steps, progress=False)
    return prior.p_sample_loop((batch, prior.image_embed_dim), **kwargs)


def compiled_peer(device, model: str, dtype: str):
    """dalle2-pytorch's with a compiled network, in 16 bits with linears in `dtype` under autocast: else it crashes."""
    peer = copy.deepcopy(pair(device, model)[1])
    torch._dynamo.reset()
    peer.net.to(getattr(torch, dtype))
    forward = torch.compile(peer.net.forward, mode="reduce-overhead")

    def call(*args, **kwargs):
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            return forward(*args, **kwargs).float().clone()  # the next replay writes to the memory of this one

    peer.net.forward = call
    return peer


@functools.cache
def stock(device) -> torch.nn.Module:
    """diffusers' own prior."""
    import diffusers

    return pt_prior(device, diffusers.PriorTransformer, LAYERS[device.type])


def encoded(prompts: int, tokens: int, device, dtype: torch.dtype) -> TextEncoding:
    embeds, encodings, mask = pt_text(prompts, tokens, device)
    return TextEncoding(embeds.to(dtype), encodings.to(dtype), mask)


def in_diffusers(
    prior: torch.nn.Module,
    prompts: int,
    tokens: int,
    device,
    scale: float = SCALE,
    dtype=torch.float32,
    images: int = 1,
) -> torch.Tensor:
    """diffusers' pipeline, with ready encodings of the prompts and of the empty text, of the dtype of its state."""
    import diffusers

    scheduler = diffusers.UnCLIPScheduler(**UNCLIP)
    pipe = diffusers.KandinskyV22PriorPipeline(
        prior=prior, scheduler=scheduler, image_encoder=None, text_encoder=None, tokenizer=None, image_processor=None
    )
    pipe.set_progress_bar_config(disable=True)
    own, empty = encoded(prompts, tokens, device, dtype), encoded(1, 2, device, dtype)
    given = [torch.cat((e.expand(prompts, *e.shape[1:]), t)) if scale > 1 else t for e, t in zip(empty, own)]
    given = [t.repeat_interleave(images, dim=0) for t in given]
    pipe._encode_prompt = lambda *args: given
    pipe.get_zero_embed = lambda rows, device: torch.zeros(rows, PT_1B["embedding_dim"], device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    options = dict(num_images_per_prompt=images, num_inference_steps=pt_steps(), guidance_scale=scale)
    return pipe([""] * prompts, generator=generator, **options).image_embeds


def by_pipeline(
    pipeline: PriorPipeline, prompts: int, tokens: int, device, scale: float = SCALE, backend: str | None = None,
    images: int = 1, steps: int | None = None,
) -> torch.Tensor:  # fmt: skip
    generator = torch.Generator(device).manual_seed(SEED)
    with ops.using(ops.forced() if backend is None else backend):
        return pipeline(
            pt_text(prompts, tokens, device), pt_text(1, 2, device), num_inference_steps=steps or pt_steps(),
            guidance_scale=scale, generator=generator, num_images_per_prompt=images,
            zero_embed=torch.zeros(1, PT_1B["embedding_dim"], device=device),
        ).image_embeds  # fmt: skip
