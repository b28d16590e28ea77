"""A whole HCGNet block at inference: squeeze cells, gates and dense connections of all its modules, as one operator.

Source: HCGNet, arXiv 1908.09699, section 3. For every module, x the channels so far, all normalisations by their
running statistics:

    u   = conv3x3(relu(BN(conv1x1(relu(BN(x))))))           grouped, stride 1; of a transition also 2
    y   = f * u + n                                         the gates of `gated_excitation`
    x  <- concat(x, y) in a dense block, else y is the result (one module: a transition)

The map between the convolutions, several times as wide as u, is never a tensor, and nothing is concatenated: on the CPU
an image goes through the whole block while it is in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyext import _backend
from pyext._operator import DTYPES, backends, check_dtype, check_place, no_inference, register_triton, triton_kernels
from pyext.ops.gated_excitation import PARAMETERS, RUNNING, parameter_shapes
from pyext.ops.gated_excitation import reference as gates_reference

_OPS = torch.ops.pyext

SQUEEZE = (
    "conv1_1x1.norm.weight",
    "conv1_1x1.norm.bias",
    "conv1_1x1.norm.running_mean",
    "conv1_1x1.norm.running_var",
    "conv1_1x1.conv.weight",
    "conv2_3x3.norm.weight",
    "conv2_3x3.norm.bias",
    "conv2_3x3.norm.running_mean",
    "conv2_3x3.norm.running_var",
    "conv2_3x3.conv.weight",
)
TENSORS = (*SQUEEZE, *PARAMETERS, *RUNNING)
"""State-dict names of one module's tensors, in the order in which every layer passes them."""
_CONV1, _CONV2 = CONVOLUTIONS = tuple(TENSORS.index(f"{cell}.conv.weight") for cell in ("conv1_1x1", "conv2_3x3"))
"""Where the weights stand that `pack_hybrid_block` packs."""


class Extents(NamedTuple):
    """What the kernels must know besides the tensors; all but the last two follow from the tensors' shapes."""

    modules: int
    squeeze: int
    """Channels between the two convolutions."""
    growth: int
    """Channels that a module gives."""
    groups: int
    """Of the 3x3 convolution."""
    attention: int
    forget: int
    stride: int
    dense: bool


def extents_of(tensors: Sequence[Tensor], stride: int, dense: bool) -> Extents:
    """`Extents` of a block by the shapes of its first module's tensors; ValueError where they are no module's."""
    if not tensors or len(tensors) % len(TENSORS):
        raise ValueError(f"hybrid_block: {len(tensors)} tensors, expected {len(TENSORS)} for each module")
    conv1, conv2 = tensors[_CONV1], tensors[_CONV2]
    attention, forget = (tensors[TENSORS.index(f"{name}.bias")].shape[0] for name in ("fcall", "fc1"))
    modules = len(tensors) // len(TENSORS)
    if is_packed(tensors):
        if conv1.dim() != 2 or conv2.dim() != 4 or not conv2.shape[0] or conv1.shape[0] % conv2.shape[0]:
            raise ValueError(
                f"hybrid_block: tensors[{_CONV1}] and tensors[{_CONV2}] are no packed weights: shapes "
                f"{tuple(conv1.shape)} and {tuple(conv2.shape)}, expected what pack_hybrid_block gives"
            )
        squeeze, groups, growth = conv1.shape[0], conv2.shape[0], conv2.shape[0] * conv2.shape[1]
    elif conv1.dim() != 4 or conv2.dim() != 4 or not conv2.shape[1] or conv1.shape[0] % conv2.shape[1]:
        raise ValueError(
            f"hybrid_block: tensors[{_CONV1}] has shape {tuple(conv1.shape)} and tensors[{_CONV2}] "
            f"{tuple(conv2.shape)}, expected the convolutions' weights (squeeze, channels, 1, 1) and "
            "(growth, squeeze / groups, 3, 3)"
        )
    else:
        squeeze, groups, growth = conv1.shape[0], conv1.shape[0] // conv2.shape[1], conv2.shape[0]
    return Extents(modules, squeeze, growth, groups, attention, forget, stride, dense)


def is_packed(tensors: Sequence[Tensor]) -> bool:
    """Whether the convolutions' weights, at least the first, are as `pack_hybrid_block` gives them."""
    return len(tensors) > _CONV1 and tensors[_CONV1].dtype == torch.int32


