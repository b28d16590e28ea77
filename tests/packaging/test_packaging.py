"""What is installed, and what people are told when it cannot be: sdist contents, missing or old torch."""

from __future__ import annotations

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
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of the source distribution, which is made from a copy: making one leaves things behind."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "runs", "data", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    result = run(code, folder / "source")
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


@pytest.mark.parametrize("folder", ["csrc", "pyext", "triton_kernels"])
def test_sdist_holds_all_sources(sdist, folder):
    suffixes = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / folder).rglob("*") if f.suffix in suffixes}
    assert sources
    assert sources <= sdist
