"""Every snippet of the README runs, in order; files and CLIP weights it names are stood in for by small ones."""

import ast
import json
import os
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
    assert len(SNIPPETS) == 9
    space = {"pipe": pipe}
    for snippet in SNIPPETS:
        exec(snippet, space)
    printed = capsys.readouterr().out
    assert printed.count("(4, 64)") == 0 and printed.count("torch.Size([4, 64])") == 2
    assert "cached path, ddim, 15 evaluations, guidance: null table" in printed
    assert "path, sde-dpm++ at logsnr times, 8 evaluations, guidance: none" in printed
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


def training_commands() -> list[list[str]]:
    """The lines of the training section, as a shell reads them."""
    block = README.split("<!-- training commands -->\n```bash\n")[1].split("```")[0]
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


def test_commands_of_the_training_section_are_understood():
    parsed = [cli.make_parser().parse_args(argv) for program, *argv in training_commands() if program == "fastprior"]
    assert [arguments.command for arguments in parsed] == ["inspect", "init", "train", "evaluate"]


@pytest.mark.slow
def test_commands_of_the_training_section_run(tmp_path):
    """As they stand, one after another, on the folders that the quickstart leaves; the training is cut to an epoch."""
    pytest.importorskip("sklearn")
    from fastprior.demos import digits

    digits.write_digits(tmp_path / "quickstart-out" / "data", 0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = {}
    for _, command, *argv in training_commands():
        line = [sys.executable, "-m", "fastprior.cli", command, *argv]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        printed[command] = done.stdout
        if command == "init":
            path = tmp_path / "runs" / "digits" / "config.json"
            config = json.loads(path.read_text())
            assert config["train"]["epochs"] > 1
            path.write_text(json.dumps(config | {"train": config["train"] | {"epochs": 1}}))
    assert "pairs             1,797" in printed["inspect"] and "problems          none" in printed["inspect"]
    assert "359 pairs, ema weights of runs/digits/best.pth" in printed["evaluate"]
    said = shlex.split(printed["train"].splitlines()[-1])
    (skipped,) = [argv[-1] for _, command, *argv in training_commands() if command == "evaluate"]
    assert said[said.index("--skip-pairs") + 1] == skipped


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
