"""The kernels folder is found in a checkout and in a wheel, and never shadows the PyPI package named kernels."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("fastprior-*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastprior/kernels/reference.py" in names and "fastprior/kernels/__init__.py" in names
    sources = {f"fastprior/kernels/cpu/c/{path.name}" for path in (ROOT / "kernels" / "cpu" / "c").iterdir()}
    assert sources == {name for name in names if name.startswith("fastprior/kernels/cpu/c/")} and len(sources) > 5
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastprior"}
    modules = {path.name for path in (ROOT / "fastprior").glob("*.py")}
    assert modules == {name.split("/")[1] for name in names if name.count("/") == 1 and name.startswith("fastprior/")}


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
