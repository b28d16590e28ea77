"""A whole DenseNet block at inference, its layers and concatenations, as one operator.

Source: DenseNet, arXiv 1608.06993, section 3; F(2x2, 3x3): arXiv 1509.09308. For every layer, x the channels so far,
all normalisations by their running statistics:

    u   = conv1x1(relu(BN(x)))          a bottleneck; else u = x
    x  <- concat(x, conv3x3(relu(BN(u))))

and behind the layers, or alone, there may be a transition: average2x2(conv1x1(relu(BN(x)))).

On the CPU the layers of a few images follow one another while their maps are in cache: a layer reads the front of each
position's channels and writes behind them, u is never a tensor, the 3x3 convolution takes 16 products for four results,
and a transition averages before it convolves, which is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyext import _backend
from pyext._operator import DTYPES, accumulate_dtype, check_dtype, check_place, no_cpu_inference, no_reference

_OPS = torch.ops.pyext

CELL = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "conv.weight")
TENSORS = tuple(name.replace(".", f"{cell}.") for cell in (1, 2) for name in CELL)
"""State-dict names of one bottleneck layer's tensors, in the order in which every layer passes them; a layer without a
bottleneck has one cell, whose tensors are those of the second here, and so has a transition."""
_CONV = CELL.index("conv.weight")


class Extents(NamedTuple):
    """What the kernels must know besides the tensors, whose shapes tell it."""

    channels: int
    """That the first layer reads."""
    layers: int
    squeeze: int
    """Channels between the two convolutions of a layer; 0 without a bottleneck."""
    growth: int
    """Channels that a layer gives."""
    transition: int = 0
    """Channels of the transition behind the layers; 0 for none."""

    def cells(self) -> int:
        """Of a layer."""
        return 2 if self.squeeze else 1


def extents_of(tensors: Sequence[Tensor]) -> Extents:
    """`Extents` of a block by the shapes of its first layer's tensors and of the last; ValueError where they tell none.

    A block whose last convolution is a 1x1 has a transition.
    """
    if len(tensors) < len(CELL) or tensors[0].dim() != 1 or tensors[_CONV].dim() != 4:
        raise ValueError(f"dense_block: {len(tensors)} tensors, expected {len(CELL)} for each cell, the last a weight")
    channels, transition = len(tensors[0]), len(tensors[-1]) if _is_1x1(tensors[-1]) else 0
    count = len(tensors) - (len(CELL) if transition else 0)
    squeeze = len(tensors[_CONV]) if count and _is_1x1(tensors[_CONV]) else 0
    each = len(CELL) * (2 if squeeze else 1)
    if count % each:
        raise ValueError(
            f"dense_block: {len(tensors)} tensors, expected {each} for each layer and, where the last, "
            f"tensors[{len(tensors) - 1}], is a 1x1 convolution's weight, {len(CELL)} for a transition"
        )
    last = tensors[each - 1]
    growth = len(last) if count and last.dim() == 4 else 0
    if not channels or not (growth if count else transition):
        raise ValueError(
            f"dense_block: tensors[0] and tensors[{each - 1}] have shapes {tuple(tensors[0].shape)} and "
            f"{tuple(last.shape)}, expected those of a layer's first normalisation and last convolution"
        )
    return Extents(channels, count // each, squeeze, growth, transition)


def _is_1x1(weight: Tensor) -> bool:
    return weight.dim() == 4 and tuple(weight.shape[2:]) == (1, 1)


def tensor_shapes(extents: Extents) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a block, layer by layer."""
    for layer in range(extents.layers):
        channels = extents.channels + layer * extents.growth
        kernels = [(extents.squeeze, 1), (extents.growth, 3)][-extents.cells() :]
        for cell, (outputs, taps) in enumerate(kernels, 3 - extents.cells()):
            for name in CELL:
                yield f"{name.replace('.', f'{cell}.')} of layer {layer}", _shape(name, channels, outputs, taps)
            channels = outputs
    if extents.transition:
        channels = extents.channels + extents.layers * extents.growth
        for name in CELL:
            yield f"{name} of the transition", _shape(name, channels, extents.transition, 1)


def _shape(name: str, channels: int, outputs: int, taps: int) -> tuple[int, ...]:
    return (outputs, channels, taps, taps) if name.startswith("conv") else (channels,)


