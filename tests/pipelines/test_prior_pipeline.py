"""PriorPipeline gives what diffusers' prior pipelines give, from the same folder and the same generator."""

import copy
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import fastprior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from helpers.pairwise import pairwise
from helpers.priors import relative_error

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from PIL import Image  # noqa: E402

from helpers.pipeline_cases import DIM, LENGTH, make_parts  # noqa: E402

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by
STEPS = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("tokenizer") / "files")


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    diffusers.KandinskyV22PriorPipeline(**parts).save_pretrained(path)
    return path


@pytest.fixture
def ours(folder):
    return PriorPipeline.from_pretrained(folder)


def theirs(parts, kind="KandinskyV22PriorPipeline"):
    pipeline = getattr(diffusers, kind)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(rows=None):
    generators = [torch.Generator().manual_seed(seed) for seed in range(rows or 1)]
    return generators if rows else generators[0]


def assert_same(got, wanted):
    assert relative_error(got.image_embeds, wanted.image_embeds) < TOLERANCE
    assert relative_error(got.negative_image_embeds, wanted.negative_image_embeds) < TOLERANCE


CALLS = {
    "one": dict(prompt="red fox"),
    "many": dict(prompt=["red fox", "", "red fox"], num_images_per_prompt=2),
    "negative": dict(prompt="red fox", negative_prompt="low", num_images_per_prompt=2),
    "negatives": dict(prompt=["red fox", "cat"], negative_prompt=["low", "bad art"], guidance_scale=2.5),
    "no-guidance": dict(prompt=["red fox", "cat"], guidance_scale=1.0),
    "no-guidance-negative": dict(prompt=["red fox", "cat"], negative_prompt=["low", "low"], guidance_scale=0.5),
    "steps": dict(prompt="red fox", num_inference_steps=25, guidance_scale=7.0),
}


@pytest.mark.parametrize("kind", ["KandinskyPriorPipeline", "KandinskyV22PriorPipeline"])
@pytest.mark.parametrize("name", CALLS)
def test_kandinsky(kind, name, ours, parts):
    kwargs = dict(num_inference_steps=STEPS) | CALLS[name]
    mine, other = seeded(), seeded()
    assert_same(ours(generator=mine, **kwargs), theirs(parts, kind)(generator=other, **kwargs))
    assert mine.get_state().equal(other.get_state())


@pytest.mark.parametrize("negative", [None, "low"])
@pytest.mark.parametrize("output_type, return_dict", [("np", True), ("pt", False), ("np", False)])
def test_output_types(output_type, return_dict, negative, ours, parts):
    given = dict(num_inference_steps=2, output_type=output_type, return_dict=return_dict, negative_prompt=negative)
    got, wanted = ours("red fox", generator=seeded(), **given), theirs(parts)("red fox", generator=seeded(), **given)
    assert return_dict or type(got) is type(wanted) is tuple
    for mine, other in zip(got, wanted.to_tuple() if return_dict else wanted):
        assert type(mine) is type(other) and mine.dtype == other.dtype
        assert relative_error(torch.as_tensor(mine), torch.as_tensor(other)) < TOLERANCE
    if return_dict:
        assert got["image_embeds"] is got.image_embeds is got[0] is got.to_tuple()[0]


def test_arrays_of_bf16_are_fp32(ours):
    ours.prior.to(torch.bfloat16)
    text = ours.encode_text("red fox")
    text = text._replace(embeds=text.embeds.bfloat16(), encodings=text.encodings.bfloat16())
    zero = torch.zeros(1, DIM)
    tensors, arrays = (
        ours(text, generator=seeded(), num_inference_steps=2, zero_embed=zero, output_type=kind)
        for kind in ("pt", "np")
    )
    assert tensors.image_embeds.dtype == torch.bfloat16
    assert np.array_equal(arrays.image_embeds, tensors.image_embeds.float().numpy())


