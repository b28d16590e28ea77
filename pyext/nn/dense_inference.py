"""When DenseNet's blocks run as the operator `dense_block`, and the constants that they keep for it.

Constants are made again when a tensor of the block has changed: another one in its place, or written to in place, which
its version tells. A write through ``.data`` leaves the version as it was; `forget`, which a change of mode calls, drops
the constants.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyext._C import unchanged
from pyext._library import is_traced
from pyext.nn.hybrid_inference import dictionaries_of
from pyext.ops.dense_block import OPERATOR, dense_block, pack_dense_block

_DTYPES = (torch.float32, torch.float64)
"""Those that the kernel computes in: torch's own bfloat16 convolutions are faster than float32 arithmetic."""

Layers = Sequence[Sequence[tuple[Any, Any]]]
"""Of a block, the (BatchNorm2d, Conv2d) pairs of each layer."""


class _Packed(NamedTuple):
    """What a block's modules held when its constants were made, and those; None where it is not the operator."""

    dictionaries: tuple[dict[Any, Any], ...]
    items: tuple[tuple[Any, ...], ...]
    parts: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    tensors: list[Tensor]
    versions: list[tuple[int, int]]
    eps: float
    constants: Tensor | None

    def holds(self) -> bool:
        return (
            unchanged(self.dictionaries, self.items)
            and tuple(map(type, self.parts)) == self.kinds
            and _versions(self.tensors) == self.versions
        )


_packed: weakref.WeakKeyDictionary[nn.Module, _Packed] = weakref.WeakKeyDictionary()


def forget(block: nn.Module) -> None:
    """Drop the constants that are kept for `block`."""
    _packed.pop(block, None)


def infer_dense_block(block: Any, x: Tensor) -> Tensor | None:
    """What `block`, a DenseBlock, makes of x (N, C, H, W), channels innermost; None where the operator does not compute
    that or is not to run: training, gradients, tracing, autocast, another device or dtype, hooks, replaced submodules,
    layers of different widths.
    """
    if not _may_run(x):
        return None
    found = _packed.get(block)
    # To look through a block's submodules takes longer than to run it on one small image.
    if found is None or not found.holds():
        found = _packed[block] = _pack(block)
    if found.constants is None or found.constants.dtype != x.dtype or not OPERATOR.runs("cpu", x):
        return None
    if x.shape[1] != found.tensors[0].shape[0]:
        return None
    return dense_block(x, found.tensors, eps=found.eps, packed=found.constants)


def _may_run(x: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and not is_traced()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.dim() == 4
        and 0 not in x.shape[1:]
        and not torch.is_autocast_enabled("cpu")
    )


def _pack(block: Any) -> _Packed:
    # Of the block, its submodules alone: with a reference to itself it would never be collected.
    parts = tuple(part for part in block.modules() if part is not block)
    dictionaries = (block._modules, *(held for part in parts for held in dictionaries_of(part)))
    items = tuple(tuple(itertools.chain.from_iterable(held.items())) for held in dictionaries)
    layers = block.layer_cells() or []
    tensors = [tensor for cells in layers for cell in cells for tensor in _tensors_of(*cell)]
    if any(tensor.is_inference() for tensor in tensors):  # those have no version
        layers, tensors = [], []
    eps, constants = 0.0, None
    if layers and _is_operator(layers, tensors):
        eps = layers[0][0][0].eps
        constants = pack_dense_block(tensors, eps=eps, dtype=tensors[0].dtype)
    return _Packed(dictionaries, items, parts, tuple(map(type, parts)), tensors, _versions(tensors), eps, constants)


def _tensors_of(norm: Any, conv: Any) -> list[Tensor]:
    """In the order of `pyext.ops.dense_block.CELL`."""
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.weight]


def _is_operator(layers: Layers, tensors: Sequence[Tensor]) -> bool:
    """Whether the layers are of one form and in evaluation, all their tensors of one dtype on the CPU."""
    norms = [norm for cells in layers for norm, _ in cells]
    if any(norm.training or norm.eps != norms[0].eps for norm in norms):
        return False
    kernels = [(1, 1), (3, 3)][-len(layers[0]) :]
    widths = [conv.out_channels for _, conv in layers[0]]
    for cells in layers:
        if [conv.kernel_size for _, conv in cells] != kernels or [conv.out_channels for _, conv in cells] != widths:
            return False
    return all(t.dtype == tensors[0].dtype and t.device.type == "cpu" for t in tensors) and tensors[0].dtype in _DTYPES


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]
