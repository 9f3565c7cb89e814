"""The command line: what it prints, writes and returns."""

import functools
import json
import os
import resource
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import fastprior
from fastprior import DiffusionPrior, DiffusionPriorNetwork
from fastprior.cli import bench_runs, common, info
from fastprior.cli import command_line as cli
from fastprior.demos import digits
from fastprior.kernels import ops
from fastprior.prior import plan
from helpers import ROOT, priors, pt_cases
from helpers.command_line import error_of, run


def make_prior(dim=64, length=8, **options):
    torch.manual_seed(0)
    net = DiffusionPriorNetwork(dim=dim, depth=1, dim_head=16, heads=2, max_text_len=length)
    return DiffusionPrior(net, image_embed_dim=dim, timesteps=20, cond_drop_prob=0.1, **options).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A digits checkpoint, one of another encoder, and text embeddings."""
    folder = tmp_path_factory.mktemp("cli")
    fastprior.save(make_prior(image_channels=1), folder / "digits.safetensors", metadata=dict(text_encoder="digits"))
    fastprior.save(make_prior(dim=32, length=6), folder / "other.safetensors")
    fastprior.save(make_prior(dim=32, length=6, condition_on_text_encodings=False), folder / "embed-only.safetensors")
    np.save(folder / "embed.npy", F.normalize(torch.randn(3, 32), dim=-1).numpy())
    np.save(folder / "encodings.npy", torch.randn(3, 6, 32).numpy())
    np.save(folder / "ints.npy", np.zeros((3, 32), dtype=np.int64))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(folder / "archive.npz", a=np.zeros(3))
    (folder / "junk").write_bytes(b"junk")
    (folder / "junk.safetensors").write_bytes(b"junk")
    return folder


# help and info


def test_help_version_and_usage(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(name in out for name in ("info", "quickstart", "sample", "convert"))
    assert run(capsys, "--version") == (0, f"fastprior {fastprior.__version__}\n", "")
    for argv in ((), ("nonsense",), ("sample", "a three")):
        status, _, err = run(capsys, *argv)
        assert status == 2 and "usage: fastprior" in err


def test_help_imports_nothing_that_takes_long():
    code = """if True:
        import contextlib, sys
        from fastprior.cli.command_line import COMMANDS, main
        names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
        for argv in (["--help"], ["--version"], *([name, "--help"] for name in names)):
            with contextlib.suppress(SystemExit):
                main(argv)
        print(len(names), sorted({"torch", "numpy", "tqdm"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{len(cli.COMMANDS)} []", done.stderr


def test_the_program_that_printed_commands_name(tmp_path, monkeypatch):
    """What a shell finds, where it is this environment's; else where it lies; else the interpreter."""
    environment, elsewhere = tmp_path / "my env" / "bin", tmp_path / "elsewhere"
    for folder in (environment, elsewhere):
        folder.mkdir(parents=True)
        (folder / "fastprior").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PATH", str(environment))
    assert common.this_program() == "fastprior"
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.chdir(elsewhere)
    assert shlex.split(common.this_program()) == [str(environment / "fastprior")]
    monkeypatch.chdir(tmp_path)
    assert shlex.split(common.this_program()) == ["my env/bin/fastprior"]
    (environment / "fastprior").unlink()
    assert shlex.split(common.this_program()) == [str(environment / "python"), "-m", "fastprior.cli"]


def test_info_reports_what_is_there(capsys, monkeypatch):
    status, out, _ = run(capsys, "info")
    assert status == 0
    rows = {line[2:20].strip(): line[20:] for line in out.splitlines() if line.startswith("  ")}
    assert rows["fastprior"] == fastprior.__version__ and rows["torch"] == torch.__version__.partition("+")[0]
    assert rows["prefix cache"].startswith("on") and rows["null table"].startswith("on")
    assert f"torch uses {torch.get_num_threads()} threads" in rows["cpu"]
    if not torch.cuda.is_available():
        assert rows["cuda"] == "none available"
        assert rows["Triton kernels"].startswith("off") and rows["CUDA graphs"] == "off, no CUDA device"

    with ops.using("reference"):
        assert "FASTPRIOR_KERNELS=reference" in run(capsys, "info")[1]
    with ops.using("triton"):
        assert "Triton kernels    on" in run(capsys, "info")[1]
    monkeypatch.setattr(info, "OPTIONAL", ("a-package-that-is-not-there",))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(plan, "network_obstacles", lambda net: ["it is Tuesday"])
    out = run(capsys, "info")[1]
    assert any(line.split() == ["a-package-that-is-not-there", "not", "installed"] for line in out.splitlines())
    assert "not on the CPU, no C++ compiler no-such-compiler" in out
    assert "off, for fastprior's own networks (it is Tuesday)" in out


# sample


def test_sample_draws_and_writes_digits(capsys, tmp_path, files):
    out_file = tmp_path / "out.npy"
    captions = ["a handwritten three", "the digit 8, written by hand"]
    status, out, err = run(
        capsys, "sample", "--checkpoint", files / "digits.safetensors", *captions, "--out", out_file, "--seed", 5,
        "--steps", 4, "--samples-per-prompt", 3, "--cond-scale", 1.5, "--solver", "dpm++", "--spacing", "logsnr",
        "--device", "cpu",
    )  # fmt: skip
    assert (status, err) == (0, "")
    embeds = np.load(out_file)
    assert embeds.shape == (2, 64) and embeds.dtype == np.float32
    prior = fastprior.load(files / "digits.safetensors")
    prior.clip = digits.DigitsClip()
    expected = prior.sample(
        captions,
        3,
        1.5,
        4,
        solver="dpm++",
        spacing="logsnr",
        generator=torch.Generator().manual_seed(5),
        progress=False,
    )
    np.testing.assert_allclose(embeds, expected.numpy(), rtol=0, atol=1e-6)
    for caption, embed in zip(captions, expected):
        assert f"{caption}\n\n{digits.terminal_picture(embed[None])}\n" in out
    assert f"wrote {out_file}: 2 embeddings of 64" in out
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_sample_follows_the_seed(capsys, tmp_path, files):
    def sampled(*options):
        argv = "sample", "--checkpoint", files / "digits.safetensors", "seven", "--out", tmp_path / "o.npy"
        assert run(capsys, *argv, "--steps", 3, *options)[0] == 0
        return np.load(tmp_path / "o.npy")

    assert (sampled("--seed", 1) == sampled("--seed", 1)).all()
    assert abs(sampled("--seed", 1) - sampled("--seed", 2)).max() > 1e-3
    assert abs(sampled() - sampled()).max() > 1e-3


def test_sample_names_unknown_words(capsys, files):
    argv = "sample", "--checkpoint", files / "digits.safetensors", "a purple 3", "one zebra", "--steps", 2
    assert run(capsys, *argv)[2] == "fastprior: note: words that the training never saw: purple, zebra\n"


def test_long_captions_are_not_repeated(capsys, files):
    caption = "three " + "purple" * 20_000
    status, out, err = run(capsys, "sample", "--checkpoint", files / "digits.safetensors", caption, "--steps", 2)
    assert status == 0 and len(out.splitlines()[0]) == 100 and out.startswith("three purplepurple") and len(err) < 1100
    status, out, err = run(capsys, "inspect", files, caption)
    assert status == 2 and "unrecognized arguments" in err and len(out + err) < 1500


def test_sample_from_embeddings(capsys, tmp_path, files):
    common = "--text-embed", files / "embed.npy", "--out", tmp_path / "o.npy", "--steps", 4, "--seed", 0
    embed, encodings = (torch.from_numpy(np.load(files / f"{name}.npy")) for name in ("embed", "encodings"))
    for name, options, cond in (
        ("other", ("--text-encodings", files / "encodings.npy"), dict(text_embed=embed, text_encodings=encodings)),
        ("embed-only", (), dict(text_embed=embed)),
    ):
        file = files / f"{name}.safetensors"
        argv = "sample", "--checkpoint", file, *common, *options, "--device", "cpu"
        assert run(capsys, *argv)[0] == 0
        generator = torch.Generator().manual_seed(0)
        expected = fastprior.load(file).sample(None, 4, timesteps=4, generator=generator, progress=False, **cond)
        np.testing.assert_allclose(np.load(tmp_path / "o.npy"), expected.numpy(), rtol=0, atol=1e-6)


def test_sample_encodes_captions_with_the_given_clip(capsys, tmp_path, files, monkeypatch):
    made = []

    class Narrow(digits.DigitsClip):
        """The digits' CLIP, cut to 32 features and to colour images."""

        dim_latent = property(lambda self: 32)
        image_channels = property(lambda self: 3)

        def __init__(self, *args, **kwargs):
            made.append((args, kwargs))
            super().__init__()

        def embed_text(self, text):
            embed, encodings = super().embed_text(text)
            return F.normalize(embed[:, :32], dim=-1), encodings[..., :32]

    monkeypatch.setattr(fastprior, "OpenClipAdapter", Narrow)
    argv = "sample", "--checkpoint", files / "other.safetensors", "a six", "a two", "--out", tmp_path / "o.npy"
    clip = "--clip-model", "ViT-B-32", "--clip-pretrained", "weights.pt"
    assert run(capsys, *argv, *clip, "--steps", 3, "--seed", 0, "--device", "cpu")[0] == 0
    assert made == [(("ViT-B-32", "weights.pt"), dict(device="cpu"))]
    prior = fastprior.load(files / "other.safetensors", clip=Narrow())
    expected = prior.sample(
        ["a six", "a two"], 4, timesteps=3, generator=torch.Generator().manual_seed(0), progress=False
    )
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--checkpoint {0}/none.safetensors three", "none.safetensors does not exist"),
        ("--checkpoint {0}/junk.safetensors three", "junk.safetensors"),
        ("--checkpoint {0}/junk three", "junk"),
        ("--checkpoint {0} three", "directory"),
        ("--checkpoint {0}/digits.safetensors", "give either captions or --text-embed"),
        ("--checkpoint {0}/other.safetensors a --text-embed {0}/embed.npy", "give either captions or --text-embed"),
        ("--checkpoint {0}/other.safetensors a --text-encodings {0}/encodings.npy", "goes with --text-embed"),
        ("--checkpoint {0}/other.safetensors a", "give --out FILE.npy"),
        ("--checkpoint {0}/other.safetensors a --out {0}/o", "give --clip-model and --clip-pretrained, or embeddings"),
        ("--checkpoint {0}/other.safetensors a --out {0}/o --clip-model b", "--clip-pretrained go together"),
        ("--checkpoint {0}/other.safetensors --out {0}/o --text-embed {0}/embed.npy", "give --text-encodings too"),
        ("--checkpoint {0}/embed-only.safetensors --out {0}/o --text-embed {0}/no.npy", "does not exist"),
        ("--checkpoint {0}/embed-only.safetensors --out {0}/o --text-embed {0}/junk", "is not a .npy file of numbers"),
        ("--checkpoint {0}/embed-only.safetensors --out {0}/o --text-embed {0}/objects.npy", "is not a .npy file"),
        ("--checkpoint {0}/embed-only.safetensors --out {0}/o --text-embed {0}/archive.npz", "an .npz archive"),
        ("--checkpoint {0}/embed-only.safetensors --out {0}/o --text-embed {0}/ints.npy", "int64 (3, 32)"),
        ("--checkpoint {0}/embed-only.safetensors --out {0}/o --text-embed {0}/encodings.npy", "2-dimensional"),
        ("--checkpoint {0}/digits.safetensors --text-embed {0}/embed.npy --text-encodings {0}/encodings.npy", "shape"),
        ("--checkpoint {0}/digits.safetensors a --out {0}/no/o.npy", "its folder does not exist"),
        ("--checkpoint {0}/digits.safetensors a --out {0}", "is a folder"),
        ("--checkpoint {0}/digits.safetensors three --solver euler", "solver='euler'; it must be one of"),
        ("--checkpoint {0}/digits.safetensors three --solver dpm++ --spacing even", "spacing='even'; it must be one"),
        ("--checkpoint {0}/digits.safetensors three --spacing logsnr", "spacing='logsnr'; the ddim solver has times"),
        ("--checkpoint {0}/digits.safetensors three --steps 21", "timesteps=21; the schedule has 20"),
        ("--checkpoint {0}/digits.safetensors three --samples-per-prompt 0", "--samples-per-prompt 0: it must be at"),
        ("--checkpoint {0}/no.safetensors three --steps -1", "--steps -1: it must be at least 1"),
        ("--checkpoint {0}/digits.safetensors three --cond-scale nan", "--cond-scale nan: it must be finite"),
    ],
)  # fmt: skip
def test_sample_errors_are_one_line(capsys, files, argv, message):
    before = sorted(files.iterdir())
    argv = [part.format(files) for part in argv.split()]
    if "--steps" not in argv:
        argv += ["--steps", "2"]
    assert message in error_of(capsys, "sample", *argv).replace("fastprior: note: ", "")
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("seed", ["-1", "x", str(2**63)])
def test_bad_seeds_are_usage_errors(capsys, files, seed):
    status, _, err = run(capsys, "sample", "--checkpoint", files / "digits.safetensors", "one", f"--seed={seed}")
    assert status == 2 and "argument --seed" in err


@pytest.mark.slow
@pytest.mark.parametrize("name, weights", [("no-such-model", "junk"), ("ViT-B-32", "no-such-weights")])
def test_clip_that_cannot_be_loaded(capsys, files, name, weights):
    pytest.importorskip("open_clip")
    argv = "sample", "--checkpoint", files / "other.safetensors", "a", "--out", files / "o"
    err = error_of(capsys, *argv, "--clip-model", name, "--clip-pretrained", weights)
    assert f"CLIP {name} with weights {weights} cannot be loaded (" in err


def test_missing_open_clip_names_the_extra(capsys, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    argv = "sample", "--checkpoint", files / "other.safetensors", "a", "--out", files / "o"
    err = error_of(capsys, *argv, "--clip-model", "ViT-B-32", "--clip-pretrained", "x")
    assert 'pip install "fastprior[clip]"' in err


# convert


def test_convert_and_overwrite(capsys, tmp_path, files):
    target = tmp_path / "prior.pt"
    argv = "convert", files / "other.safetensors", target
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "other.safetensors: fastprior file" in out and f"wrote {target}" in out
    theirs, ours = torch.load(target, weights_only=True), fastprior.load(files / "other.safetensors").state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)

    assert f"{target} exists; --overwrite replaces it" in error_of(capsys, *argv)
    assert run(capsys, *argv, "--overwrite")[0] == 0

    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(prior=dict(image_embed_scale=3.0))))
    back = tmp_path / "back.safetensors"
    assert run(capsys, "convert", target, back, "--config", config)[0] == 0
    assert fastprior.load(back).image_embed_scale == 3.0
    config.write_text("{")
    assert "is not JSON" in error_of(capsys, "convert", target, back, "--config", config, "--overwrite")
    assert "model weights only" in error_of(capsys, "convert", target, tmp_path / "e.pt", "--weights", "ema")
    assert "none.pt does not exist" in error_of(capsys, "convert", tmp_path / "none.pt", back, "--overwrite")
    error = error_of(capsys, "convert", target, back, "--overwrite", "--config", "none.json")
    assert error == "fastprior: error: config='none.json' does not exist\n"
    error = error_of(capsys, "convert", target, tmp_path / "out.bin")
    assert "out.bin'; it must end in .safetensors, .pt or .pth, or be the name of a folder" in error


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x.safetensors", "x.pt", "folder"])
def test_convert_to_a_full_disk(tmp_path, files, target):
    """No file may be longer than a part of the checkpoint: one line, and nothing is left behind."""
    source = files / "other.safetensors"
    if target == "folder":
        source = tmp_path / "source"
        pt_cases.without_diffusers(pt_cases.make_stock()).save_pretrained(source)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    (tmp_path / "out").mkdir()
    argv = [sys.executable, "-m", "fastprior.cli", "convert", source, tmp_path / "out" / target]
    done = subprocess.run(argv, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "could not be written" in done.stderr, done.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


# quickstart


def summary_with(**changes):
    """What a run returns, as far as the command reads it."""
    summary = dict(
        goal=dict(metric="right digit, sampled", at_least=0.95, judged=True, reached=True),
        metrics={"right digit, sampled": 0.97},
        samplers=dict(agree=True),
        files=dict(checkpoint="a dir/prior.safetensors", data="a dir/data"),
    )
    for name, change in changes.items():
        summary[name].update(change)
    return summary


@pytest.mark.parametrize(
    "changes, status, message",
    [
        (dict(), 0, "goal reached: 97.0% of the sampled embeddings show the right digit, at least 95% were wanted"),
        (dict(goal=dict(judged=False, reached=False)), 0, "the goal of 95% is not judged"),
        (dict(goal=dict(reached=False)), 1, "failed: only 97.0%"),
        (dict(samplers=dict(agree=False)), 1, "failed: the cached and the uncached sampler differ by more than 0.0001"),
    ],
    ids=["reached", "short", "missed", "disagree"],
)
def test_quickstart_judges_its_goal(capsys, monkeypatch, changes, status, message):
    from fastprior.demos import quickstart

    given = []
    monkeypatch.setattr(
        quickstart, "run", lambda out, **options: given.append((out, options)) or summary_with(**changes)
    )
    monkeypatch.setattr(quickstart, "report", lambda summary: "the report")
    found, out, err = run(capsys, "quickstart", "--out", "a dir", "--seed", 3, "--no-progress")
    assert found == status and message in out + err and "the report" in out
    assert f"{common.this_program()} sample --checkpoint 'a dir/prior.safetensors' \"a handwritten three\"" in out
    defaults = dict(steps=quickstart.STEPS, batch=quickstart.BATCH)
    assert given == [("a dir", dict(**defaults, seed=3, progress=False))]


@pytest.mark.slow
def test_quickstart_then_the_command_that_it_prints(capsys, tmp_path, monkeypatch):
    """A shortened run into a folder with a space in its name, and the printed command as a shell reads it."""
    for package in ("sklearn", "matplotlib", "embedding_reader", "accelerate"):
        pytest.importorskip(package)
    from accelerate.state import AcceleratorState

    from fastprior.demos import quickstart

    monkeypatch.setattr(quickstart, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(quickstart, "TIMED_CAPTIONS", 8)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "quickstart", "--out", "my out", "--steps", "10", "--batch", "16")
    assert status == 0
    assert "10/10" in err and "loss=" in err and "4/4" not in err  # one bar, ours
    assert "the goal of 95% is not judged for a training this short" in out
    line = next(line for line in out.splitlines() if " sample --checkpoint " in line)
    monkeypatch.setenv("PATH", os.defpath)  # of a shell in which no environment is activated
    done = subprocess.run(f"{line} --out three.npy", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("a handwritten three\n")
    assert np.load("three.npy").shape == (1, 64)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_quickstart_in_a_place_that_cannot_be_written(capsys, tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("")
    assert "file" in error_of(capsys, "quickstart", "--out", tmp_path / "file", "--steps", 1)
    assert "steps=0" in error_of(capsys, "quickstart", "--out", tmp_path / "o", "--steps", 0)


def test_quickstart_without_its_packages(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    err = error_of(capsys, "quickstart", "--out", tmp_path / "o")
    assert 'sklearn: pip install "fastprior[quickstart]"' in err


# ways to end


def test_interrupt_and_warnings(capsys, monkeypatch):
    import warnings

    def interrupted(args):
        warnings.warn("look\nout")
        raise KeyboardInterrupt("half way")

    monkeypatch.setattr(info, "run", interrupted)
    status, _, err = run(capsys, "info")
    assert status == 130
    assert err == "fastprior: warning: look out\nfastprior: interrupted: half way\n"


@pytest.mark.slow
def test_interrupt_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    argv = [sys.executable, "-m", "fastprior.cli", "info"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def heed():  # what runs in the background may have been started to ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(argv, env=environment, preexec_fn=heed, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "fastprior: interrupted\n" and process.returncode == 130


@pytest.mark.slow
def test_reader_that_leaves(tmp_path):
    """`fastprior info | true` ends without a traceback."""
    command = [sys.executable, "-m", "fastprior.cli", "info"]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode == 141 and "Traceback" not in result.stderr and "Exception" not in result.stderr


@pytest.fixture(scope="module", autouse=True)
def one_bandwidth():
    """`bench` reads a tensor of 1 GiB to measure it; here once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_runs, "read_bandwidth", functools.cache(bench_runs.read_bandwidth))
        yield


def bench(tmp_path, capsys, net=None, *options: str) -> list[list[str]]:
    fastprior.save(priors.make_prior(net, timesteps=30), tmp_path / "prior.safetensors")
    command = [
        "bench",
        "--checkpoint",
        str(tmp_path / "prior.safetensors"),
        "--timesteps",
        "8",
        "--runs",
        "3",
        "--eager",
    ]
    assert cli.main([*command, "--batch-size", "1", "3", *options]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--cond-scale", "2"), ("--timesteps", "30")])
def test_bench(tmp_path, capsys, options):
    """A row for each batch size, with the peer's time over ours."""
    *_, title, one, three = bench(tmp_path, capsys, None, *options)
    numbers = sum(p.numel() for p in priors.make_prior().net.causal_transformer.parameters())
    assert title[:1] == ["batch"] and [one[0], three[0]] == ["1", "3"]
    for row in one, three:
        p50, p99, step, modelled, megabytes = map(float, row[1:6])
        steps = 30 if "30" in options else 7  # DDIM makes one evaluation less
        assert 0 < p50 <= p99 and step == pytest.approx(p50 / steps, rel=0.02, abs=0.015)  # both are rounded
        assert float(row[-1].removesuffix("x")) > 0 and row[-2] == "none"
        weights = numbers * (2 if "bfloat16" in options else 4)
        assert weights - 5e3 < megabytes * 1e6 < weights * 1.5 and 0 < modelled < step


@pytest.mark.slow
def test_bench_of_quantised_steps(tmp_path, capsys):
    plain, quantised = (bench(tmp_path, capsys, None, "--no-peer", *more) for more in ((), ("--quantise", "int8")))
    assert "float32, steps of int8, 8 steps" in " ".join(quantised[0])
    megabytes = [float(rows[-1][5]) for rows in (plain, quantised)]
    assert megabytes[1] < 0.6 * megabytes[0]


@pytest.mark.slow
def test_bench_of_what_the_peer_has_not(tmp_path, capsys):
    first, _, title, one, _ = bench(tmp_path, capsys, dict(text_dim=48))
    assert " ".join(first).startswith("dalle2-pytorch is left out: the network has text_dim=48")
    assert len(one) == len(title) - 5  # four titles are of two words, and there is no ratio
    assert len(bench(tmp_path, capsys, None, "--no-peer")[-1]) == len(one)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["prior", "pipeline"])
@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--cond-scale", "1"), ("--quantise", "int8")])
def test_bench_of_a_folder_of_diffusers(tmp_path, capsys, whole, options):
    """A prior transformer's, or a whole pipeline's; with 25 steps and guidance where nothing else is said."""
    diffusers = pytest.importorskip("diffusers")
    prior = pt_cases.make_stock()
    prior.save_pretrained(tmp_path / "prior" if whole else tmp_path)
    if whole:
        diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0).save_pretrained(
            tmp_path / "scheduler"
        )
    command = ["bench", "--checkpoint", str(tmp_path), "--runs", "3", "--eager", "--batch-size", "1", "3", *options]
    assert cli.main(command) == 0
    *_, first, _, one, three = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "25 steps" in " ".join(first) and "diffusers: fp32, eager" in " ".join(first)
    assert ("cond_scale 4;" if "--cond-scale" not in options else "cond_scale 1;") in " ".join(first)
    numbers = sum(p.numel() for p in prior.transformer_blocks.parameters() if p.ndim == 2)
    for batch, row in (1, one), (3, three):
        p50, p99, step, modelled, megabytes = map(float, row[1:6])
        assert row[0] == str(batch) and 0 < p50 <= p99 and step == pytest.approx(p50 / 25, rel=0.02, abs=0.01)
        assert float(row[-1].removesuffix("x")) > 0 and row[-2] == "none" and modelled < step
        texts = 7 + 1 + (2 + 1 if "--cond-scale" not in options else 0)
        prefix = 2 * 3 * 32 * 4 * batch * texts  # keys and values of three layers, at least
        weights = numbers * (1 if "int8" in options else 2 if "bfloat16" in options else 4)
        assert weights + prefix < megabytes * 1e6 < 1.7 * (weights + prefix)


def test_bench_of_a_folder_without_a_prior(tmp_path, capsys):
    assert cli.main(["bench", "--checkpoint", str(tmp_path)]) != 0
    assert "config.json" in capsys.readouterr().err
    assert cli.main(["bench", "--checkpoint", str(tmp_path), "--config", "some.json"]) != 0
    assert "--config some.json" in capsys.readouterr().err


def test_bench_of_a_folder_of_a_training(tmp_path, capsys):
    """As accelerate's save_model writes it."""
    safetensors.torch.save_model(priors.make_prior(timesteps=30), str(tmp_path / "model.safetensors"))
    options = ["--timesteps", "3", "--runs", "1", "--batch-size", "1", "--eager", "--no-peer"]
    assert cli.main(["bench", "--checkpoint", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "dalle2-pytorch: not measured" in "".join(out) and out[-1].split()[0] == "1"
