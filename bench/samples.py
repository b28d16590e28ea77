"""Sample calls of every operator, for what enumerates operators: GPU tests, sanitizers, the resource report.

An operator without an entry in `SAMPLES` fails the tests that enumerate; a new one needs an entry and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers import from_tests
from pyext import ops
from pyext.ops.gated_excitation import PARAMETERS, RUNNING, reference

LAYOUTS = ("nchw", "channels_last", "slice")


@dataclass(frozen=True)
class Shape:
    """Sizes of a sample's input (N, C, H, W) and of what else the operator has."""

    input: tuple[int, int, int, int]
    others: Mapping[str, int]

    def __str__(self) -> str:
        return "x".join(map(str, self.input))


@dataclass(frozen=True)
class Call:
    """The tensors of one call: what gradients are asked of (the input map first), and what training mode moves."""

    leaves: dict[str, Tensor]
    state: dict[str, Tensor]

    def to(self, *to: torch.device | torch.dtype) -> Call:
        """Copies on a device, in a dtype, with the strides that they have where they are dense."""
        return Call(*({k: x.detach().to(*to, copy=True) for k, x in d.items()} for d in (self.leaves, self.state)))


@dataclass(frozen=True)
class Samples:
    """How one operator is called on drawn tensors.

    `draw(shape, dtype, parameter_dtype, layout, seed)` gives a CPU `Call`. `run(call, training, **options)` calls
    the operator with `options` (backend, out) and gives its output; `reference` does so in plain torch. Vectors and
    blocks do not divide the `odd` shapes; the `usual` ones, with dtype and layout, are those of networks.
    """

    draw: Callable[[Shape, torch.dtype, torch.dtype, str, int], Call]
    run: Callable[..., Tensor]
    reference: Callable[[Call, bool], Tensor]
    odd: Mapping[str, Shape]
    usual: tuple[tuple[Shape, torch.dtype, str], ...]


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


SAMPLES = {
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
}
