"""`pyext dissect`, `pyext reconstruct` and `pyext eval --classes`, below the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyext.subnet.atlas import Atlas
from pyext.subnet.dissection import dissect
from pyext.subnet.pictures import draw_accuracy, draw_atlas
from pyext.subnet.subnet import Subnet, reconstruct
from pyext.train.data import Batch, HeldOutBatches, ImageData, checked, loader
from pyext.train.errors import UserError, require
from pyext.train.evaluation import Scores, evaluate
from pyext.train.progress import Progress
from pyext.train.runs import Card

SHARES = (0.02, 0.03, 0.05, 0.08, 0.11, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
"""Kept shares of the curve that `accuracy_curve` draws."""


@dataclass(frozen=True)
class Source:
    """An opened network with its card and data, and how its images are read."""

    network: nn.Module
    card: Card
    data: ImageData
    device: torch.device
    batch_size: int
    workers: int

    def batches(self, images: Any) -> Iterator[Batch]:
        """uint8 images and labels, in order, without augmentation."""
        order = HeldOutBatches(len(images), self.batch_size)
        return checked(loader(images, order, self.workers, pin_memory=self.device.type == "cuda"))


def dissect_to(
    source: Source, output: Path, shard: tuple[int, int], picture: Path | None, settings: dict[str, Any]
) -> Atlas:
    """Dissect the network on its training images, without augmentation, and save the atlas as `output`.

    A run that was stopped goes on from `output`.part, which the whole atlas replaces.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: an atlas is a file that ends with .safetensors.", usage=True)
    if output.exists():
        raise UserError(f"{output} already holds an atlas: choose another --output.", usage=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    train: Any = source.data.train
    images = train.part(np.arange(len(train)), source.data.held_out)
    batches = (
        (source.card.preprocessing.normalise(x.to(source.device)), labels) for x, labels in source.batches(images)
    )
    total = len(range(shard[0], -(-len(images) // source.batch_size), shard[1]))
    part = output.with_name(f"{output.name}.part")
    with Progress(total, 0, source.batch_size) as progress, told():

        def report(done: int, _: int) -> None:
            progress.done = done - 1
            progress.step(f"batch {done} of {total}", None)

        classes = len(source.card.classes)
        found = dissect(source.network, batches, classes, shard=shard, checkpoint=part, report=report, **settings)
    found.save(output)
    part.unlink(missing_ok=True)
    if picture is not None:
        draw_atlas(found, source.card.classes, picture)
    return found


def open_atlas(paths: Sequence[Path]) -> Atlas:
    """The atlas in `paths`, which are its shards where there are several."""
    with told():
        first, *others = (Atlas.load(path) for path in paths)
        return first.merge(*others)


def class_numbers(text: str, card: Card) -> list[int]:
    """The classes in `text`, names or numbers with commas between; UserError for an unknown one."""
    numbers = []
    for word in text.split(","):
        name = word.strip()
        if name in card.classes:
            numbers.append(card.classes.index(name))
        elif name.isdecimal() and int(name) < len(card.classes):
            numbers.append(int(name))
        else:
            count = len(card.classes)
            raise UserError(
                f"--classes: {name!r} is none of the {count} classes, nor a number below {count}.", usage=True
            )
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--classes {text} names a class twice.", usage=True)
    return sorted(numbers)


def build(network: nn.Module, atlas: Atlas, classes: Sequence[int], settings: dict[str, Any]) -> Subnet:
    """`reconstruct`, whose errors end the command with a sentence."""
    with told():
        return reconstruct(network, atlas, classes, **settings)


def write(subnet: Subnet, output: Path) -> None:
    """Export the materialised sub-network: ``.onnx``, or ``.pt2`` for ``torch.export.load``; any batch size."""
    if output.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--output {output}: expected a name that ends with .onnx or .pt2.", usage=True)
    small = subnet.materialize()
    example = torch.zeros(2, *subnet.atlas.input_shape, device=next(small.parameters()).device)
    if output.suffix == ".onnx":
        require("onnx", "--output .onnx")
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(small, (example,), str(output), dynamo=False, dynamic_axes=axes, **names)
        return
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(small, (example,), dynamic_shapes=dynamic), output)


def score(source: Source, network: Callable[[Tensor], Tensor], classes: Sequence[int]) -> Scores:
    """Scores of `network`, whose outputs are those of `classes`, on the held-out images of `classes`."""
    labels, held_out = source.data.held_out.labels, source.data.held_out
    index = np.flatnonzero(np.isin(labels.numpy(), classes))
    if not len(index):
        raise UserError(f"{source.data.name} has no held-out images of the classes {list(classes)}.")
    column = torch.full((len(source.card.classes),), -1)
    column[list(classes)] = torch.arange(len(classes))
    part: Any = held_out
    stream = ((images, column[own]) for images, own in source.batches(part.part(index, held_out)))
    return evaluate(network, stream, source.card.preprocessing, source.device)  # type: ignore[arg-type]


def restricted(network: nn.Module, classes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The whole network, its other outputs ignored."""
    return lambda x: network(x)[:, list(classes)]


def accuracy_curve(
    source: Source, subnet: Subnet, classes: Sequence[int], settings: dict[str, Any], path: Path
) -> None:
    """Draw the accuracy of sub-networks of several sizes, and of the whole network, to `path`."""
    points = []
    whole = score(source, restricted(source.network, classes), classes).top1
    for keep in SHARES:
        try:
            subnet.switch(classes, **{**settings, "keep": keep, "threshold": None})
        except ValueError:  # too small a share: a layer would be left without channels
            continue
        kept, all_parameters = subnet.summary().parameters
        points.append((kept / all_parameters, score(source, subnet, classes).top1))
    draw_accuracy({"sub-network": points, "whole network": [(s, whole) for s, _ in points]}, path)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A wrong value in here ends the command with its sentence."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{error}.", usage=False) from error
