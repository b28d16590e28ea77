"""When DenseNet's blocks and transitions run as the operator `dense_block`, and what is kept of their modules.

Constants are made again when a tensor has changed: another one in its place, or written to in place, which its version
tells. A write through ``.data`` leaves the version as it was; `forget`, which a change of mode calls, drops them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyext._C import unchanged
from pyext._library import is_traced
from pyext.nn.changes import contents, versions
from pyext.nn.hybrid_inference import dictionaries_of
from pyext.ops.dense_block import OPERATOR, Extents, extents_of, pack_dense_block

_OPS = torch.ops.pyext
_DTYPES = (torch.float32, torch.float64)
"""Those that the kernel computes in: torch's own bfloat16 convolutions are faster than float32 arithmetic."""

Cells = Sequence[tuple[Any, Any]]
"""(BatchNorm2d, Conv2d) pairs."""


class _Kept(NamedTuple):
    """What modules held when constants were made of them, and those; None where they do not compute what is asked."""

    dictionaries: tuple[dict[Any, Any], ...]
    items: tuple[tuple[Any, ...], ...]
    parts: Sequence[nn.Module]
    kinds: tuple[type, ...]
    tensors: list[Tensor]
    versions: list[tuple[int, int]]
    constants: Any

    def holds(self) -> bool:
        return (
            unchanged(self.dictionaries, self.items)
            and tuple(map(type, self.parts)) == self.kinds
            and versions(self.tensors) == self.versions
        )


_REMEMBERED = -1
"""Where `remembered` keeps, beside places of modules."""

_kept: weakref.WeakKeyDictionary[nn.Module, dict[int, _Kept]] = weakref.WeakKeyDictionary()


def forget(owner: nn.Module) -> None:
    """Drop the constants that are kept for `owner`."""
    _kept.pop(owner, None)


def infer_dense_block(block: Any, x: Tensor) -> Tensor | None:
    """What `block`, a DenseBlock, makes of x (N, C, H, W), channels innermost; None where the operator does not compute
    that or is not to run: training, gradients, tracing, autocast, another device or dtype, hooks, replaced submodules,
    layers of different widths.
    """

    def parts() -> list[nn.Module]:
        return [part for part in block.modules() if part is not block]

    def cells() -> Cells:
        layers = block.layer_cells() or []
        alike = all(list(map(_form, layer)) == list(map(_form, layers[0])) for layer in layers)
        kernels = [conv.kernel_size for _, conv in layers[0]] if layers else []
        usual = kernels in ([(3, 3)], [(1, 1), (3, 3)])
        return [cell for layer in layers for cell in layer] if alike and usual else []

    return _run(block, 0, parts, cells, x)


def remembered(block: nn.Module, find: Callable[[], Any]) -> Any:
    """What `find` gives, which looks through the submodules of `block`; found again when what they hold, other than
    tensors' values, dtypes and devices, has changed."""
    own = _kept.setdefault(block, {})
    found = own.get(_REMEMBERED)
    if found is None or not found.holds():
        parts = [part for part in block.modules() if part is not block]
        found = _Kept(*_seen(block, parts), [], [], find())
        if all(parameter.is_leaf for parameter in block.parameters()):  # others hold what they were computed from
            own[_REMEMBERED] = found
    return found.constants


def _seen(
    owner: nn.Module, parts: Sequence[nn.Module]
) -> tuple[tuple[dict[Any, Any], ...], tuple[tuple[Any, ...], ...], Sequence[nn.Module], tuple[type, ...]]:
    """The first four of `_Kept`."""
    # Of the owner, its submodules alone: with a reference to itself it would never be collected.
    dictionaries = (owner._modules, *(held for part in parts for held in dictionaries_of(part)))
    return dictionaries, contents(dictionaries), parts, tuple(map(type, parts))


def infer_transition(owner: nn.Module, place: int, modules: Sequence[Any], x: Tensor) -> Tensor | None:
    """What `modules`, those of `owner` from `place` on, make of x: norm, ReLU, 1x1 convolution without bias or groups,
    and average pool of 2x2. None as `infer_dense_block`."""
    return _run(owner, place, lambda: modules, lambda: [(modules[0], modules[2])], x)


def infer_folded(owner: nn.Module, place: int, modules: Sequence[Any], x: Tensor) -> Tensor | None:
    """What `modules`, those of `owner` from `place` on, make of x: a convolution without bias, and the norm behind it,
    which becomes part of the weight. None as `infer_dense_block`."""
    conv, norm = modules
    if not _may_run(x):
        return None
    found = _constants(owner, place, lambda: modules, lambda: [(norm, conv)], _folded)
    if found is None or found[0].dtype != x.dtype:
        return None
    weight, bias = found
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _folded(cells: Cells, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    weight, bias, mean, var, kernel = (tensor.detach() for tensor in tensors)
    scale = weight / torch.sqrt(var + cells[0][0].eps)
    return kernel * scale[:, None, None, None], bias - mean * scale


def _packed(cells: Cells, tensors: list[Tensor]) -> tuple[Tensor, Extents]:
    return pack_dense_block(tensors, eps=cells[0][0].eps, dtype=tensors[0].dtype), extents_of(tensors)


def _form(cell: tuple[Any, Any]) -> tuple[Any, ...]:
    return cell[1].kernel_size, cell[1].out_channels


def _run(
    owner: nn.Module, place: int, parts: Callable[[], Sequence[nn.Module]], cells: Callable[[], Cells], x: Tensor
) -> Tensor | None:
    if not _may_run(x):
        return None
    found = _constants(owner, place, parts, cells, _packed)
    if found is None:
        return None
    constants, extents = found
    if constants.dtype != x.dtype or x.shape[1] != extents.channels or 0 in x.shape[2:]:
        return None
    if extents.transition and min(x.shape[2:]) < 2:
        return None
    return _OPS.dense_block(x, constants, extents)


def _constants(
    owner: nn.Module,
    place: int,
    parts: Callable[[], Sequence[nn.Module]],
    cells: Callable[[], Cells],
    make: Callable[[Cells, list[Tensor]], Any],
) -> Any:
    """What `make` has made of the cells at `place` of `owner`, as they are now."""
    own = _kept.setdefault(owner, {})
    found = own.get(place)
    # To look through a block's submodules takes longer than to run it on one small image.
    if found is None or not found.holds():
        found = own[place] = _keep(owner, parts(), cells(), make)
    return found.constants


def _may_run(x: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and not is_traced()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.dim() == 4
        and not torch.is_autocast_enabled("cpu")
        and OPERATOR.runs("cpu", x)
    )


def _keep(
    owner: nn.Module, parts: Sequence[nn.Module], cells: Cells, make: Callable[[Cells, list[Tensor]], Any]
) -> _Kept:
    seen = _seen(owner, parts)
    tensors = [tensor for cell in cells for tensor in _tensors_of(*cell)]
    if any(tensor.is_inference() for tensor in tensors):  # those have no version
        cells, tensors = [], []
    constants = make(cells, tensors) if cells and _evaluates(cells, tensors) else None
    return _Kept(*seen, tensors, versions(tensors), constants)


def _tensors_of(norm: Any, conv: Any) -> list[Tensor]:
    """In the order of `pyext.ops.dense_block.CELL`."""
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.weight]


def _evaluates(cells: Cells, tensors: Sequence[Tensor]) -> bool:
    """Whether all cells are in evaluation, with one eps, all their tensors of one dtype on the CPU."""
    same = all(not norm.training and norm.eps == cells[0][0].eps for norm, _ in cells)
    dtype = tensors[0].dtype
    return same and dtype in _DTYPES and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
