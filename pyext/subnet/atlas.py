"""The atlas: how important each channel is to each class."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyext.checkpoint import CheckpointError, atomic_save, load_checkpoint

FORMAT = "pyext atlas 1"
UNIT = 2.0**-36
"""Gates are summed as integers in this unit: sums of any order, and of any shards, are the same bit for bit.

A float32 gate of 2**-12 or more is a multiple of it, and 26 million images of the largest gate (5) still fit.
"""


class AtlasError(ValueError):
    """An atlas does not belong to the network, or atlases do not belong together."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """Sums of the gates that dissection found, by class, layer and channel.

    Attributes:
        sums: by layer, int64 (num_classes, C), in `UNIT`.
        counts: images of each class, int64 (num_classes,).
        fingerprint: of the network's weights (`fingerprint`).
        input_shape: (C, H, W) of the images.
        settings: how the gates were found.
    """

    sums: dict[str, Tensor]
    counts: Tensor
    fingerprint: str
    input_shape: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes of the network."""
        return len(self.counts)

    @property
    def layers(self) -> list[str]:
        """The gated layers, in the order in which they run."""
        return list(self.sums)

    def importance(self, layer: str) -> Tensor:
        """Mean gate, float64 (num_classes, C); NaN for a class without images. KeyError for an unknown layer."""
        return self.sums[layer].double() * UNIT / self.counts[:, None]

    def check_classes(self, classes: Sequence[int]) -> list[int]:
        """`classes` in ascending order; ValueError for none, an unknown one, a repeated one, one without images."""
        chosen = sorted(int(c) for c in classes)
        if not chosen:
            raise ValueError("reconstruct: classes is empty, expected one class at least")
        if unknown := [c for c in chosen if not 0 <= c < self.num_classes]:
            raise ValueError(f"reconstruct: classes has {unknown}, expected 0 to {self.num_classes - 1}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"reconstruct: classes {chosen} names a class twice")
        counts = self.counts.tolist()
        if empty := [c for c in chosen if counts[c] == 0]:
            raise ValueError(f"reconstruct: classes has {empty}, of which the atlas has seen no images")
        return chosen

    def check_network(self, model: nn.Module) -> None:
        """AtlasError where the atlas was made of another network than `model` (its names, shapes or values differ)."""
        if fingerprint(model) != self.fingerprint:
            raise AtlasError(f"the atlas was made of another network than this {type(model).__name__}: dissect it anew")

    def merge(self, *others: Atlas) -> Atlas:
        """The atlas of all images of this one and `others`, whichever order they have; exact.

        Raises:
            AtlasError: they are of different networks, images or settings.
        """
        sums, counts = {layer: values.clone() for layer, values in self.sums.items()}, self.counts.clone()
        for other in others:
            for name in ("fingerprint", "input_shape", "settings"):
                if getattr(other, name) != getattr(self, name):
                    raise AtlasError(f"merge: the atlases differ in {name}")
            counts += other.counts
            for layer, values in other.sums.items():
                sums[layer] += values
        return Atlas(sums, counts, self.fingerprint, self.input_shape, self.settings)

    def to_entries(self) -> dict[str, Any]:
        """As tensors, numbers and strings, which a checkpoint holds."""
        return {"format": FORMAT, **self._description(), "sums": self.sums, "counts": self.counts}

    @staticmethod
    def from_entries(entries: Mapping[str, Any], origin: str) -> Atlas:
        """The inverse of `to_entries`; CheckpointError in the name of `origin` for anything else."""
        try:
            if entries["format"] != FORMAT:
                raise CheckpointError(f"{origin} has the format {entries['format']!r}, expected {FORMAT!r}")
            sums = {layer: entries["sums"][layer] for layer in entries["layers"]}
            counts, shape = entries["counts"], tuple(entries["input_shape"])
            fitting = all(s.dtype == torch.int64 and s.dim() == 2 and len(s) == len(counts) for s in sums.values())
            if not fitting or counts.dtype != torch.int64 or counts.dim() != 1 or not sums:
                raise CheckpointError(f"{origin} holds sums of a wrong shape or dtype")
            return Atlas(sums, counts, str(entries["fingerprint"]), shape, dict(entries["settings"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{origin} is not an atlas ({type(error).__name__}: {error})") from error

    def _description(self) -> dict[str, Any]:
        own = {"fingerprint": self.fingerprint, "input_shape": list(self.input_shape), "settings": self.settings}
        return {"layers": self.layers, **own}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (safetensors: sums and counts) and, beside it, ``.json`` (all else), each atomically.

        Raises:
            ValueError: a name that does not end with ``.safetensors``.
            OSError, CheckpointError: as `pyext.checkpoint.atomic_save`.
        """
        path = _atlas_path(path)
        text = json.dumps({"format": FORMAT, **self._description()}, indent=1)
        temporary = path.with_suffix(".json.part")
        atomic_save(path, {"counts": self.counts, **{f"sums.{layer}": s for layer, s in self.sums.items()}})
        temporary.write_text(text)
        os.replace(temporary, path.with_suffix(".json"))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Atlas:
        """Read what `save` wrote; runs no code of the files. CheckpointError where they are missing or damaged."""
        path = _atlas_path(path)
        tensors = load_checkpoint(path)
        description = path.with_suffix(".json")
        try:
            entries = json.loads(description.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{description}, which describes {path.name}, is missing or damaged ({error})"
            ) from error
        sums = {name.removeprefix("sums."): s for name, s in tensors.items() if name.startswith("sums.")}
        if not isinstance(entries, dict):
            raise CheckpointError(f"{description} is not the description of an atlas")
        return Atlas.from_entries({**entries, "sums": sums, "counts": tensors.get("counts")}, str(path))


def _atlas_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Atlas: {path} does not end with .safetensors")
    return path


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of the weights and running statistics of `model`."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
