"""Sample calls of every operator, for what enumerates operators: GPU tests, sanitizers, the resource report.

An operator without an entry in `SAMPLES` fails the tests that enumerate; a new one needs an entry and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.peers import from_tests
from pyext import ops
from pyext.ops.bn_relu_conv2d import reference as convolution_reference
from pyext.ops.gated_excitation import PARAMETERS, RUNNING, reference
from pyext.ops.hybrid_block import Extents, extents_of
from pyext.ops.hybrid_block import reference as block_reference
from pyext.ops.masked_conv2d_parts import ACTIVATIONS
from pyext.ops.memory_contrast import reference as contrast_reference
from pyext.ops.memory_update import reference as update_reference
from pyext.ops.peer_contrast import reference as peer_reference


@dataclass(frozen=True)
class Shape:
    """Sizes of a sample's input, images first, as (N, C, H, W), and of what else the operator has."""

    input: tuple[int, ...]
    others: Mapping[str, int]

    def __str__(self) -> str:
        return "x".join(map(str, self.input))


@dataclass(frozen=True)
class Call:
    """The tensors of one call: what gradients are asked of (the main input first), what training mode moves, and
    integers; and numbers, which a GPU need not be waited for to read."""

    leaves: dict[str, Tensor]
    state: dict[str, Tensor]
    indices: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)

    def to(self, *to: torch.device | torch.dtype) -> Call:
        """Copies on a device, in a dtype, with the strides that they have where they are dense."""
        devices = [x for x in to if isinstance(x, torch.device)]
        moved = [{k: x.detach().to(*to, copy=True) for k, x in d.items()} for d in (self.leaves, self.state)]
        return Call(*moved, {k: x.to(*devices, copy=True) for k, x in self.indices.items()}, self.options)


@dataclass(frozen=True)
class Samples:
    """How one operator is called on drawn tensors.

    `draw(shape, dtype, parameter_dtype, layout, seed)` gives a CPU `Call`. `run(call, training, **options)` calls
    the operator with `options` (backend, out) and gives its output; `reference` does so in plain torch. Vectors and
    blocks do not divide the `odd` shapes; the `usual` ones, with dtype and layout, are those of networks. The other
    fields say what applies: whether there are gradients and an `out`, and whether the main input's first dimension is
    a batch of any size whose images do not know of each other.
    """

    draw: Callable[[Shape, torch.dtype, torch.dtype, str, int], Call]
    run: Callable[..., Tensor]
    reference: Callable[[Call, bool], Tensor]
    odd: Mapping[str, Shape]
    usual: tuple[tuple[Shape, torch.dtype, str], ...]
    layouts: tuple[str, ...] = ("nchw", "channels_last", "slice")
    differentiable: bool = True
    takes_out: bool = True
    independent_images: bool = True


def _draw_convolution(shape: Shape, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, seed: int) -> Call:
    inputs = from_tests("ops/conv_inputs.py")
    layer = inputs.Layer(*shape.input, **shape.others)
    leaves, state = inputs.make_layer(layer, dtype, parameter_dtype, layout, seed)
    return Call(leaves, state, options={name: shape.others[name] for name in ("stride", "groups")})


def _run_bn_relu_conv2d(call: Call, training: bool, **options: object) -> Tensor:
    tensors = *call.leaves.values(), *call.state.values()
    return ops.bn_relu_conv2d(*tensors, training=training, momentum=0.3, **call.options, **options)


def _reference_bn_relu_conv2d(call: Call, training: bool) -> Tensor:
    return convolution_reference(*call.leaves.values(), *call.state.values(), training, 0.3, **call.options)


