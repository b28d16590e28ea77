"""`make wheel-test`: every wheel in dist/ with every torch asked for, each in a new environment; prints a matrix.

python tests/packaging/wheel_matrix.py 2.11.0 2.13.0 newest
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ["tests/ops/test_gated_excitation.py", "tests/parity"]
"""Exact in every dtype, and the parity file of the module, by the installed package."""
IMPORTED_FROM = (
    "import pyext, sys; assert pyext.__file__.startswith(sys.prefix), pyext.__file__; print(pyext.__version__)"
)
ACCELERATED = """
import torch, pyext
model = pyext.accelerate(pyext.models.hcgnet_a1(num_classes=10)).eval()
assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
"""


class Environment:
    """A virtual environment with one torch, in a folder that the caller deletes."""

    def __init__(self, folder: Path, torch: str):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.pip("install", "torch" if torch == "newest" else f"torch=={torch}", "pytest")
        self.torch = self.torch_version()

    def python(self, *arguments: str) -> str:
        """Standard output; RuntimeError with all output for a command that fails. Away from the checkout."""
        command = [self.folder / "venv/bin/python", *arguments]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError((result.stdout + result.stderr)[-4000:])
        return result.stdout.strip()

    def pip(self, *arguments: str) -> str:
        return self.python("-m", "pip", "-q", "--disable-pip-version-check", *arguments)

    def torch_version(self) -> str:
        return self.python("-c", "import torch; print(torch.__version__)")


def check(environment: Environment, wheel: Path) -> str:
    """Install and use the wheel; returns what doctor says of it."""
    environment.pip("install", "--force-reinstall", "--no-deps", str(wheel))
    environment.pip("install", str(wheel))  # with dependencies: none may be another torch
    if environment.torch_version() != environment.torch:
        raise RuntimeError(f"installing {wheel.name} replaced torch {environment.torch}")
    environment.python("-c", IMPORTED_FROM)
    environment.python("-c", ACCELERATED)
    tests = [str(ROOT / path) for path in TESTS]
    wanted = "odd or smg"
    configuration = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    counted = environment.python("-m", "pytest", "-q", *configuration, "-k", wanted, *tests)
    doctor = environment.python("-m", "pyext", "doctor")
    return f"{counted.splitlines()[-1]}\n{doctor}"


def main(versions: list[str]) -> int:
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        raise SystemExit("no wheels in dist/: run `make wheel`")
    rows, failed = [], False
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            environment = Environment(Path(folder), version)
            for wheel in wheels:
                try:
                    report = check(environment, wheel)
                    rows.append(f"| {wheel.name} | {environment.torch} | passed |")
                except RuntimeError as error:
                    report, failed = str(error), True
                    rows.append(f"| {wheel.name} | {environment.torch} | FAILED |")
                print(f"{wheel.name} with torch {environment.torch}\n{report}\n", flush=True)
    print("\n".join(["| wheel | torch | result |", "|---|---|---|", *rows]))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["newest"]))
