"""Inputs of `gated_excitation` for tests: drawn afresh from a seed, distributed like those of a trained module."""

from __future__ import annotations

import torch
from layouts import in_layout
from torch import Tensor

from pyext.ops.gated_excitation import PARAMETERS, RUNNING, parameter_shapes


def draw_parameter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A parameter called `name`, in float64."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    stem, kind = name.rsplit(".", 1)
    if kind == "bias":
        return 0.3 * x
    if stem.endswith("norm") or stem.startswith("bn_"):
        return 1 + 0.2 * x
    fan_in = max(1, x[0].numel())
    # Position logits of a spread of about 2: a softmax that is neither flat nor a single position.
    return x * ((4 if stem.startswith("global_") else 1) / fan_in) ** 0.5


def draw_statistic(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A running statistic called `name`, in float64."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (0.3 * x).exp() if name.endswith("var") else 0.3 * x


def make_inputs(
    n: int,
    c: int,
    h: int,
    w: int,
    *,
    forget: int,
    attention: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None = None,
    layout: str = "nchw",
    seed: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """u in `dtype` and `layout` (a name in layouts.LAYOUTS), parameters, and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn((n, c, h, w), generator=generator, dtype=torch.float64) + 0.2
    shapes = parameter_shapes(c, forget, attention)
    parameters = [draw_parameter(name, shapes[name], generator) for name in PARAMETERS]
    running = [draw_statistic(name, shapes[name.rsplit(".", 1)[0] + ".weight"], generator) for name in RUNNING]
    kind = parameter_dtype or dtype
    return in_layout(u.to(dtype), layout), [p.to(kind) for p in parameters], [r.to(kind) for r in running]