def tensor_shapes(channels: int, extents: Extents, packed: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a module that reads `channels` channels; `packed`: of packed weights."""
    squeeze, growth = extents.squeeze, extents.growth
    shapes = parameter_shapes(growth, extents.forget, extents.attention)
    for name in RUNNING:
        shapes[name] = shapes[name.rsplit(".", 1)[0] + ".weight"]
    for name in SQUEEZE:
        shapes[name] = (channels,) if name.startswith("conv1") else (squeeze,)
    groups, per_group = extents.groups, squeeze // extents.groups
    conv1, conv2 = "conv1_1x1.conv.weight", "conv2_3x3.conv.weight"
    if packed:
        shapes[conv1], shapes[conv2] = (squeeze, _pairs(channels)), (groups, growth // groups, _pairs(per_group), 9)
    else:
        shapes[conv1], shapes[conv2] = (squeeze, channels, 1, 1), (growth, per_group, 3, 3)
    return {name: shapes[name] for name in TENSORS}


# --- packed weights ---------------------------------------------------------------------------------------------------


def pack_hybrid_block(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A block's tensors with its convolutions' weights as the CPU kernel multiplies them in bfloat16.

    For `hybrid_block` in place of `tensors`, which are as there. The weights are rounded to bfloat16, and an int32
    holds two channels of a convolution's input, the even one in its lower half (zeros behind an odd last one): the 1x1
    convolution's are (squeeze, ceil(channels / 2)), the 3x3 convolution's (groups, growth / groups,
    ceil(squeeze / groups / 2), 9). The other tensors are the very same ones. To be made again after a weight has
    changed; not differentiable.

    Raises:
        ValueError: as `hybrid_block`, and tensors that are packed already.
    """
    if is_packed(tensors):
        raise ValueError("pack_hybrid_block: the tensors are packed already")
    groups = extents_of(tensors, 1, True).groups
    packed = list(tensors)
    with torch.no_grad():
        for start in range(0, len(tensors), len(TENSORS)):
            conv1, conv2 = start + _CONV1, start + _CONV2
            packed[conv1] = _join_pairs(tensors[conv1].flatten(2)).squeeze(-1)
            packed[conv2] = _join_pairs(tensors[conv2].flatten(2)).unflatten(0, (groups, -1))
    return packed


def _pairs(channels: int) -> int:
    return (channels + 1) // 2


def _join_pairs(weight: Tensor) -> Tensor:
    """(outputs, channels, taps) to int32 (outputs, ceil(channels / 2), taps)."""
    even = F.pad(weight.to(torch.bfloat16), (0, 0, 0, weight.shape[1] % 2))
    halves = even.unflatten(1, (-1, 2)).transpose(2, 3).clone(memory_format=torch.contiguous_format)
    return halves.view(-1).view(torch.int32).view(halves.shape[:3])


def _split_pairs(packed: Tensor, channels: int) -> Tensor:
    """The inverse of `_join_pairs`, in bfloat16."""
    return packed.contiguous().unsqueeze(-1).view(torch.bfloat16).transpose(2, 3).flatten(1, 2)[:, :channels]


def _unpacked(tensors: Sequence[Tensor], channels: int, extents: Extents) -> list[Tensor]:
    """One module's, with the convolutions' weights in bfloat16."""
    shapes = list(tensor_shapes(channels, extents).values())
    found = list(tensors)
    for index in CONVOLUTIONS:
        outputs, inputs, *taps = shapes[index]
        weight = _split_pairs(tensors[index].reshape(outputs, _pairs(inputs), -1), inputs)
        found[index] = weight.reshape(outputs, inputs, *taps)
    return found


# --- the definition ---------------------------------------------------------------------------------------------------


def reference(x: Tensor, tensors: Sequence[Tensor], extents: Extents, eps: float = 1e-5) -> Tensor:
    """The operator's definition in plain torch; differentiable. Shapes as in `hybrid_block`."""
    for start in range(0, len(tensors), len(TENSORS)):
        module = tensors[start : start + len(TENSORS)]
        y = _reference_module(x, module, extents, eps)
        x = torch.cat([x, y], dim=1) if extents.dense else y
    return x


def _reference_module(x: Tensor, tensors: Sequence[Tensor], extents: Extents, eps: float) -> Tensor:
    packed = is_packed(tensors)
    if packed:
        tensors = _unpacked(tensors, x.shape[1], extents)
    # Plain torch normalises by tensors of one dtype; the wider one holds the values of both.
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    t = {name: tensor.to(dtype) for name, tensor in zip(TENSORS, tensors, strict=True)}

    def activated(x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            t[f"{name}.norm.{kind}"] for kind in ("weight", "bias", "running_mean", "running_var")
        )
        return F.relu(F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))

    def cell(x: Tensor, name: str, *geometry: int) -> Tensor:
        kind = torch.bfloat16 if packed else x.dtype
        weight = t[f"{name}.conv.weight"].to(kind)
        return F.conv2d(activated(x, name).to(kind), weight, None, *geometry).to(x.dtype)

    u = cell(x, "conv1_1x1")
    u = cell(u, "conv2_3x3", extents.stride, 1, 1, extents.groups)
    parameters, running = ([t[name] for name in names] for names in (PARAMETERS, RUNNING))
    return gates_reference(u, parameters, running, False, 0.0, eps)


