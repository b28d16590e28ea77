"""Shared pieces of the training tests: a small run, a process of its own, files of the real formats."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyext.checkpoint import load_checkpoint
from pyext.train.data import load_data
from pyext.train.errors import UserError

SMALL = ["train", "hcgnet", "--arch", "tiny", "--data", "digits", "--image-size", "8", "--log-every", "1"]
"""A run of 11 steps an epoch, some 30 ms each."""


KILLED = """
import os, signal, sys
from pyext import cli
from pyext.train.runs import Table

add = Table.add
def add_and_die(self, *values):
    add(self, *values)
    if self.path.name == "steps.csv" and values[:2] == ({epoch}, {step}):
        os.kill(os.getpid(), signal.SIGKILL)
Table.add = add_and_die
sys.exit(cli.main(sys.argv[1:]))
"""
"""`pyext` that kills itself once the row of epoch and step is in steps.csv."""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, on one thread; its output is text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


def write_images(folder: Path, classes: tuple[str, ...], count: int, size: int = 20, seed: int = 0) -> Path:
    """PNG files CLASS/I.png whose mean colour tells the class."""
    random = np.random.default_rng(seed)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            pixels = random.integers(0, 100, (size, size + j % 3, 3))
            pixels[..., i % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{j}.png")
    return folder


def with_torchvision(test: Callable[..., None]) -> Callable[..., None]:
    """Run `test` where torchvision loads; beside a torch that has none, check that a user is told so instead."""

    @functools.wraps(test)
    def run(*arguments: object, **named: object) -> None:
        try:
            importlib.import_module("torchvision.datasets")
        except (ImportError, RuntimeError, OSError):
            with pytest.raises(UserError, match=r"needs torchvision.*pip install pyext-kernels\[train\]"):
                load_data("cifar10", "nowhere")
        else:
            test(*arguments, **named)

    return run


def losses(folder: Path) -> str:
    """steps.csv."""
    return (folder / "steps.csv").read_text()


def epochs(folder: Path) -> list[str]:
    """The rows of epochs.csv without the two columns that tell the time."""
    return [line.rsplit(",", 2)[0] for line in (folder / "epochs.csv").read_text().splitlines()]


def assert_same_run(first: Path, second: Path) -> None:
    """The same losses, scores, weights and momenta, bit for bit."""
    assert losses(first) == losses(second)
    assert epochs(first) == epochs(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    states = [load_checkpoint(folder / "last.pt") for folder in (first, second)]
    for state, other in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert torch.equal(state["momentum_buffer"], other["momentum_buffer"])
