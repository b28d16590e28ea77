"""What is installed, and what people are told when it cannot be: sdist, wheel from it, missing or old torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_import_under_an_older_torch_is_one_sentence():
    result = run("import torch; torch.__version__ = '2.10.1+cpu'; import pyext")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: pyext needs torch 2.11 or newer and found torch 2.10.1+cpu: upgrade with "
        "`pip install --upgrade torch`."
    )


HIDE_TORCH = """
import importlib.util as u, runpy, sys
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_building_without_torch_is_one_sentence():
    """As under `pip install .` with build isolation, where no torch is installed."""
    result = run(HIDE_TORCH)
    assert result.returncode != 0
    assert result.stderr.strip().startswith(
        "pyext-kernels compiles against the torch that you have: install torch>=2.11"
    )
    assert "--no-build-isolation" in result.stderr


def test_extension_that_was_not_built_is_one_sentence(tmp_path):
    shutil.copytree(ROOT / "pyext", tmp_path / "pyext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable install would still find the extension in the source tree.
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import pyext"
    result = run(hide, tmp_path)
    assert result.returncode != 0
    assert "ImportError: pyext._C is not built: run `pip install --no-build-isolation .`" in result.stderr


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, which is made from a copy: making one leaves things behind."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "runs", "data", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    result = run(code, folder / "source")
    assert result.returncode == 0, result.stderr
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.mark.parametrize("folder", ["csrc", "pyext", "triton_kernels", "tests"])
def test_sdist_holds_all_sources(archive, folder):
    suffixes = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / folder).rglob("*") if f.suffix in suffixes}
    assert sources
    with tarfile.open(archive) as tar:
        assert sources <= {name.partition("/")[2] for name in tar.getnames()}


SMOKE = """
import sys, torch, pyext
from pyext.triton_kernels import gated_excitation
assert pyext.__file__.startswith(sys.argv[1]), pyext.__file__
module = pyext.nn.SMG(8, 4).double()
u = torch.randn(3, 8, 5, 7, dtype=torch.float64, requires_grad=True)
found = {}
for name in ("cpu", "reference"):
    with pyext.backend(name):
        out = module(u)
        found[name] = [out, *torch.autograd.grad(out.square().sum(), [u, *module.parameters()])]
for kernel, plain in zip(*found.values(), strict=True):
    torch.testing.assert_close(kernel, plain, rtol=1e-9, atol=1e-9)
"""


def test_wheel_from_the_sdist_works(archive, tmp_path):
    """Built without CUDA, which takes minutes; the wheel's own platform tag is auditwheel's concern."""
    pip = [sys.executable, "-m", "pip", "-q"]
    environment = {**os.environ, "PYEXT_WITHOUT_CUDA": "1"}
    options = ["--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, archive], env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", SMOKE, str(tmp_path / "installed")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_extensions_hold_no_path_of_this_machine_to_libraries():
    """torch's libraries are found by the torch that is imported first: a search path would find another machine's."""
    extensions = sorted((ROOT / "pyext").glob("*.so"))
    assert extensions
    for extension in extensions:
        dynamic = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
        assert "NEEDED" in dynamic
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
