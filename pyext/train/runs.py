"""What a training run leaves in its folder: checkpoints, exported weights and CSV tables.

    last.pt             everything that resuming needs, replaced atomically
    model.safetensors   the weights after the last whole epoch, with their card: what to hand to others
    epochs.csv          one row per epoch
    steps.csv           epoch, step, loss
    summary.json        written at the end: accuracy, time per step, peak memory

safetensors is the format for export because it holds tensors and text alone, so opening a stranger's file runs no code.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pyext import checkpoint
from pyext.train.data import ImageData, Preprocessing
from pyext.train.errors import UserError, require
from pyext.train.networks import build

FORMAT = "pyext training run 1"
_CARD = "pyext.card"


@dataclass(frozen=True)
class Card:
    """What must be known of a network to use it: its architecture, classes and preprocessing, and its data's name."""

    arch: str
    data: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    @staticmethod
    def of(arch: str, data: ImageData) -> Card:
        """The card of network `arch` trained on `data`."""
        return Card(arch, data.name, data.classes, data.preprocessing)

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and strings, which checkpoints and JSON hold."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(entries: Mapping[str, Any]) -> Card:
        """The inverse of `to_dict`; KeyError or TypeError when an entry is missing or of another kind."""
        p = entries["preprocessing"]
        preprocessing = Preprocessing(int(p["image_size"]), tuple(p["mean"]), tuple(p["std"]))
        return Card(str(entries["arch"]), str(entries["data"]), tuple(entries["classes"]), preprocessing)


class Table:
    """A CSV file that grows row by row and can be cut back to an earlier place of the run.

    The first columns named in `place` order the rows; each row is on disk when `add` returns.
    """

    def __init__(self, path: Path, columns: Sequence[str], place: int):
        self.path, self.columns, self.place = path, columns, place

    def cut(self, before: tuple[int, ...]) -> None:
        """Keep the rows whose place is before `before`: what was logged after the checkpoint will be logged again."""
        rows = self.read() if self.path.exists() else []
        keep = [row for row in rows if tuple(int(row[c]) for c in self.columns[: self.place]) < before]
        temporary = self.path.with_suffix(".csv.part")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(keep)
        os.replace(temporary, self.path)

    def add(self, *values: Any) -> None:
        """Append one row; floats keep every digit."""
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(values)

    def read(self) -> list[dict[str, str]]:
        """Every complete row."""
        with open(self.path, newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]


def save_run(path: Path, entries: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path` atomically; OSError when the disk refuses."""
    checkpoint.atomic_save(path, {"format": FORMAT, **entries})


def load_run(path: str | Path) -> dict[str, Any]:
    """The entries of a checkpoint that `save_run` wrote; CheckpointError when the file is missing or damaged."""
    entries = checkpoint.load_checkpoint(path)
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        raise UserError(f"{path} is a checkpoint of another program: `pyext train` did not write it.")
    return entries


def export(path: Path, network: nn.Module, card: Card) -> None:
    """Write the weights of `network` with `card` as safetensors, atomically."""
    safetensors = require("safetensors.torch", "exporting weights")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    temporary = path.with_suffix(".part")
    safetensors.save_file(tensors, str(temporary), metadata={_CARD: json.dumps(card.to_dict())})
    os.replace(temporary, path)


def load_network(path: str | Path, stated: Card | None = None) -> tuple[nn.Module, Card]:
    """The trained network in `path` in eval mode, and its card.

    `path` is a run's folder, its last.pt or model.safetensors, or any file of weights (a published checkpoint) when
    `stated` says what they are. UserError or CheckpointError when there is no card or the weights do not fit it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors" if (path / "model.safetensors").exists() else path / "last.pt"
    card = stated or _card_of(path)
    network = build(card.arch, len(card.classes))
    checkpoint.load_weights(network, path)
    return network.eval(), card


def _card_of(path: Path) -> Card:
    entries = _metadata(path) if path.suffix == ".safetensors" else checkpoint.load_checkpoint(path)
    try:
        return Card.from_dict(entries["card"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} does not say which network and data it is for: `pyext train` did not write it, so name them with "
            "--arch and --data."
        ) from error


def _metadata(path: Path) -> Mapping[str, Any]:
    safetensors = require("safetensors", "reading .safetensors files")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {"card": json.loads((file.metadata() or {}).get(_CARD, "null"))}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is missing or not a readable safetensors file ({error}).") from error
