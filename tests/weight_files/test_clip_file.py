"""Local files of CLIPs are read without running anything, and fill a model as OpenCLIP fills it."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastprior import OpenClipAdapter

open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
CONFIGS = {
    "file": dict(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT),
    "file-larger": dict(embed_dim=32, vision_cfg=VISION | {"image_size": 64}, text_cfg=TEXT | {"context_length": 16}),
    "file-custom": dict(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT, custom_text=True),
    "file-siglip": dict(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT, custom_text=True, init_logit_bias=-10),
}


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The weights of a model of the first configuration."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return {name: tensor.clone() for name, tensor in open_clip.create_model("file").state_dict().items()}


def saved(path, state):
    torch.save(state, path)


WRITERS = {
    "state dict": saved,
    "old format": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "training": lambda path, state: torch.save({"epoch": 3, "name": "a", "state_dict": wrapped(state)}, path),
    "parallel": lambda path, state: torch.save(wrapped(state), path),
    "half": lambda path, state: torch.save({name: tensor.half() for name, tensor in state.items()}, path),
    "safetensors": lambda path, state: save_file(state, path, metadata={"format": "pt"}),
}


def wrapped(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("writer", WRITERS)
def test_files_fill_a_model_as_open_clip_does(tmp_path, monkeypatch, state, writer, model):
    path = tmp_path / ("clip.safetensors" if writer == "safetensors" else "clip.pt")
    WRITERS[writer](path, state)
    if (writer, model) == ("half", "file-larger"):
        pytest.skip("torch resizes no positions of 16 bits on the CPU")
    wanted = open_clip.create_model(model, pretrained=str(path)).state_dict()
    monkeypatch.setattr(open_clip.factory, "load_state_dict", None)  # OpenCLIP's own reader
    found = OpenClipAdapter(model, path).clip.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class Module(nn.Module):
    """Tensors by dotted names, as a module that can be scripted."""

    def __init__(self, state):
        super().__init__()
        for name in sorted({name.partition(".")[0] for name in state if "." in name}):
            inner = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            self.add_module(name, Module(inner))
        for name, value in state.items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return x


class OpenAIs(Module):
    def __init__(self, state):
        super().__init__(state)
        for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 64)):
            self.register_buffer(name, torch.tensor(value))


@pytest.mark.parametrize("model", ["file", "file-larger", "file-custom"])
def test_archives_of_torchscript_fill_a_model(tmp_path, monkeypatch, state, model):
    torch.save(state, tmp_path / "state.pt")
    torch.jit.script(OpenAIs(state)).save(str(tmp_path / "archive.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    wanted = OpenClipAdapter(model, tmp_path / "state.pt").clip.state_dict()
    found = OpenClipAdapter(model, tmp_path / "archive.pt").clip.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class Writes:
    """Pickled as a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


WEIGHT = "visual.proj"
BAD = {  # what stands in the place of a weight
    "nan": (lambda t: t.fill_(float("nan")), " holds NaN or infinity in visual.proj"),
    "inf": (lambda t: t.half().fill_(float("-inf")), " holds NaN or infinity in visual.proj"),
    "int8": (lambda t: t.to(torch.int8), r"visual.proj has dtype torch.int8; for file it must be like torch.float32"),
    "complex": (lambda t: t.to(torch.complex64), "visual.proj has dtype torch.complex64; it must be floating"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn; it must be floating point of 16 bits"),
    "sparse": (lambda t: t.to_sparse(), "visual.proj is a sparse tensor; it must be a dense tensor"),
    "meta": (lambda t: t.to("meta"), "visual.proj is a tensor without numbers.*; it must be a dense tensor"),
    "number": (lambda t: 1.0, "visual.proj is a float; it must be a tensor"),
    "another shape": (lambda t: t[1:], "does not fit file: .*size mismatch for visual.proj"),
    "nothing": (lambda t: None, "visual.proj is a NoneType; it must be a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_one_error(tmp_path, state, name):
    make, why = BAD[name]
    torch.save(state | {WEIGHT: make(state[WEIGHT].clone())}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=f"^{tmp_path}/clip.pt.*{why}") as caught:
        OpenClipAdapter("file", tmp_path / "clip.pt")
    assert len(str(caught.value)) < 800


PAYLOADS = {
    "a list": ([1], "holds a list; it must"),
    "nothing": ({}, "holds no state dict of a CLIP"),
    "a list for a state": ({"state_dict": [1]}, "holds no state dict of a CLIP"),
    "numbers for names": ({1: torch.ones(2)}, "holds no state dict of a CLIP"),
    "another model": ({"a": torch.ones(2)}, "does not fit file: "),
    "too little": ({"logit_scale": torch.ones(())}, "does not fit file: .*[Mm]issing key"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_is_no_clip_is_one_error(tmp_path, state, name):
    payload, why = PAYLOADS[name]
    torch.save(payload, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=f"^{tmp_path}/clip.pt.*{why}") as caught:
        OpenClipAdapter("file", tmp_path / "clip.pt")
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_pickle_that_makes_a_folder_makes_none(tmp_path, state, suffix):
    torch.save({"state_dict": state, "args": Writes(tmp_path / "made")}, tmp_path / f"clip{suffix}")
    with pytest.raises(ValueError, match="refused, and nothing in it was run: it refers to posix.mkdir"):
        OpenClipAdapter("file", tmp_path / f"clip{suffix}")
    assert not (tmp_path / "made").exists()


def test_an_archive_of_arrays_unpickles_nothing(tmp_path, state):
    path = tmp_path / "clip.npz"
    np.savez(path, b=np.array([Writes(tmp_path / "made")], dtype=object))
    with pytest.raises(ValueError, match=f"^{path} does not fit file: "):
        OpenClipAdapter("file", path)
    os.mkfifo(tmp_path / "fifo.npz")
    with pytest.raises(ValueError, match=f"^{tmp_path}/fifo.npz is a FIFO; it must be a regular file"):
        OpenClipAdapter("file", tmp_path / "fifo.npz")
    assert not (tmp_path / "made").exists()


def test_tags_and_names_of_the_hub_are_open_clips(monkeypatch):
    asked = []

    def create(*args, **kwargs):
        asked.append((args, kwargs["pretrained"]))
        raise InterruptedError

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for name, tag in (("ViT-B/32", "openai"), ("ViT-B-32", "laion2b_s34b_b79k"), ("hf-hub:owner/model", None)):
        with pytest.raises(InterruptedError):
            OpenClipAdapter(name, tag)
        assert asked.pop() == ((name if ":" in name else "ViT-B-32",), tag)
