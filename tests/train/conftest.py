from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_helpers import SMALL, write_images

from pyext import cli


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Run `pyext train` on the small run with more options, in this process; returns the run's folder."""

    def run(*options: str, name: str = "run", status: int = 0) -> Path:
        assert cli.main([*SMALL, "--output", str(tmp_path / name), *options]) == status
        return tmp_path / name

    return run


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with train/ and val/ of three classes."""
    classes = ("red", "green", "blue")
    write_images(tmp_path / "images" / "train", classes, 8)
    write_images(tmp_path / "images" / "val", classes, 3, seed=1)
    return tmp_path / "images"
