"""Pictures of an atlas and of what sub-networks can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyext.subnet.atlas import Atlas
from pyext.train.errors import require


def overlap(atlas: Atlas) -> torch.Tensor:
    """Of each pair of classes, the correlation of their importances about each channel's mean over the classes.

    float64 (K, K) over the K classes that have images.
    """
    seen = atlas.counts > 0
    importance = torch.cat([atlas.importance(layer)[seen] for layer in atlas.layers], dim=1)
    return torch.nan_to_num(torch.corrcoef(importance - importance.mean(0))).reshape(len(importance), len(importance))


def draw_atlas(atlas: Atlas, names: Sequence[str], path: Path) -> None:
    """A heat map class x channel per layer, channels by their mean importance, and the overlap of the classes."""
    pyplot = _pyplot()
    seen = [c for c in range(atlas.num_classes) if atlas.counts[c] > 0]
    columns = 3
    rows = -(-(len(atlas.layers) + 1) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 2.6 * rows), layout="constrained", squeeze=False
    )
    image: Any = None
    for axis, layer in zip(axes.flat, atlas.layers, strict=False):
        values = atlas.importance(layer)[seen]
        image = axis.imshow(values[:, values.mean(0).argsort(descending=True)], aspect="auto", vmin=0, vmax=1.5)
        axis.set(title=layer, xlabel="channel, by mean importance")
        axis.set_yticks(range(len(seen)), [names[c] for c in seen])
    figure.colorbar(image, ax=axes, label="mean gate (importance)")
    last = axes.flat[len(atlas.layers)]
    found = last.imshow(overlap(atlas), vmin=-1, vmax=1, cmap="coolwarm")
    last.set(title="overlap of classes (correlation)")
    last.set_xticks(range(len(seen)), [names[c] for c in seen], rotation=90)
    last.set_yticks(range(len(seen)), [names[c] for c in seen])
    figure.colorbar(found, ax=last)
    for axis in axes.flat[len(atlas.layers) + 1 :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_accuracy(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Accuracy against the kept share of the parameters: a line of (share, accuracy) for each name."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curves.items():
        shares, accuracies = zip(*points, strict=True)
        axis.plot([100 * s for s in shares], [100 * a for a in accuracies], marker=".", label=name)
    axis.set(xlabel="parameters kept, %", ylabel="top-1, %", xscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    require("matplotlib", "a picture").use("Agg")
    return require("matplotlib.pyplot", "a picture")