def test_negative_prompts(ours, parts):
    """One for all prompts, which diffusers takes for one prompt alone, or as many; others are refused by both."""
    prompt, run = ["red fox", "cat"], dict(num_inference_steps=2, num_images_per_prompt=2)
    wanted = theirs(parts)(prompt, negative_prompt=["low", "low"], generator=seeded(), **run)
    for negative in ("low", ["low"], ["low", "low"], ("low", "low"), ours.encode_text("low")):
        assert_same(ours(prompt, negative, generator=seeded(), **run), wanted)
    for given in (["low"] * 3, ["low", "low", "bad", "bad"]):
        for pipeline in (ours, theirs(parts)):
            with pytest.raises(ValueError, match="negative_prompt"):
                pipeline(prompt, negative_prompt=given, **run)


COPIES = {"deep": copy.deepcopy, "pickled": lambda pipeline: pickle.loads(pickle.dumps(pipeline))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{}, dict(quantise="int8")], ids=["plain", "quantised"])
def test_a_copy_is_of_its_own_prior(options, how, folder, lenient):
    pipeline = PriorPipeline.from_pretrained(folder, **options)
    run = dict(num_inference_steps=4)
    before = pipeline("red fox", generator=seeded(), **run)
    copied, shallow = COPIES[how](pipeline), copy.copy(pipeline)
    with torch.no_grad():
        pipeline.prior.proj_in.weight.mul_(-1)
        pipeline.prior.transformer_blocks[0].ff.net[2].weight.mul_(2)
    after = pipeline("red fox", generator=seeded(), **run)
    assert relative_error(after.image_embeds, before.image_embeds) > 0.02
    assert_same(copied("red fox", generator=seeded(), **run), before)
    assert_same(shallow("red fox", generator=seeded(), **run), after)


@pytest.mark.parametrize("given", ["latents", "generators"])
def test_initial_noise_and_generators_by_row(given, ours, parts):
    def kwargs():
        if given == "generators":
            return dict(generator=seeded(rows=2))
        return dict(generator=seeded(), latents=torch.randn(2, DIM, generator=torch.Generator().manual_seed(7)))

    prompt = ["red fox", "cat"]
    wanted = theirs(parts)(prompt, num_inference_steps=STEPS, **kwargs())
    assert_same(ours(prompt, num_inference_steps=STEPS, **kwargs()), wanted)


@pytest.mark.parametrize(
    "image, strength, name",
    pairwise(
        image=["embeddings", "pixels", "picture", "pictures"], strength=[0.3, 1.0], name=["one", "many", "negatives"]
    ),
)
def test_from_images(image, strength, name, ours, parts):
    kwargs = CALLS[name] | dict(num_inference_steps=STEPS, strength=strength)
    draw = torch.Generator().manual_seed(3)
    count = len(kwargs["prompt"]) if isinstance(kwargs["prompt"], list) and image != "picture" else 1
    kwargs["image"] = {
        "embeddings": torch.randn(count, DIM, generator=draw),
        "pixels": torch.randn(count, 3, 8, 8, generator=draw),
        "picture": picture(),
        "pictures": [picture(seed) for seed in range(count)],
    }[image]
    wanted = theirs(parts, "KandinskyV22PriorEmb2EmbPipeline")(generator=seeded(), **kwargs)
    assert_same(ours(generator=seeded(), **kwargs), wanted)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "kind, negative, negative_prior, texts",
    pairwise(
        kind=["KandinskyPriorPipeline", "KandinskyV22PriorPipeline"],
        negative=["", "low"],
        negative_prior=[None, "bad"],
        texts=[(), ("red fox", "cat")],
    ),
    ids=str,
)
def test_interpolation(kind, negative, negative_prior, texts, ours, parts):
    images = {"KandinskyPriorPipeline": 1, "KandinskyV22PriorPipeline": 2}[kind]
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    given = [picture(), pixels, *texts], [0.3, 0.2, 0.1, 0.4][: 2 + len(texts)]
    kwargs = dict(num_images_per_prompt=images, num_inference_steps=STEPS, guidance_scale=3.0)
    kwargs |= dict(negative_prompt=negative, negative_prior_prompt=negative_prior)
    mine, other = seeded(), seeded()
    got = ours.interpolate(*given, generator=mine, **kwargs)
    assert_same(got, theirs(parts, kind).interpolate(*given, generator=other, **kwargs))
    assert mine.get_state().equal(other.get_state())


class Stop(Exception):
    """Carries the result of the prior's stage out of a pipeline that would go on to make pictures."""


