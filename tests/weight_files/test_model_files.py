"""Models in several files and in folders, as accelerate and transformers write them."""

import json
import re

import pytest
import safetensors.torch
import torch

import fastprior
from fastprior.checkpoints import prior_transformer
from fastprior.checkpoints.conversion import convert
from fastprior.checkpoints.dalle2 import load
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.weight_files.model_files import read_model
from helpers.checkpoint_cases import assert_same_samples, make_prior

accelerate = pytest.importorskip("accelerate")


def shards(folder, state, safe=True, count=3):
    """Write a state dict in several files; the path of their index."""
    suffix, name = ("safetensors", "model") if safe else ("bin", "pytorch_model")
    weight_map = {}
    for number in range(count):
        part = {key: value.clone() for key, value in list(state.items())[number::count]}
        file = f"{name}-{number + 1:05}-of-{count:05}.{suffix}"
        (safetensors.torch.save_file if safe else torch.save)(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("size", ["10GB", "8KB"], ids=["whole", "sharded"])
def test_accelerate_save_model(tmp_path, safe, size):
    origin = make_prior()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(origin), tmp_path, max_shard_size=size, safe_serialization=safe)
    files = sorted(tmp_path.iterdir())
    assert (len(files) > 2) == (size == "8KB")
    prior = load(tmp_path)
    assert prior.load_report.missing == [] and prior.load_report.guesses == []
    assert "of the folder was read" in str(prior.load_report)
    assert_same_samples(prior, origin)
    for file in files[-2:]:  # the file; or a part, beside which the index lies, and the index
        assert_same_samples(load(file), origin)


def test_accelerate_save_state(tmp_path):
    origin, other = make_prior(), make_prior(3)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(origin, other, torch.optim.SGD(origin.net.parameters(), lr=0.1))
    accelerator.save_state(tmp_path)
    prior = load(tmp_path)
    assert "model.safetensors of the folder was read, and not model_1.safetensors" in str(prior.load_report)
    assert_same_samples(prior, origin)
    assert_same_samples(load(tmp_path / "model_1.safetensors"), other)
    convert(tmp_path, tmp_path / "own.safetensors")
    assert_same_samples(load(tmp_path / "own.safetensors"), origin)


def test_tensors_that_save_model_dropped_are_there_again(tmp_path):
    net = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    net[1].weight = net[0].weight
    note = {"note": "0.weight", "1.more": "0.weight"}  # what is no name of a tensor adds none
    safetensors.torch.save_model(net, tmp_path / "net.safetensors", metadata=note)
    state = read_model(tmp_path / "net.safetensors")[0]
    assert state.keys() == net.state_dict().keys() and torch.equal(state["1.weight"], net[0].weight)


def edit(index, **names):
    """Change entries of an index."""
    content = json.loads(index.read_text())
    content["weight_map"] |= names
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/tmp/x.bin", "a/../../x.bin", "..\\x.bin", "c:\\x.bin", ".", ".."]
)
def test_files_elsewhere_are_not_read(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    state = make_prior().state_dict()
    safetensors.torch.save_file({"net.learned_query": torch.ones(32)}, tmp_path / "outside.safetensors")
    edit(shards(folder, state), **{"net.learned_query": name})
    with pytest.raises(ValueError, match=re.escape(f"names the file {name!r}; it must lie in the folder of the index")):
        load(folder)


def test_indices_that_do_not_fit(tmp_path):
    index = shards(tmp_path, make_prior().state_dict())
    good = index.read_text()
    edit(index, more="model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match="says that more is in model-00002-of-00003.safetensors; it is not"):
        load(index)
    no_map = "has no weight_map"
    whys = {"[1]": "holds a JSON list", "{": "is not JSON", "[" * 10**5: "is not JSON", '{"weight_map": [1]}': no_map}
    for content, why in {**whys, '{"weight_map": {"a": 1}}': no_map, "{}": no_map}.items():
        index.write_text(content)
        with pytest.raises(ValueError, match=f"index.json {why}"):
            load(tmp_path)
    index.write_text(good)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names model-00002-of-00003.safetensors; 1 of its 3 files are missing"):
        load(index)


def test_a_part_without_its_index_is_named(tmp_path):
    index = shards(tmp_path, make_prior().state_dict())
    for name in ("model-00004-of-00003.safetensors", "other.safetensors.index.json"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            load(tmp_path / name)
    index.unlink()
    part = tmp_path / "model-00002-of-00003.safetensors"
    with pytest.raises(
        ValueError, match="is part 2 of the 3 of a model; its index, model.safetensors.index.json, must"
    ):
        load(part, strict=False)
    origin = make_prior()
    torch.save(origin.state_dict(), tmp_path / "pytorch_model-00001-of-00001.bin")
    assert_same_samples(load(tmp_path / "pytorch_model-00001-of-00001.bin"), origin)


@pytest.mark.parametrize(
    "names, match",
    [
        ([], "is a directory; it must be a checkpoint file, or hold one of model.safetensors, .*Found: nothing"),
        (["best.pth", "latest.pth"], "Found: best.pth, latest.pth$"),
        (["zero_to_fp32.py", *"abcdef"], r"It is DeepSpeed's, .* Found: a, b, c, d, e and 2 more$"),
        (["pytorch_model_fsdp_0/.metadata"], "It is FSDP's, .*accelerate merge-weights"),
        (["diffusion_pytorch_model.safetensors"], "It is a diffusers model's, which PriorTransformer.from_pretrained"),
    ],
)
def test_folders_without_a_model_are_named(tmp_path, names, match):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sharded"])
def test_folders_of_a_prior_transformer(tmp_path, whole):
    config = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=5)
    origin = PriorTransformer(**config)
    torch.nn.init.normal_(origin.clip_mean)
    state = origin.state_dict() | {"causal_attention_mask": torch.zeros(1, 9, 9)}  # which releases make themselves
    if whole:
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    else:
        shards(tmp_path, state, safe=False)
    prior, report = prior_transformer.load(tmp_path, config=config)
    assert report.kind == "state dict" and "of the folder was read" in str(report)
    assert all(torch.equal(value, origin.state_dict()[key]) for key, value in prior.state_dict().items())
    with pytest.raises(ValueError, match="config=None; .* has no config.json beside it"):
        fastprior.convert(tmp_path, tmp_path / "out")
