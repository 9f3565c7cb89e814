"""docs/serving.md and what lies beside it: what they say holds, as it is written."""

import re
import shutil
import subprocess

import pytest
import safetensors.torch

from fastprior.cli.command_line import make_parser
from helpers import ROOT
from helpers.priors import WordClip, make_prior, make_text
from helpers.servers import serving

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
IN_A_PROGRAM, OVER_HTTP = (block for kind, block in BLOCKS if kind == "python")
CURLS = [block for _, block in BLOCKS if block.startswith("curl")]
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served():
    with serving(prior=make_prior(clip=WordClip()), settings=dict(name="prior")) as found:
        yield found


def test_the_engine_in_a_program(capsys):
    space: dict = {}
    exec(IN_A_PROGRAM, space)
    assert len(space["embeds"]) == 3 and space["embeds"][0].shape == (64,)
    assert re.fullmatch(r"\d+ steps of rows in \d+ steps\n", capsys.readouterr().out)


def test_the_client_of_openai(served, capsys):
    client, _ = served
    exec(OVER_HTTP.replace(HERE, str(client.base_url)), {})
    assert capsys.readouterr().out == "32\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page has commands of curl")
def test_the_commands_of_curl(served, tmp_path):
    client, _ = served
    text = {name: t[0].contiguous() for name, t in make_text(1, 32).items()}
    safetensors.torch.save_file(text, tmp_path / "text.safetensors")
    assert len(CURLS) == 2
    for command in CURLS:
        done = subprocess.run(
            ["bash", "-c", command.replace(HERE, str(client.base_url))], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "error" not in done.stdout, done.stdout + done.stderr
    assert done.stdout == ""
    assert safetensors.torch.load_file(tmp_path / "embeds.safetensors")["image_embeds"].shape == (4, 32)


def test_figures_and_status_codes_are_those_that_there_are(served):
    client, _ = served
    figures = client.get("/metrics").text
    for name in set(re.findall(r"`(fastprior_\w+)", PAGE)):
        assert f"# TYPE {name.removesuffix('_total')}" in figures or f"# TYPE {name}" in figures, name
    table = {int(code) for code in re.findall(r"^\| (\d{3}) \|", PAGE, flags=re.MULTILINE)}
    for operation in client.get("/openapi.json").json()["paths"].values():
        for method in operation.values():
            assert set(map(int, method["responses"])) <= table | {422}


def test_options_of_the_files_beside_it_are_those_that_there_are():
    dockerfile = (ROOT / "docs" / "serving" / "Dockerfile").read_text()
    compose = (ROOT / "docs" / "serving" / "compose.yaml").read_text()
    command = re.search(r"^ENTRYPOINT (\[.*\])$", dockerfile, re.MULTILINE)[1]
    for more in re.search(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)[1], re.search(r"command: (\[.*\])", compose)[1]:
        program, *arguments = eval(command) + eval(more)
        assert program == "fastprior" and make_parser().parse_args(arguments).command == "serve"
    for name in re.search(r"^COPY (.*) \./$", dockerfile, re.MULTILINE)[1].split():
        assert list(ROOT.glob(name)), name