def prior_stage(pipeline, *args, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    finish = pipeline.prior.post_process_latents

    def stop(latents):
        raise Stop(finish(latents))

    pipeline.prior.post_process_latents = stop
    try:
        pipeline(*args, **kwargs)
    except Stop as stopped:
        return stopped.args[0]
    finally:
        del pipeline.prior.post_process_latents


@pytest.mark.parametrize("kind", ["unclip", "stable-unclip-ddpm", "stable-unclip-ddim"])
def test_prior_stage_of_pipelines_that_go_on(kind, parts, tmp_path):
    """Folders where what is the prior's says so, and another text encoder stands beside the prior's."""
    prior, prompt = parts["prior"], ["red fox", "cat"]
    text = dict(text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"])
    options = dict(num_images_per_prompt=2, prior_num_inference_steps=STEPS, prior_guidance_scale=3.0)
    scheduler, eta = parts["scheduler"], 0.0
    if kind == "unclip":
        names = "decoder", "text_proj", "super_res_first", "super_res_last", "decoder_scheduler", "super_res_scheduler"
        pipeline = diffusers.UnCLIPPipeline(prior=prior, prior_scheduler=scheduler, **text, **dict.fromkeys(names))
    else:
        scheduler = getattr(diffusers, f"{kind[-4:].upper()}Scheduler").from_config(scheduler.config)
        names = "image_normalizer", "image_noising_scheduler", "tokenizer", "text_encoder", "unet", "scheduler", "vae"
        text = {f"prior_{name}": part for name, part in text.items()}
        rest = dict.fromkeys(names) | dict(image_noising_scheduler=diffusers.DDPMScheduler())
        pipeline = diffusers.StableUnCLIPPipeline(prior=prior, prior_scheduler=scheduler, **text, **rest)
        options |= dict(height=8, width=8)
        eta = 0.6 if kind == "stable-unclip-ddim" else 0.0
        options["eta"] = eta
        (tmp_path / "text_encoder").mkdir()  # of the decoder
    for name, part in dict(text, prior=prior, prior_scheduler=scheduler).items():
        part.save_pretrained(tmp_path / name)
    wanted = prior_stage(pipeline, prompt, generator=seeded(), **options)
    ours = PriorPipeline.from_pretrained(tmp_path)
    kwargs = dict(num_images_per_prompt=2, num_inference_steps=STEPS, guidance_scale=3.0, eta=eta)
    got = ours(prompt, generator=seeded(), **kwargs)
    assert relative_error(got.image_embeds, wanted) < TOLERANCE
    assert got.negative_image_embeds is None


@pytest.mark.parametrize(
    "steps",
    [
        dict(solver="ddim_trailing", eta=0.5), dict(solver="dpm++", spacing="logsnr"), dict(solver="sde-dpm++"),
        dict(solver="sde-dpm++", spacing="karras", num_inference_steps=1),
    ],
)  # fmt: skip
def test_solvers_in_place_of_the_schedulers(steps, ours):
    """The solver's own recursion, with every step's prediction by the whole prior."""
    steps = dict(num_inference_steps=STEPS) | steps
    text, empty, scale = ours.encode_text(["red fox", "cat"]), ours.encode_text(""), 3.0
    options = dict(num_images_per_prompt=2, guidance_scale=scale, zero_embed=ours.zero_embed(), **steps)
    generator, other = seeded(), seeded()
    got = ours(text, generator=generator, **options).image_embeds
    table = ours.schedule.table(steps.pop("num_inference_steps"), **steps)
    prior, alphas, last = ours.prior, ours.schedule.alphas_cumprod, torch.zeros(4, DIM)
    x = torch.randn(4, DIM, generator=other)
    conditions = [
        TextEncoding(*(t.repeat_interleave(4 // len(t), dim=0) for t in encoding)) for encoding in (text, empty)
    ]
    with torch.no_grad():
        for t, (p, q, a, b, c, s), draws in zip(table.times, table.rows.float(), table.draws_noise):
            assert (p, q) == (0, 1) and 0 < alphas[t] < 1
            cond, null = (prior(x, t, *condition).predicted_image_embedding for condition in conditions)
            x0 = (null + scale * (cond - null)).clamp(-ours.schedule.radius, ours.schedule.radius)
            noise = torch.randn(4, DIM, generator=other) if draws else 0.0
            x, last = a * x + b * x0 + c * last + s * noise, x0
    assert relative_error(got, prior.post_process_latents(x)) < TOLERANCE
    assert generator.get_state().equal(other.get_state())


def test_interpolation_by_another_solver(ours):
    """The generator goes on as if the zero image's embedding had been sampled, by the same solver."""
    steps = dict(num_inference_steps=4, solver="sde-dpm++", spacing="logsnr", guidance_scale=2.0)
    mine, other = seeded(), seeded()
    got = ours.interpolate(["red fox", "cat"], [0.5, 0.5], generator=mine, **steps).image_embeds
    wanted = sum(0.5 * ours(text, generator=other, **steps).image_embeds for text in ("red fox", "cat"))
    assert relative_error(got, wanted) < TOLERANCE
    for _ in range(4):  # the start, and all steps but the last
        torch.randn(1, DIM, generator=other)
    assert mine.get_state().equal(other.get_state())


def test_ready_embeddings(ours, folder):
    """Encoded texts need no encoder, and mean the same as the texts."""
    kwargs = dict(num_inference_steps=STEPS, num_images_per_prompt=2)
    wanted = ours(["red fox", "cat"], generator=seeded(), **kwargs)
    text, empty, zero = ours.encode_text(["red fox", "cat"]), ours.encode_text(""), ours.zero_embed()
    bare = PriorPipeline(ours.prior, ours.schedule)
    got = bare(text, empty, zero_embed=zero, generator=seeded(), **kwargs)
    assert got.image_embeds.equal(wanted.image_embeds)
    assert got.negative_image_embeds.equal(wanted.negative_image_embeds)
    low = ours.encode_text(["low", "bad art"])
    wanted = ours(["red fox", "cat"], ["low", "bad art"], generator=seeded(), **kwargs)
    assert_same(bare(text, low, generator=seeded(), **kwargs), wanted)
    assert bare(text, guidance_scale=1.0, **kwargs).negative_image_embeds is None
    with pytest.raises(ValueError, match="tokenizer=None; it is needed here and no folder was given"):
        bare(text, **kwargs)


def test_files_of_a_variant(ours, parts, tmp_path):
    diffusers.KandinskyV22PriorPipeline(**parts).save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "text_encoder" / "model.safetensors").exists()
    pipeline = PriorPipeline.from_pretrained(tmp_path, variant="fp16")
    kwargs = dict(num_inference_steps=STEPS)
    assert_same(pipeline("red fox", generator=seeded(), **kwargs), ours("red fox", generator=seeded(), **kwargs))
    with pytest.raises(FileNotFoundError, match="no folder 'prior'; it must be the folder of a pipeline with a prior"):
        PriorPipeline.from_pretrained(tmp_path / "prior")


def test_a_prior_that_diffusers_loaded(ours, parts):
    pipeline = PriorPipeline(
        fastprior.accelerate_prior(copy.deepcopy(parts["prior"])), ours.schedule, folder=ours.folder
    )
    kwargs = dict(num_inference_steps=STEPS, num_images_per_prompt=2)
    assert_same(pipeline("red fox", generator=seeded(), **kwargs), ours("red fox", generator=seeded(), **kwargs))


def test_each_text_is_encoded_once(ours):
    encoder, seen = ours.part("text_encoder"), []
    hook = encoder.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    ours(["red fox", "cat", "red fox"], num_images_per_prompt=3, num_inference_steps=2)
    hook.remove()
    assert sorted(seen) == [1, 2]


def test_text_of_another_dtype_than_the_prior(ours):
    text = ours.encode_text(["red fox", "cat"])
    kwargs = dict(num_inference_steps=STEPS, guidance_scale=1.0)
    wanted = ours(text, generator=seeded(), **kwargs).image_embeds
    ours.prior.bfloat16()
    got = ours(text, generator=seeded(), **kwargs).image_embeds
    assert got.dtype == torch.float32 and torch.cosine_similarity(got, wanted).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, ours, parts, folder):
    """Without noise in the steps the error against fp64 is at most twice that of diffusers in the same dtype."""
    ddim, latents = dict(clip_sample_range=5.0, prediction_type="sample", beta_schedule="squaredcos_cap_v2"), seeded()
    latents = torch.randn(2, DIM, generator=latents, dtype=torch.float64)
    text = TextEncoding(*(t.double() if t.is_floating_point() else t for t in ours.encode_text(["red fox", "cat"])))
    empty = TextEncoding(*(t.double() if t.is_floating_point() else t for t in ours.encode_text([""] * 2)))

    def reference(dtype):
        """The loop of the pipelines with diffusers' model and scheduler."""
        prior, scheduler, x = (
            copy.deepcopy(parts["prior"]).to(dtype),
            diffusers.DDIMScheduler(**ddim),
            latents.to(dtype),
        )
        both = [torch.cat(pair).to(dtype) for pair in zip(empty, text)]
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            null, pred = prior(x.repeat(2, 1), t, *both[:2], both[2].bool()).predicted_image_embedding.chunk(2)
            x = scheduler.step(null + 4.0 * (pred - null), t, x).prev_sample
        return prior.post_process_latents(x)

    with torch.no_grad():
        exact, wanted = reference(torch.float64), reference(dtype)
    pipeline = PriorPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.schedule = DiffusersSchedule("DDIMScheduler", **ddim)
    text, empty = (TextEncoding(*(t.to(dtype) for t in given[:2]), given.mask) for given in (text, empty))
    got = pipeline(text, empty, zero_embed=pipeline.zero_embed(), latents=latents.to(dtype), num_inference_steps=STEPS)
    assert got.image_embeds.dtype == got.negative_image_embeds.dtype == dtype
    assert relative_error(got.image_embeds, exact) < 2 * relative_error(wanted, exact) + 1e-6


def counting(monkeypatch):
    """Counts the graphs that torch.compile makes, and runs them as they are."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_compiled_steps_are_the_same(monkeypatch, ours, folder):
    """As one graph, which other texts, lengths and scales use again."""
    counter = counting(monkeypatch)
    compiled = PriorPipeline.from_pretrained(folder, compile=True)
    for prompt, scale in (("red", 4.0), ("fox", 7.0), ("red fox", 4.0)):
        kwargs = dict(num_inference_steps=3, guidance_scale=scale)
        got, wanted = (run(prompt, generator=seeded(), **kwargs) for run in (compiled, ours))
        assert_same(got, wanted)
        assert counter.frame_count == 1


@pytest.mark.parametrize("name", CALLS)
def test_padded_parts_are_the_same(name, monkeypatch, ours, folder):
    """Groups of prompts, negative ones and unconditional ones, each in parts, the last of which is padded."""
    counting(monkeypatch)
    padded = PriorPipeline.from_pretrained(folder, compile=True, batch_sizes=(2,))
    kwargs = CALLS[name] | dict(num_inference_steps=3)
    assert_same(padded(generator=seeded(), **kwargs), ours(generator=seeded(), **kwargs))


def long_texts(lengths, longest, dim):
    """Encodings of texts of given lengths."""
    draw = torch.Generator().manual_seed(len(lengths))
    shape = len(lengths), longest, dim
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TextEncoding(torch.randn(shape[0], dim, generator=draw), torch.randn(shape, generator=draw), mask)


@pytest.fixture(scope="module")
def long_prior():
    torch.manual_seed(0)
    prior = fastprior.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=DIM, num_embeddings=40
    ).eval()
    for name, weights in prior.named_parameters():
        torch.nn.init.normal_(weights, mean=float("norm" in name and "weight" in name), std=0.2)
    return prior


@pytest.mark.slow
def test_graphs_are_few(monkeypatch, ours, long_prior):
    """Two batch sizes and three text lengths: six graphs, whatever the prompts, and none of them twice."""
    counter = counting(monkeypatch)
    plain = PriorPipeline(long_prior, ours.schedule)
    compiled = PriorPipeline(long_prior, ours.schedule, compile=True, batch_sizes=(1, 4))
    empty = long_texts([2], 40, DIM)
    cases = [[length] for length in (2, 7, 14, 15, 16, 30, 31, 32, 39, 40)]
    cases += [[9, 3], [15] * 3, [5, 20, 3, 31], [40, 1], [7] * 6, [12, 40, 2, 2, 2], [33, 1, 15, 16, 31, 32, 40]]
    for lengths in cases:
        text = long_texts(lengths, 40, DIM)
        kwargs = dict(num_inference_steps=3, zero_embed=torch.zeros(1, DIM))
        got, wanted = (run(text, empty, generator=seeded(), **kwargs).image_embeds for run in (compiled, plain))
        assert relative_error(got, wanted) < TOLERANCE, lengths
    assert counter.frame_count == 6


@pytest.mark.slow
@pytest.mark.parametrize("batch_sizes", [(1,), (2, 8)])
def test_rows_do_not_depend_on_batch_sizes(batch_sizes, monkeypatch, ours, long_prior):
    """Nor on the length of the other texts; of each row alone, from the same noise."""
    counting(monkeypatch)
    pipeline = PriorPipeline(long_prior, ours.schedule, compile=True, batch_sizes=batch_sizes)
    text, empty, kwargs = long_texts([3, 17, 40], 40, DIM), long_texts([2], 40, DIM), dict(num_inference_steps=3)
    kwargs |= dict(zero_embed=torch.zeros(1, DIM))
    together = pipeline(text, empty, generator=seeded(rows=3), **kwargs).image_embeds
    for row, generator in enumerate(seeded(rows=3)):
        alone = TextEncoding(*(t[row : row + 1] for t in text))
        got = pipeline(alone, empty, generator=generator, **kwargs).image_embeds
        assert relative_error(got, together[row : row + 1]) < TOLERANCE
        assert relative_error(got, together[row - 1 : row or None]) > 0.1


@pytest.mark.slow
def test_a_shared_pipeline_in_threads(ours, folder, monkeypatch):
    """Each thread gets what it gets alone."""
    counting(monkeypatch)
    pipeline = PriorPipeline.from_pretrained(folder, compile=True)
    prompts = ["red", "fox", "red fox", "cat"]

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(prompts[seed % 4], generator=generator, num_inference_steps=3, guidance_scale=1.0 + seed)

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, seed) for seed in range(8)]
        while not all(future.done() for future in futures):
            assert pipeline.stats()["p50_ms"] > 0  # while they run
        together = [future.result() for future in futures]
    assert pipeline.stats()["calls"] == 16
    assert all(torch.equal(a.image_embeds, b.image_embeds) for a, b in zip(alone, together))
    assert not torch.equal(alone[0].image_embeds, alone[4].image_embeds)


def test_texts_of_many_threads(ours):
    """Each is padded: a tokenizer keeps how it pads, and calls that ask for its length change that."""
    with ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(lambda number: ours.encode_text(("red fox", "cat")[number % 2]).mask, range(400)))
    assert {mask.shape for mask in masks} == {(1, LENGTH)}


@pytest.mark.slow
def test_neither_diffusers_nor_transformers_is_needed(ours, folder, tmp_path):
    """With embeddings at hand: in a process where they cannot be imported, nor what else is heavy."""
    text, empty = ours.encode_text("red fox"), ours.encode_text("")
    torch.save([*text, *empty], tmp_path / "texts.pt")
    code = f"""
import sys
absent = "diffusers", "transformers", "accelerate", "peft", "open_clip"
sys.modules.update(dict.fromkeys(absent))
import torch, fastprior
from fastprior.pipelines.text_encoding import TextEncoding
tensors = torch.load({str(tmp_path / "texts.pt")!r})
pipeline = fastprior.PriorPipeline.from_pretrained({str(folder)!r})
options = dict(generator=torch.Generator().manual_seed(0), num_inference_steps={STEPS})
options["zero_embed"] = torch.zeros(1, {DIM})
embeds = pipeline(TextEncoding(*tensors[:3]), TextEncoding(*tensors[3:]), **options).image_embeds
torch.save(embeds, {str(tmp_path / "embeds.pt")!r})
try:
    pipeline("red fox")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"tokenizer of {folder} needs transformers: pip install transformers\n"
    wanted = ours("red fox", generator=seeded(), num_inference_steps=STEPS).image_embeds
    assert relative_error(torch.load(tmp_path / "embeds.pt"), wanted) < TOLERANCE


def test_long_texts_are_cut_with_a_warning(ours, parts):
    long = "abcdefgh hijkl"
    with pytest.warns(
        UserWarning, match=r"1 texts have more than 9 tokens, and are cut there; the first is 'abcdefgh hijkl'"
    ):
        got = ours(["cat", long], generator=seeded(), num_inference_steps=STEPS)
    assert_same(got, theirs(parts)(["cat", long], generator=seeded(), num_inference_steps=STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.encode_text("abcdefg")


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ([3], {}, "prompt=3; it must be a string, a list of strings, or a TextEncoding"),
        ([[]], {}, r"prompt=\[\]; it must be a string"),
        (["a", ["b", 1]], {}, r"negative_prompt=\['b', 1\]; it must be a string"),
        ([["a", "b", "c"], ["d", "e"]], {}, "negative_prompt has 2 texts; it must have 1, or as many as prompt, 3"),
        (["a"], dict(num_images_per_prompt=0), "num_images_per_prompt=0; it must be at least 1"),
        (["a"], dict(generator=[torch.Generator()] * 2, num_images_per_prompt=3), "generator has 2 entries; .* 3 rows"),
        (["a"], dict(latents=torch.zeros(2, DIM)), r"latents has shape \(2, 16\); it must be \(1, 16\)"),
        (["a"], dict(latents=torch.zeros(1, DIM), image=torch.zeros(1, DIM)), "latents and image were both given"),
        (["a"], dict(image=torch.zeros(2, DIM)), "image has 2 images; the number of prompts must be a multiple"),
        (["a"], dict(image=torch.zeros(2, 3, DIM)), r"image has shape \(2, 3, 16\); it must be \(images, 3, height"),
        (["a"], dict(image=torch.zeros(1, DIM), strength=0.0), "strength=0.0; it must be at most 1, and at least"),
        (["a"], dict(zero_embed=torch.zeros(2, DIM)), r"zero_embed has shape \(2, 16\); it must be \(1, 16\)"),
        (["a"], dict(output_type="pil"), "output_type='pil'; it must be 'pt' or 'np'"),
        (["a"], dict(eta=0.5), "eta=0.5; a UnCLIPScheduler has no eta"),
        (["a"], dict(solver="dpm++", eta=0.5), r"eta=0.5; a dpm\+\+ has no eta"),
        (["a"], dict(solver="ddpm"), "solver='ddpm'; it must be one of None, 'ddim_trailing', 'dpm\\+\\+'"),
        (["a"], dict(solver="dpm++", spacing="even"), "spacing='even'; it must be one of 'trailing', 'logsnr'"),
        (["a"], dict(spacing="logsnr"), "spacing='logsnr'; a scheduler has times of its own, so it goes with a solver"),
    ],
)
def test_arguments_that_are_refused(args, kwargs, message, ours):
    with pytest.raises((ValueError, TypeError), match=message):
        ours(*args, **kwargs)


def test_encodings_of_another_prior_are_refused(ours):
    text = ours.encode_text("red fox")
    with pytest.raises(
        ValueError, match=r"prompt.encodings has shape \(1, 8, 16\); for this prior it must be \(1, 9, 16\)"
    ):
        ours(text._replace(encodings=text.encodings[:, 1:]))
    with pytest.raises(ValueError, match="images_and_prompts has 1 entries and weights 2"):
        ours.interpolate(["a"], [0.5, 0.5])
    with pytest.raises(ValueError, match="images_and_prompts has an entry of 2 images; each must be one"):
        ours.interpolate([torch.zeros(2, 3, 8, 8)], [1.0])
    with pytest.raises(TypeError, match="prior is a .*Linear; it must be fastprior's, or made so by accelerate_prior"):
        PriorPipeline(torch.nn.Linear(1, 1), ours.schedule)
    with pytest.raises(ValueError, match=r"batch_sizes=\(0, 2\); it must hold at least one number, each at least 1"):
        PriorPipeline(ours.prior, ours.schedule, batch_sizes=(0, 2))
    with pytest.raises(TypeError, match="unexpected keyword argument 'unet'"):
        PriorPipeline(ours.prior, ours.schedule, unet=None)