def _convolution(input: tuple[int, ...], outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Shape:
    return Shape(input, {"outputs": outputs, "kernel": kernel, "stride": stride, "groups": groups})


def _draw_gated_excitation(
    shape: Shape, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, seed: int
) -> Call:
    make_inputs = from_tests("ops/inputs.py").make_inputs
    u, parameters, running = make_inputs(
        *shape.input, **shape.others, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout, seed=seed
    )
    leaves = {"u": u, **dict(zip(PARAMETERS, parameters, strict=True))}
    return Call(leaves, dict(zip(RUNNING, running, strict=True)))


def _run_gated_excitation(call: Call, training: bool, **options: object) -> Tensor:
    u, *parameters = call.leaves.values()
    return ops.gated_excitation(u, parameters, list(call.state.values()), training=training, momentum=0.3, **options)


def _reference_gated_excitation(call: Call, training: bool) -> Tensor:
    u, *parameters = call.leaves.values()
    return reference(u, parameters, list(call.state.values()), training, 0.3)


def _gated_excitation(n: int, c: int, height: int, width: int) -> Shape:
    return Shape((n, c, height, width), {"forget": max(2, c // 2), "attention": max(2, c)})


def _draw_block(shape: Shape, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, seed: int) -> Call:
    """A block's input and the tensors of its modules, none of which it moves."""
    inputs = from_tests("ops/block_inputs.py")
    block = inputs.Block(*shape.input, Extents(**shape.others))
    x, tensors = inputs.make_block(block, dtype, parameter_dtype, seed)
    x = from_tests("ops/layouts.py").in_layout(x, layout)
    leaves = {"x": x} | {f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}
    return Call(leaves, {}, options={name: shape.others[name] for name in ("stride", "dense")})


def _draw_banks(shape: Shape, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, seed: int) -> Call:
    """Embeddings (peers, images, features), banks, and indices whose first column is the images' own."""
    inputs = from_tests("ops/memory_inputs.py")
    images, peers, features = shape.input
    sizes = (peers, images, features, shape.others["rows"], shape.others["negatives"])
    embeddings, banks, indices = inputs.make_memory_inputs(sizes, dtype, seed=seed)
    banks = [bank.to(parameter_dtype) for bank in banks]
    if layout == "wider rows":
        banks = [inputs.in_larger_rows(bank) for bank in banks]
    state = {f"banks[{i}]": bank for i, bank in enumerate(banks)}
    return Call({"embeddings": embeddings}, state, {"indices": indices})


def _run_memory_contrast(call: Call, training: bool, **options: object) -> Tensor:
    return ops.memory_contrast(call.leaves["embeddings"], list(call.state.values()), call.indices["indices"], **options)


def _reference_memory_contrast(call: Call, training: bool) -> Tensor:
    return contrast_reference(call.leaves["embeddings"], list(call.state.values()), call.indices["indices"])


def _moved_banks(update: Callable[..., None], call: Call, **options: object) -> Tensor:
    """The banks after an update of them, which is taken back so that the call can be repeated."""
    banks, before = list(call.state.values()), torch.stack(list(call.state.values()))
    update(banks, call.leaves["embeddings"].detach(), call.indices["indices"][:, 0], **options)
    moved = torch.stack(banks)
    for bank, old in zip(banks, before, strict=True):
        bank.copy_(old)
    return moved


def _run_memory_update(call: Call, training: bool, **options: object) -> Tensor:
    return _moved_banks(ops.memory_update, call, **options)


def _reference_memory_update(call: Call, training: bool) -> Tensor:
    return _moved_banks(update_reference, call)


def _run_hybrid_block(call: Call, training: bool, **options: object) -> Tensor:
    x, *tensors = call.leaves.values()
    with torch.no_grad():
        return ops.hybrid_block(x, tensors, **call.options, **options)


def _reference_hybrid_block(call: Call, training: bool) -> Tensor:
    x, *tensors = call.leaves.values()
    return block_reference(x, tensors, extents_of(tensors, **call.options))


def _draw_masked(shape: Shape, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, seed: int) -> Call:
    """x (images, kept channels, height, width) of shape.input's channels in all, the weight and lists of a layer."""
    inputs = from_tests("ops/masked_inputs.py")
    others = dict(shape.others)
    kernel, percent, activation = (others.pop(name) for name in ("kernel", "percent", "activation"))
    layer = inputs.Masked(
        *shape.input,
        others.pop("outputs"),
        (kernel, kernel),
        keep=percent / 100,
        activation=ACTIVATIONS[activation],
        gated=bool(others.pop("gated")),
        **others,
    )
    tensors, lists = inputs.make_masked(layer, dtype, parameter_dtype, seed)
    tensors["x"] = from_tests("ops/layouts.py").in_layout(tensors["x"], layout)
    options = {name: shape.others[name] for name in ("stride", "padding", "dilation", "groups", "activation")}
    return Call(tensors, {}, lists, options)


def _run_masked(call: Call, training: bool, **options: object) -> Tensor:
    own = call.options | {"activation": ACTIVATIONS[call.options["activation"]]}
    return ops.masked_conv2d(**call.leaves, **call.indices, **own, **options)


def _reference_masked(call: Call, training: bool) -> Tensor:
    return _run_masked(call, training, backend="reference")


def _masked(
    input: tuple[int, int, int, int],
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    subnets: int = 1,
    percent: int = 60,
    activation: int = 1,
    gated: bool = False,
) -> Shape:
    """`percent` of the channels are kept; padding keeps the map's size where there is no stride."""
    padding = dilation * (kernel - 1) // 2
    geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    rest = {"subnets": subnets, "percent": percent, "activation": activation, "gated": gated}
    return Shape(input, {"outputs": outputs, **geometry, **rest})


def _block(input: tuple[int, ...], modules: int, growth: int, groups: int, stride: int = 1) -> Shape:
    widths = {"squeeze": 4 * growth, "growth": growth, "groups": groups, "attention": growth, "forget": growth}
    return Shape(input, {"modules": modules, **widths, "stride": stride, "dense": stride == 1})


def _banks(images: int, peers: int, features: int, rows: int, negatives: int) -> Shape:
    return Shape((images, peers, features), {"rows": rows, "negatives": negatives})


_ODD_BANKS = {
    "odd": _banks(4, 3, 7, 11, 5),
    "one of everything": _banks(1, 2, 1, 1, 1),
    "more indices than rows": _banks(3, 4, 130, 20, 90),
    "whole vectors": _banks(5, 4, 128, 60, 33),
    "more peers than one pass takes": _banks(2, 6, 20, 30, 17),
    "several blocks": _banks(2, 3, 150, 40, 2100),
}
_USUAL_BANKS = (
    (_banks(2, 4, 128, 200, 4096), torch.float32, "rows"),
    (_banks(2, 4, 128, 200, 4096), torch.bfloat16, "rows"),
    (_banks(2, 2, 64, 200, 255), torch.float16, "wider rows"),
)


def _draw_peers(shape: Shape, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, seed: int) -> Call:
    """Embeddings (peers, images, features) of norm `scale`, and the images' classes."""
    described = from_tests("ops/peer_inputs.py").described
    images, peers, features = shape.input
    case = described.make_case((peers, images, features), dtype, shape.others["classes"], seed=seed)
    embeddings = from_tests("ops/layouts.py").STACKS[layout](case.main * shape.others["scale"])
    return Call({"embeddings": embeddings}, {}, {"labels": case.options["labels"]})


def _run_peer_contrast(call: Call, training: bool, **options: object) -> Tensor:
    return torch.stack(ops.peer_contrast(call.leaves["embeddings"], call.indices["labels"], **options))


def _reference_peer_contrast(call: Call, training: bool) -> Tensor:
    return torch.stack(peer_reference(call.leaves["embeddings"], call.indices["labels"]))


def _peers(images: int, peers: int, features: int, classes: int = 3, scale: int = 1) -> Shape:
    return Shape((images, peers, features), {"classes": classes, "scale": scale})


SAMPLES = {
    "bn_relu_conv2d": Samples(
        _draw_convolution,
        _run_bn_relu_conv2d,
        _reference_bn_relu_conv2d,
        odd={
            "odd": _convolution((3, 5, 7, 9), 6),
            "in groups": _convolution((3, 6, 7, 9), 9, 3, 1, 3),
            "strided": _convolution((3, 7, 9, 6), 5, 3, 2),
            "one row": _convolution((2, 4, 1, 41), 3, 3),
            "one column": _convolution((2, 3, 37, 1), 2, 3, 2),
            "several tiles": _convolution((3, 70, 16, 16), 67),
            "several tiles and taps": _convolution((2, 34, 11, 13), 35, 3),
        },
        usual=(
            (_convolution((2, 108, 32, 32), 48), torch.float32, "nchw"),
            (_convolution((2, 378, 8, 8), 144), torch.bfloat16, "slice"),
            (_convolution((2, 48, 32, 32), 12, 3, 1, 4), torch.bfloat16, "nchw"),
            (_convolution((2, 90, 32, 32), 60, 3, 2), torch.float16, "nchw"),
            (_convolution((2, 64, 28, 28), 64, 3), torch.float32, "channels_last"),
            (_convolution((2, 256, 14, 14), 256, 3), torch.bfloat16, "channels_last"),
        ),
        takes_out=False,
    ),
    "gated_excitation": Samples(
        _draw_gated_excitation,
        _run_gated_excitation,
        _reference_gated_excitation,
        odd={
            "odd": _gated_excitation(5, 7, 9, 11),
            "one row": _gated_excitation(3, 3, 1, 41),
            "one column": _gated_excitation(3, 4, 37, 1),
            "smaller than the dilated kernel": _gated_excitation(3, 3, 2, 2),
            "whole vectors": _gated_excitation(3, 16, 16, 16),
            "more channels than positions": _gated_excitation(4, 130, 3, 3),
            "beyond shared memory": _gated_excitation(2, 33, 61, 59),
        },
        usual=(
            (_gated_excitation(2, 12, 32, 32), torch.float32, "nchw"),
            (_gated_excitation(2, 36, 8, 8), torch.bfloat16, "nchw"),
            (_gated_excitation(2, 128, 14, 14), torch.float16, "channels_last"),
            (_gated_excitation(2, 64, 28, 28), torch.bfloat16, "channels_last"),
            (_gated_excitation(2, 430, 7, 7), torch.float32, "nchw"),
        ),
    ),
    "hybrid_block": Samples(
        _draw_block,
        _run_hybrid_block,
        _reference_hybrid_block,
        odd={
            "odd": _block((3, 5, 7, 9), 2, 4, 4),
            "one position": _block((2, 3, 1, 1), 2, 2, 1),
            "several tiles": _block((2, 19, 10, 35), 1, 5, 1),
            "transition": _block((3, 6, 9, 35), 1, 5, 1, stride=2),
        },
        usual=(
            (_block((2, 24, 32, 32), 3, 12, 4), torch.float32, "nchw"),
            (_block((2, 60, 16, 16), 2, 24, 4), torch.bfloat16, "nchw"),
            (_block((2, 20, 8, 8), 2, 36, 4), torch.float16, "channels_last"),
        ),
        differentiable=False,
        takes_out=False,
    ),
    "masked_conv2d": Samples(
        _draw_masked,
        _run_masked,
        _reference_masked,
        odd={
            "odd": _masked((3, 7, 9, 11), 5),
            "several sub-networks": _masked((5, 9, 6, 7), 8, subnets=3, gated=True),
            "linear": _masked((9, 70, 1, 1), 150, kernel=1, subnets=2, activation=0),
            "stride and dilation": _masked((2, 6, 15, 13), 7, stride=2, dilation=2, activation=2),
            "groups": _masked((3, 36, 7, 5), 48, groups=2, subnets=2, percent=70, gated=True),
            "depthwise": _masked((3, 21, 9, 8), 21, stride=2, groups=21, subnets=2, gated=True),
            "gate without activation": _masked((2, 90, 5, 6), 70, activation=0, gated=True),
            "several tiles": _masked((2, 70, 11, 13), 150, activation=2),
            "mixed, small maps": _masked((17, 20, 4, 4), 18, subnets=3),
        },
        usual=(
            (_masked((2, 64, 32, 32), 64), torch.float32, "nchw"),
            (_masked((2, 128, 28, 28), 128), torch.bfloat16, "nchw"),
            (_masked((2, 256, 14, 14), 512, stride=2, subnets=2), torch.float16, "channels_last"),
            (_masked((2, 96, 14, 14), 96, groups=96, activation=2), torch.bfloat16, "nchw"),
        ),
        takes_out=False,
    ),
    "memory_contrast": Samples(
        _draw_banks,
        _run_memory_contrast,
        _reference_memory_contrast,
        odd=_ODD_BANKS,
        usual=_USUAL_BANKS,
        layouts=("rows", "wider rows"),
        takes_out=False,
        independent_images=False,
    ),
    "memory_update": Samples(
        _draw_banks,
        _run_memory_update,
        _reference_memory_update,
        odd=_ODD_BANKS,
        usual=_USUAL_BANKS,
        layouts=("rows", "wider rows"),
        differentiable=False,
        takes_out=False,
        independent_images=False,
    ),
    "peer_contrast": Samples(
        _draw_peers,
        _run_peer_contrast,
        _reference_peer_contrast,
        odd={
            "odd": _peers(19, 2, 7),
            "one of everything": _peers(1, 1, 1),
            "several tiles": _peers(150, 2, 200),
            "exponentials that need a shift": _peers(70, 2, 33, scale=3),
            "one peer": _peers(140, 1, 20, classes=9),
            "four peers": _peers(75, 4, 130, classes=40),
            "three peers": _peers(33, 3, 20),
        },
        usual=(
            (_peers(64, 2, 128, classes=20), torch.float32, "dense"),
            (_peers(64, 4, 128, classes=20), torch.bfloat16, "dense"),
            (_peers(64, 1, 128, classes=20), torch.float16, "stack transposed"),
        ),
        layouts=("dense", "stack transposed"),
        takes_out=False,
        independent_images=False,
    ),
}
