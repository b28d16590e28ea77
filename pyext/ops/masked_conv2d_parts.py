"""What masked_conv2d's definition, checks and gradient share: geometry, and a sub-network's part as one of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = (None, "relu", "relu6")
"""In the order in which kernels number them."""


@dataclass(frozen=True)
class Geometry:
    """What is not a tensor: pairs are (rows, columns)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: int = 0

    @staticmethod
    def of(numbers: list[int]) -> Geometry:
        """From the numbers that kernels take: the fields, one after the other."""
        pairs = (tuple(numbers[i : i + 2]) for i in (0, 2, 4))
        return Geometry(*pairs, *numbers[6:])  # type: ignore[arg-type]

    def extents(self, height: int, width: int, kernel: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the result; not positive where the kernel does not fit."""
        sizes = zip((height, width), self.stride, self.padding, self.dilation, kernel[-2:], strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, s, p, d, k in sizes)
        return rows, columns


@dataclass(frozen=True)
class Kept:
    """A convolution of a sub-network as one of torch's.

    Without groups it is that of the kept rows and columns of the weight. With groups, which keep unequal numbers of
    channels, it is the whole layer's, whose other inputs are zero and whose other outputs are dropped.
    """

    inputs: Tensor
    outputs: Tensor
    channels: tuple[int, int]
    geometry: Geometry

    @property
    def whole(self) -> bool:
        return self.geometry.groups > 1

    def weight(self, weight: Tensor) -> Tensor:
        """The convolution's weight, from the layer's. With groups the rest is zero: what it holds has no effect."""
        if self.whole:
            return torch.where(self._own(weight), weight, 0)
        return weight.index_select(0, self.outputs).index_select(1, self.inputs)

    def add_gradient(self, whole: Tensor, own: Tensor) -> None:
        """Add the gradient of the convolution's weight to that of the layer's."""
        if self.whole:
            whole.add_(torch.where(self._own(own), own, 0))
        else:
            whole.index_put_((self.outputs[:, None], self.inputs[None]), own, accumulate=True)

    def _own(self, weight: Tensor) -> Tensor:
        """Where the layer's weight is of kept channels, bool (channels, input channels / groups, 1, 1)."""
        kept = [
            torch.zeros(n, dtype=torch.bool, device=weight.device).index_fill(0, ids, True)
            for n, ids in zip(self.channels, (self.inputs, self.outputs), strict=True)
        ]
        columns = kept[0].view(self.geometry.groups, -1).repeat_interleave(len(weight) // self.geometry.groups, 0)
        return (columns & kept[1][:, None])[:, :, None, None]

    def of_outputs(self, tensor: Tensor) -> Tensor:
        """What belongs to the convolution's rows, from a tensor (channels,) of the layer."""
        return tensor if self.whole else tensor.index_select(0, self.outputs)

    def wide(self, tensor: Tensor, kind: int) -> Tensor:
        """The convolution's input (kind 0) or output (1) from the compact one (N, C, H, W)."""
        if not self.whole:
            return tensor
        empty = tensor.new_zeros(tensor.shape[0], self.channels[kind], *tensor.shape[2:])
        return empty.index_copy(1, (self.inputs, self.outputs)[kind], tensor)

    def compact(self, tensor: Tensor, kind: int) -> Tensor:
        """The inverse of `wide`."""
        return tensor.index_select(1, (self.inputs, self.outputs)[kind]) if self.whole else tensor

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compact x to compact out; `weight` is what the method of that name gives."""
        g = self.geometry
        y = F.conv2d(self.wide(x, 0), weight, None, g.stride, g.padding, g.dilation, g.groups)
        return self.compact(y, 1)


def parts(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, subnets: Tensor | None, geometry: Geometry
) -> Iterator[tuple[Tensor | slice, Kept]]:
    """Of each sub-network that has images: those images, and its convolution; of the first where there is no image."""
    for s in range(len(inputs)):
        images = slice(None) if subnets is None else (subnets == s).nonzero()[:, 0]
        if isinstance(images, slice) or len(images) or (s == 0 and len(x) == 0):
            channels = weight.shape[1] * geometry.groups, len(weight)
            yield images, Kept(inputs[s][inputs[s] >= 0], outputs[s][outputs[s] >= 0], channels, geometry)


def activate(v: Tensor, activation: int) -> Tensor:
    """The activation with that number."""
    return v if activation == 0 else F.relu(v) if activation == 1 else F.relu6(v)


def affine(y: Tensor, scale: Tensor | None, shift: Tensor | None, outs: Tensor) -> Tensor:
    if scale is not None:
        y = y * scale[outs, None, None]
    return y if shift is None else y + shift[outs, None, None]
