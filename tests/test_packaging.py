"""The kernels folder is found in a checkout and in a wheel, and never shadows the PyPI package named kernels."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT

PROBE = """
import sys
sys.path.insert(0, {root!r})
import fastprior.kernels.reference as reference, fastprior
print(reference.__file__)
try:
    import kernels
    print(getattr(kernels, "__file__", None))
except ImportError:
    print(None)
"""


def run(code: str, cwd: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_importing_takes_no_torch_and_every_name_is_there():
    found = run(
        """if True:
        import sys, fastprior
        print("torch" in sys.modules)
        from fastprior import *
        print(issubclass(DiffusionPrior, fastprior.prior.diffusion_prior.DiffusionPrior), "PriorSampler" in globals())
        print({*fastprior.__all__, "DiffusionPriorTrainer", "accelerate_prior", "Unet"} <= set(dir(fastprior)))
        print(all(hasattr(fastprior, name) for name in fastprior._LATER))
        print(fastprior.trackers.Tracker.__name__, hasattr(fastprior, "_private"), hasattr(fastprior, "trainers"))
    """,
        ROOT,
    )
    assert found == ["False", *["True"] * 4, "Tracker", "False", "False"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a build leaves its files in the folder, and the next would ship those that moved since
    for name in ("fastprior", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("fastprior-*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT)
        for folder in ("fastprior", "kernels")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".c", ".h", ".html")
    }
    assert names == {str("fastprior" / path if path.parts[0] == "kernels" else path) for path in files}


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    found, _ = run(PROBE.format(root=str(tmp_path / "site")), tmp_path)
    assert found == str(tmp_path / "site" / "fastprior" / "kernels" / "reference.py")


@pytest.mark.slow
def test_checkout_works_without_installation_and_does_not_shadow_kernels(tmp_path):
    found, kernels = run(PROBE.format(root=str(ROOT)), tmp_path)
    assert Path(found).resolve() == (ROOT / "kernels" / "reference.py").resolve()
    assert kernels == "None", "a folder without __init__.py is at most a namespace package: anything installed wins"
