"""Original files of Karlo and Kandinsky 2.1 become folders that compute what the original architecture computes."""

import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastprior
from fastprior.checkpoints.conversion import convert
from fastprior.checkpoints.prior_transformer import load
from fastprior.cli.command_line import main
from fastprior.models.prior_transformer.model import PriorTransformer
from helpers.priors import make_prior, relative_error

TOLERANCE = 1e-5  # of scale, what an fp32 forward may differ by
WIDTH, DIM, LENGTH, LAYERS = 128, 24, 7, 2


def original_state(seed=0, dtype=torch.float32):
    """Random weights under the original names."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "time_embed.0": (WIDTH, WIDTH), "time_embed.2": (WIDTH, WIDTH), "text_enc_proj": (WIDTH, DIM),
        "text_emb_proj": (WIDTH, DIM), "clip_img_proj": (WIDTH, DIM), "out_proj": (DIM, WIDTH), "final_ln": (WIDTH,),
    }  # fmt: skip
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}"
        shapes |= {
            f"{block}.attn.c_qkv": (3 * WIDTH, WIDTH), f"{block}.attn.c_proj": (WIDTH, WIDTH),
            f"{block}.ln_1": (WIDTH,), f"{block}.ln_2": (WIDTH,), f"{block}.mlp.c_fc": (4 * WIDTH, WIDTH),
            f"{block}.mlp.c_proj": (WIDTH, 4 * WIDTH),
        }  # fmt: skip
    state = {
        "model.positional_embedding": torch.randn(1, LENGTH + 4, WIDTH, generator=draw),
        "model.prd_emb": torch.randn(1, 1, WIDTH, generator=draw),
    }
    for name, shape in shapes.items():
        state[f"model.{name}.weight"] = torch.randn(shape, generator=draw) * (2 / shape[-1]) ** 0.5
        state[f"model.{name}.bias"] = torch.randn(shape[0], generator=draw) / 4
    return {key: value.to(dtype) for key, value in state.items()}


def original_forward(state, heads, x, t, text, encodings, mask):
    """The original architecture: fused projections with queries, keys and values of a head side by side."""

    def linear(name, value):
        return F.linear(value, state[f"model.{name}.weight"], state[f"model.{name}.bias"])

    def norm(name, value):
        return F.layer_norm(value, (WIDTH,), state[f"model.{name}.weight"], state[f"model.{name}.bias"])

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    time = linear("time_embed.2", F.silu(linear("time_embed.0", torch.cat((angles.cos(), angles.sin()), dim=-1))))
    tokens = linear("text_emb_proj", text), time, linear("clip_img_proj", x)
    prd = state["model.prd_emb"].expand(len(x), -1, -1)
    h = torch.cat((linear("text_enc_proj", encodings), torch.stack(tokens, dim=1), prd), dim=1)
    h = h + state["model.positional_embedding"]
    seen = F.pad(mask, (0, 4), value=True)[:, None, None] & torch.ones(LENGTH + 4, LENGTH + 4).tril().bool()
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}"
        qkv = linear(f"{block}.attn.c_qkv", norm(f"{block}.ln_1", h)).unflatten(-1, (heads, 3 * WIDTH // heads))
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
        weights = (q @ k.mT / (WIDTH // heads) ** 0.5).masked_fill(~seen, -math.inf).softmax(dim=-1)
        h = h + linear(f"{block}.attn.c_proj", (weights @ v).transpose(1, 2).flatten(-2))
        h = h + linear(f"{block}.mlp.c_proj", F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", h))))
    return linear("out_proj", norm("final_ln", h)[:, -1])


def inputs():
    draw = torch.Generator().manual_seed(9)
    x, text = torch.randn(2, 3, DIM, generator=draw)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 3, 1])[:, None]
    return x, torch.tensor([999, 40, 0]), text, torch.randn(3, LENGTH, DIM, generator=draw), mask


STATS = torch.randn(2, DIM, generator=torch.Generator().manual_seed(4))
LAYOUTS = {
    "karlo": (lambda state: {"state_dict": state, "epoch": 3}, STATS, torch.float32),
    "kandinsky": (lambda state: state, tuple(STATS), torch.float16),
    "constants": (
        lambda state: state | {"causal_mask": torch.zeros(1, 9, 9), "cf_token": torch.zeros(1, 7)},
        list(STATS),
        torch.float32,
    ),
}


@pytest.fixture
def files(tmp_path):
    """Write an original file and its statistics."""

    def write(layout="karlo", change=None):
        wrap, stats, dtype = LAYOUTS[layout]
        state = original_state(dtype=dtype)
        if change:
            change(state)
        torch.save(wrap(state), tmp_path / "prior.ckpt")
        torch.save(stats, tmp_path / "stats.th")
        return tmp_path / "prior.ckpt", tmp_path / "stats.th", {key: value.float() for key, value in state.items()}

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [2, 4])
def test_originals_compute_the_same(layout, heads, files, tmp_path, capsys):
    source, stats, state = files(layout)
    options = []
    if heads != 2:  # other than 64 wide
        (tmp_path / "heads.json").write_text(json.dumps(dict(num_attention_heads=4, attention_head_dim=32)))
        options = ["--config", str(tmp_path / "heads.json")]
    target = tmp_path / "kandinsky-2.1" / "prior"
    assert main(["convert", str(source), str(target), "--clip-stats", str(stats), *options]) == 0
    assert f"{heads} heads of {WIDTH // heads}\nwrote {target}" in capsys.readouterr().out
    assert sorted(file.name for file in target.parent.iterdir()) == ["prior"]

    x, t, text, encodings, mask = inputs()
    wanted = original_forward(state, heads, x, t, text, encodings, mask)
    classes = [PriorTransformer]
    try:
        classes.append(__import__("diffusers").PriorTransformer)
    except ImportError:
        pass
    for cls in classes:
        prior = cls.from_pretrained(target).float().eval()
        with torch.no_grad():
            got = prior(x, t, text, encodings, mask).predicted_image_embedding
        assert relative_error(got, wanted) < TOLERANCE
        assert prior.clip_mean[0].equal(STATS[0]) and prior.clip_std[0].equal(STATS[1])


def test_the_dtype_stays(files):
    source, stats, _ = files("kandinsky")
    prior, report = load(source, clip_stats=stats)
    assert prior.proj_in.weight.dtype == torch.float16
    assert report.kind == "original prior" and report.architecture == "inferred"


def test_files_and_folders_of_diffusers(files, tmp_path):
    source, stats, _ = files()
    convert(source, tmp_path / "first", clip_stats=stats)
    prior = PriorTransformer.from_pretrained(tmp_path / "first")
    torch.save(prior.state_dict(), tmp_path / "first" / "diffusion_pytorch_model.bin")
    report = convert(tmp_path / "first" / "diffusion_pytorch_model.bin", tmp_path / "second")
    assert report.era == "diffusers" and report.architecture == "recorded"
    (tmp_path / "first" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "first").rename(tmp_path / "pipeline" / "prior")
    assert convert(tmp_path / "pipeline", tmp_path / "third").kind == "folder"
    for folder in ("second", "third"):
        again = PriorTransformer.from_pretrained(tmp_path / folder).state_dict()
        assert again.keys() == prior.state_dict().keys()
        assert all(again[key].equal(value) for key, value in prior.state_dict().items())
        assert (tmp_path / folder / "diffusion_pytorch_model.safetensors").is_file()
    torch.save(prior.state_dict(), tmp_path / "alone.bin")
    with pytest.raises(ValueError, match=r"config=None; .*alone.bin has no config.json beside it"):
        load(tmp_path / "alone.bin")


def test_existing_targets(files, tmp_path):
    source, stats, _ = files()
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", clip_stats=stats)
    with pytest.raises(FileExistsError, match="out exists; overwrite=True replaces it"):
        convert(source, tmp_path / "out", clip_stats=stats)
    torch.save(-STATS, stats)
    convert(source, tmp_path / "out", clip_stats=stats, overwrite=True)
    assert PriorTransformer.from_pretrained(tmp_path / "out").clip_mean[0].equal(-STATS[0])
    with pytest.raises(FileExistsError, match="stats.th is a file; it must be a folder"):
        convert(source, stats, clip_stats=stats, overwrite=True)


def drop(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.update({key: value})


QKV = "model.transformer.resblocks.1.attn.c_qkv.weight"


@pytest.mark.parametrize(
    "change, options, message",
    [
        (drop("model.final_ln.bias"), {}, "the weights do not fit the config; missing: norm_out.bias$"),
        (drop(QKV), {}, r"; missing: transformer_blocks.1.attn1.to_k.weight, \S+to_q.weight, \S+to_v.weight$"),
        (
            put("model.padding_embedding", torch.zeros(11, WIDTH)),
            {},
            "; unexpected: padding_embedding$",
        ),
        (drop("model.clip_img_proj.weight"), {}, "is no whole prior: 'model.clip_img_proj.weight' is missing"),
        (put(QKV, torch.full((3 * WIDTH, WIDTH), math.nan)), {}, "attn1.to_q.weight must hold finite floating point"),
        (
            put("model.text_enc_proj.weight", torch.zeros(WIDTH, 9)),
            {},
            r"of another shape: encoder_hidden_states_proj.weight \(128, 9\), which must be \(128, 24\)",
        ),
        (None, dict(clip_stats=None), "clip_stats=None; .*prior.ckpt has no clip_mean and clip_std"),
        (None, dict(config=dict(num_attention_heads=3)), "num_attention_heads=3; with heads of 64 they must make up"),
        (None, dict(config=dict(heads=3)), "the config has the unknown key 'heads'"),
        (None, dict(weights="ema"), "weights='ema'; .* has model weights only"),
        (None, dict(version="1.0.0"), "version='1.0.0'; it is for priors of dalle2-pytorch"),
    ],
)
def test_files_and_options_that_are_refused(change, options, message, files, tmp_path):
    source, stats, _ = files(change=change)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", **dict(clip_stats=stats) | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stats", [torch.zeros(3, DIM), [STATS[0]], {"mean": 1}, torch.full((2, DIM), math.inf)])
def test_statistics_that_are_refused(stats, files):
    source, path, _ = files()
    torch.save(stats, path)
    with pytest.raises(ValueError, match=r"clip_stats='.*stats.th'; it must hold the mean and the deviation"):
        load(source, clip_stats=path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Run:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for name in ("prior.ckpt", "stats.th"):
        torch.save({"state_dict": original_state(), "more": Run()}, tmp_path / name, pickle_module=pickle)
    with pytest.raises(ValueError, match=r"prior.ckpt is refused, and nothing in it was run: .*exec"):
        load(tmp_path / "prior.ckpt")
    torch.save(original_state(), tmp_path / "prior.ckpt")
    with pytest.raises(ValueError, match=r"stats.th is refused, and nothing in it was run"):
        load(tmp_path / "prior.ckpt", clip_stats=tmp_path / "stats.th")
    assert not (tmp_path / "ran").exists()


def test_each_kind_of_prior_has_its_targets(files, tmp_path):
    source, stats, _ = files()
    with pytest.raises(ValueError, match="holds no diffusion prior .but a PriorTransformer .* to a folder"):
        fastprior.convert(source, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"clip_stats='.*'; it goes with the folder of a PriorTransformer"):
        fastprior.convert(source, tmp_path / "out.pt", clip_stats=stats)
    fastprior.save(make_prior(), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"holds no PriorTransformer .* must end in \.safetensors, \.pt or \.pth"):
        fastprior.convert(tmp_path / "own.safetensors", tmp_path / "out")