def validate(x: Tensor, tensors: Sequence[Tensor], extents: Extents, eps: float) -> None:
    """Raise TypeError (dtype) or ValueError (all else) naming the argument that is wrong and what was expected."""
    _validate_map(x, extents, eps)
    packed = is_packed(tensors)
    if packed and x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"hybrid_block: x has dtype {x.dtype}, expected float32 or bfloat16 with packed weights")
    for index, tensor in enumerate(tensors):
        module, place = divmod(index, len(TENSORS))
        shape = tensor_shapes(x.shape[1] + module * extents.growth, extents, packed)[TENSORS[place]]
        what = f"hybrid_block: tensors[{index}], {TENSORS[place]} of module {module},"
        check_place(what, tensor, shape, x)
        if not (packed and place in CONVOLUTIONS):
            check_dtype(what, tensor, x)
        elif tensor.dtype != torch.int32:
            raise TypeError(f"{what} has dtype {tensor.dtype}, expected int32 as the packed ones'")


def _validate_map(x: Tensor, extents: Extents, eps: float) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"hybrid_block: x has shape {tuple(x.shape)}, expected (N, C, H, W), all but N at least 1")
    if x.dtype not in DTYPES:
        raise TypeError(f"hybrid_block: x has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
    if extents.growth % extents.groups:
        raise ValueError(
            f"hybrid_block: tensors[{_CONV2}] gives {extents.growth} channels, expected a multiple of {extents.groups} "
            f"groups: of {extents.squeeze} channels it takes {extents.squeeze // extents.groups}"
        )
    if extents.stride not in (1, 2) or (extents.stride != 1 if extents.dense else extents.modules != 1):
        raise ValueError(
            f"hybrid_block: {extents.modules} modules with stride {extents.stride}, expected stride 1 in a dense "
            "block, and else one module with stride 1 or 2"
        )
    if not eps >= 0:
        raise ValueError(f"hybrid_block: eps is {eps}, expected at least 0")


def _no_packed(name: str, tensors: Sequence[Tensor]) -> str | None:
    return None if name == "cpu" or not is_packed(tensors) else "the weights are packed for the CPU's kernel"


def _for_inference(name: str, why: Callable[..., str | None]) -> Callable[..., str | None]:
    def judged(x: Tensor, tensors: Sequence[Tensor] = (), *rest: object) -> str | None:
        return _no_packed(name, tensors) or why(x) or no_inference(x, tensors, *rest)

    return judged


OPERATOR = _backend.register(
    _backend.Operator(
        "hybrid_block",
        {name: why if name == "reference" else _for_inference(name, why) for name, why in backends("x").items()},
        differentiable=False,
    )
)


def hybrid_block(
    x: Tensor,
    tensors: Sequence[Tensor],
    *,
    stride: int = 1,
    dense: bool = True,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """All modules of a hybrid block, or one transition, at inference (running statistics everywhere).

    Args:
        x: (N, C, H, W), any strides, any N; float32, bfloat16, float16, or (CPU and reference) float64.
        tensors: for every module its parameters and running statistics in the order of `TENSORS`, in x's dtype or
            float32 (float64 for float64). Module m reads C + m * growth channels if `dense`, C else. Or what
            `pack_hybrid_block` gives, for float32 or bfloat16 x on the CPU: the convolutions then multiply in bfloat16
            (both factors rounded) and add in float32, faster than float32 where the CPU has AVX-512 BF16.
        stride: of the 3x3 convolution: 1, or 2 in a transition.
        dense: whether a module's output follows its input's channels; else there is one module.
        eps: of all normalisations.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Returns:
        (N, C + modules * growth, H, W) if `dense`, else (N, growth, ceil(H / stride), ceil(W / stride)); NCHW.

    Raises:
        ValueError: wrong number of tensors, shapes, device, stride or eps.
        TypeError: wrong dtype.
        BackendError: the backend asked for cannot run; kernels do not where gradients are asked for.

    Source: HCGNet, arXiv 1908.09699, section 3.
    """
    extents = extents_of(tensors, stride, dense)
    name = OPERATOR.choose(backend, x, tensors)
    if name == "reference":
        validate(x, tensors, extents, eps)
        return reference(x, tensors, extents, eps)
    op = _OPS.hybrid_block_triton if name == "triton" else _OPS.hybrid_block
    try:
        return op(x, tensors, extents, eps)
    except RuntimeError:
        # The kernels check what memory safety needs; the sentence that names the argument is made here.
        validate(x, tensors, extents, eps)
        raise


def _fake(x, tensors, extents, eps):
    extents = Extents(*extents)
    validate(x, tensors, extents, eps)
    if extents.dense:
        return x.new_empty((x.shape[0], x.shape[1] + extents.modules * extents.growth, *x.shape[2:]))
    height, width = ((n - 1) // extents.stride + 1 for n in x.shape[2:])
    return x.new_empty((x.shape[0], extents.growth, height, width))


torch.library.register_fake("pyext::hybrid_block")(_fake)
torch.library.register_fake("pyext::hybrid_block_triton")(_fake)


def _triton_forward(x, tensors, extents, eps):
    validate(x, tensors, Extents(*extents), eps)  # a kernel reads past the end of a tensor that is too short
    return triton_kernels("hybrid_block").forward(x, tensors, extents, eps)


register_triton("hybrid_block_triton", _triton_forward)