def reference(x: Tensor, tensors: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """The operator's definition in plain torch; differentiable. Shapes as in `dense_block`."""
    own = [tensor.to(x.dtype) for tensor in tensors]
    extents = extents_of(tensors)
    step = len(CELL) * extents.cells()
    for layer in range(0, step * extents.layers, step):
        u = x
        for cell in range(layer, layer + step, len(CELL)):
            u = _reference_cell(u, own[cell : cell + len(CELL)], eps)
        x = torch.cat([x, u], dim=1)
    return F.avg_pool2d(_reference_cell(x, own[-len(CELL) :], eps), 2) if extents.transition else x


def _reference_cell(x: Tensor, tensors: Sequence[Tensor], eps: float) -> Tensor:
    weight, bias, mean, var, kernel = tensors
    return F.conv2d(F.relu(F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)), kernel, padding="same")


def validate(x: Tensor, tensors: Sequence[Tensor], extents: Extents, eps: float) -> None:
    """Raise TypeError (dtype) or ValueError (all else) naming the argument that is wrong and what was expected."""
    if x.dim() != 4 or x.shape[1] != extents.channels or 0 in x.shape[1:]:
        raise ValueError(
            f"dense_block: x has shape {tuple(x.shape)}, expected (N, {extents.channels}, H, W), all but N at least 1"
        )
    if extents.transition and min(x.shape[2:]) < 2:
        raise ValueError(f"dense_block: x has shape {tuple(x.shape)}, expected two rows and columns for a transition")
    if x.dtype not in DTYPES:
        raise TypeError(f"dense_block: x has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
    if not eps >= 0:
        raise ValueError(f"dense_block: eps is {eps}, expected at least 0")
    for index, (tensor, (name, shape)) in enumerate(zip(tensors, tensor_shapes(extents), strict=True)):
        what = f"dense_block: tensors[{index}], {name},"
        check_place(what, tensor, shape, x)
        check_dtype(what, tensor, x)


OPERATOR = _backend.register(
    _backend.Operator(
        "dense_block",
        {"cpu": no_cpu_inference, "reference": no_reference},
        differentiable=False,
        unwritten=("cuda", "triton"),
    )
)


def dense_block(
    x: Tensor, tensors: Sequence[Tensor], *, eps: float = 1e-5, packed: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """All layers of a dense block, a transition, or both, at inference (running statistics everywhere).

    Args:
        x: (N, C, H, W), any strides, any N; float32, bfloat16, float16, or float64. Fastest with channels innermost.
        tensors: for every layer its parameters and running statistics in the order of `TENSORS`, in x's dtype or
            float32 (float64 for float64), layer l of C + l * growth channels; then the five of a transition, if there
            is one.
        eps: of all normalisations.
        packed: what `pack_dense_block` has made of these tensors, if they are used more than once.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Returns:
        (N, C + layers * growth, H, W), or (N, transition, H // 2, W // 2) behind a transition; of the CPU kernel with
        channels innermost.

    Raises:
        ValueError: wrong number of tensors, shapes, device or eps.
        TypeError: wrong dtype.
        RuntimeError: packed is of other tensors.
        BackendError: the backend asked for cannot run; the kernel does not where gradients are asked for.

    Source: DenseNet, arXiv 1608.06993, section 3.
    """
    extents = extents_of(tensors)
    name = OPERATOR.choose(backend, x, tensors)
    validate(x, tensors, extents, eps)
    if name == "reference":
        return reference(x, tensors, eps)
    return _OPS.dense_block(x, _packed(tensors, extents, eps, x.dtype) if packed is None else packed, extents)


def pack_dense_block(tensors: Sequence[Tensor], *, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Constants of a block in the order in which the CPU kernel reads them, for `dense_block`'s `packed`.

    Args:
        tensors, eps: as there; on the CPU.
        dtype: of the maps that the block will be given.

    Returns:
        (elements,) in the accumulate dtype of `dtype`, not differentiable.
    """
    extents = extents_of(tensors)
    validate(tensors[0].new_empty((0, extents.channels, 2, 2), dtype=dtype), tensors, extents, eps)
    return _packed(tensors, extents, eps, dtype)


def _packed(tensors: Sequence[Tensor], extents: Extents, eps: float, dtype: torch.dtype) -> Tensor:
    wide = accumulate_dtype(dtype)
    with torch.no_grad():
        return _OPS.dense_block_pack([tensor.detach().to(wide) for tensor in tensors], extents, eps)


def _fake(x, packed, extents):
    own = Extents(*extents)
    (batch, _, height, width), channels = x.shape, own.channels + own.layers * own.growth
    shape = (batch, height // 2, width // 2, own.transition) if own.transition else (batch, height, width, channels)
    return x.new_empty(shape).permute(0, 3, 1, 2)


def _fake_pack(tensors, extents, eps):
    return tensors[0].new_empty(torch.library.get_ctx().new_dynamic_size())


torch.library.register_fake("pyext::dense_block")(_fake)
torch.library.register_fake("pyext::dense_block_pack")(_fake_pack)
