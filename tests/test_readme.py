"""Every snippet of the README runs, in order; files and CLIP weights it names are stood in for by small ones."""

import ast
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastprior
from fastprior.cli import command_line as cli
from fastprior.train_configs import (
    DiffusionPriorNetworkConfig,
    PriorTransformerConfig,
    TrainDiffusionPriorConfig,
    TrainSplitConfig,
)
from helpers import ROOT
from helpers.priors import WordClip, make_prior

diffusers = pytest.importorskip("diffusers")
from helpers.pipeline_cases import make_parts  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:1 texts have more than 9 tokens")  # the tokenizer here is one of letters
def test_snippets(
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    diffusers.KandinskyV22PriorPipeline(**make_parts(tmp_path / "tokenizer")).save_pretrained("kandinsky-2-2-prior")
    pipe = diffusers.KandinskyV22PriorPipeline.from_pretrained("kandinsky-2-2-prior")
    net = dict(dim=32, depth=1, dim_head=16, heads=2, max_text_len=7, num_timesteps=100)
    given = make_prior(net, timesteps=100)
    torch.save({"model": given.state_dict(), "step": torch.tensor([3])}, "latest.pth")
    config = {"net": net, "image_embed_dim": 32, "timesteps": 100, "cond_drop_prob": 0.1}
    Path("prior_config.json").write_text(json.dumps({"prior": config}))
    monkeypatch.setattr(fastprior, "OpenAIClipAdapter", lambda name: WordClip())
    assert len(SNIPPETS) == 8
    space = {"pipe": pipe}
    for snippet in SNIPPETS:
        exec(snippet, space)
    printed = capsys.readouterr().out
    assert printed.count("(4, 64)") == 0 and printed.count("torch.Size([4, 64])") == 2
    assert "cached path, ddim, 15 evaluations, guidance: null table" in printed
    assert space["image_embed"].shape == (1, 32) and space["image_embed"].norm() > 0.01
    assert Path("prior.safetensors").exists()
    assert isinstance(pipe.prior, fastprior.PriorTransformer) and len(space["image_embeds"]) == 4
    assert space["mixed"].image_embeds.abs().max() > 0.01
    assert isinstance(space["loss"], float) and fastprior.load("trainer.pth").image_embed_dim == 64
    again = fastprior.load("prior.safetensors")
    assert torch.equal(again.net.learned_query, given.net.learned_query)


def test_speed_table_is_made_of_the_records():
    done = subprocess.run([sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def texts_with_paths() -> dict[str, str]:
    """The pages, and the docstrings of each module, by path."""
    found = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "configs/README.md")}
    for file in (path for folder in ("fastprior", "kernels") for path in (ROOT / folder).rglob("*.py")):
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        nodes = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds))
        found[str(file.relative_to(ROOT))] = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    return found


def wrong_paths(text: str) -> list[str]:
    """What a text names under `fastprior.`, or in a folder of the repository, and is not there."""
    wrong = []
    for name in set(re.findall(r"\bfastprior(?:\.\w+)+", text)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            wrong.append(name)
    files = re.findall(r"(?<![\w./~-])(?:fastprior|kernels|benchmarks|configs|tests|docs)/[\w./-]*\w", text)
    return sorted(wrong) + sorted(name for name in set(files) if not (ROOT / name).exists())


def test_every_path_that_is_named_is_there(peer):
    found = {page: wrong_paths(text) for page, text in texts_with_paths().items()}
    assert not {page: wrong for page, wrong in found.items() if wrong}
    text = (
        "`fastprior.solvers`, fastprior.demos.synthetic.NoPairs and kernels/cpu.py; not fastprior.load or kernels/cpu/"
    )
    assert wrong_paths(text) == ["fastprior.demos.synthetic.NoPairs", "fastprior.solvers", "kernels/cpu.py"]


def test_commands_of_the_training_section_are_understood():
    lines = [
        line.split("#")[0] for line in README.splitlines() if line.startswith(("fastprior ", "accelerate launch "))
    ]
    commands = [
        line.replace("accelerate launch -m fastprior.train_diffusion_prior", "fastprior train") for line in lines
    ]
    parsed = [cli.make_parser().parse_args(shlex.split(command)[1:]) for command in commands]
    assert [arguments.command for arguments in parsed] == ["inspect", "train", "evaluate"]
    config = TrainDiffusionPriorConfig.from_json_path(ROOT / parsed[1].config_file)
    assert parsed[2].checkpoint == config.tracker.save[0].save_best_to


def test_every_option_of_the_configs_is_explained():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    sections = TrainDiffusionPriorConfig.model_fields
    for section, kind in (*sections.items(), ("prior", DiffusionPriorNetworkConfig), ("data", TrainSplitConfig)):
        part = text.split(f"## `{section}`")[1].split("\n## ")[0]
        fields = getattr(kind, "annotation", kind).model_fields
        missing = [name for name in fields if f"{name}`" not in part]
        assert not missing, f"configs/README.md does not explain {missing} of {section}"
    part = text.split("## A `PriorTransformer`")[1].split("\n## ")[0]
    assert not [name for name in PriorTransformerConfig.model_fields if name not in part]
