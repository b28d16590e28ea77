"""Negatives for the memory-bank contrast: rows of other classes, uniform, drawn on the device of the labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassTable(NamedTuple):
    """The rows of a data set sorted by class: a row of another class is then one draw and one look-up."""

    labels: Tensor  # (n,)
    order: Tensor  # (n,) rows, class by class
    start: Tensor  # (classes,) where a class begins in `order`
    size: Tensor  # (classes,)


def class_table(labels: Tensor) -> ClassTable:
    """Sort the rows by class, once; waits for the device.

    Args:
        labels: (n,) int64, at least 0, the class of every row.

    Raises:
        ValueError: wrong shape; a negative label; a class that all rows are of, so that there is no row of another.
        TypeError: labels that are not int64.
    """
    if labels.dim() != 1 or labels.numel() == 0:
        raise ValueError(f"sample_negatives: labels has shape {tuple(labels.shape)}, expected (rows,), one or more")
    if labels.dtype != torch.int64:
        raise TypeError(f"sample_negatives: labels has dtype {labels.dtype}, expected int64")
    if int(labels.min()) < 0:
        raise ValueError(f"sample_negatives: labels holds {int(labels.min())}, expected classes from 0 on")
    size = torch.bincount(labels)
    if int(size.max()) == labels.numel():
        raise ValueError(
            f"sample_negatives: all {labels.numel()} rows are of class {int(size.argmax())}, so there is no row of "
            "another class to draw; draw any row instead (relaxed)"
        )
    return ClassTable(labels, torch.argsort(labels, stable=True), size.cumsum(0) - size, size)


def draw_negatives(
    table: ClassTable | None, num_rows: int, index: Tensor, num_negatives: int, generator: torch.Generator | None = None
) -> Tensor:
    """`sample_negatives` with a table made before (None: any row); never waits for the device."""
    shape = (len(index), num_negatives)
    # The remainder of 62 random bits: uniform but for one part in 2^62 / rows.
    drawn = torch.randint(0, 2**62, shape, generator=generator, device=index.device)
    if table is None:
        return drawn % num_rows
    label = table.labels[index]
    start, size = table.start[label].unsqueeze(1), table.size[label].unsqueeze(1)
    place = drawn % (num_rows - size)
    return table.order[torch.where(place >= start, place + size, place)]


def sample_negatives(
    labels: Tensor,
    index: Tensor,
    num_negatives: int,
    *,
    relaxed: bool = False,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Draw `num_negatives` rows of other classes for every image, uniformly and with replacement.

    With replacement, so more negatives than rows of other classes can be asked for.

    Args:
        labels: (n,) int64, the class of every row of the banks, on the device to draw on.
        index: (B,) int64, the row of each image.
        num_negatives: K, at least 1.
        relaxed: draw any row, the image's own included, as the memory-bank form does where labels are not used.
        generator: of labels' device, or a seed: the same seed gives the same rows.

    Returns:
        (B, K) int64.

    Raises:
        ValueError, TypeError: labels or index of the wrong shape or dtype, no rows of other classes.
        IndexError: a number in `index` that is no row (CPU).
    """
    if num_negatives < 1:
        raise ValueError(f"sample_negatives: num_negatives is {num_negatives}, expected at least 1")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"sample_negatives: index is {tuple(index.shape)} {index.dtype}, expected (batch,) int64")
    if isinstance(generator, int):
        generator = torch.Generator(labels.device).manual_seed(generator)
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(labels):
        raise IndexError(f"sample_negatives: index holds a number that is no row, expected 0 to {len(labels) - 1}")
    table = None if relaxed else class_table(labels)
    return draw_negatives(table, len(labels), index, num_negatives, generator)
