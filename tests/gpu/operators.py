"""What the GPU tests run on: the device, its backends, and calls of every operator compared with plain torch."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from exactness import assert_as_exact
from torch import Tensor

from bench.samples import SAMPLES, Call, Samples, Shape
from pyext._backend import operators_with

DEVICE = torch.device(os.environ.get("PYEXT_GPU_TESTS_ON", "cuda"))
BACKENDS = ("cuda", "triton") if DEVICE.type == "cuda" else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = {"inference": False, "training": True}

OPERATORS = operators_with("cuda")

each_operator = pytest.mark.parametrize("name", OPERATORS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_mode = pytest.mark.parametrize("training", MODES.values(), ids=MODES)


def each_operator_with(what: str) -> pytest.MarkDecorator:
    """Operators whose samples say that `what`, a field of theirs, applies."""
    return pytest.mark.parametrize("name", [name for name in OPERATORS if getattr(SAMPLES[name], what)])


def draw(
    name: str,
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    shape: Shape | None = None,
    parameter_dtype: torch.dtype | None = None,
) -> Call:
    """A call of operator `name` on the CPU, of its first odd shape and first layout unless others are given."""
    samples = SAMPLES[name]
    chosen = next(iter(samples.odd.values())) if shape is None else shape
    return samples.draw(chosen, dtype, parameter_dtype or dtype, layout or samples.layouts[0], 0)


def on_device(call: Call, differentiable: bool = False) -> Call:
    """Copies on the device under test, of the same strides also where these are those of a slice."""
    leaves = {name: _moved(x).requires_grad_(differentiable) for name, x in call.leaves.items()}
    state, indices = ({name: _moved(x) for name, x in tensors.items()} for tensors in (call.state, call.indices))
    return replace(call, leaves=leaves, state=state, indices=indices)


def _moved(x: Tensor) -> Tensor:
    size = 1 + sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    unwritten = float("nan") if x.is_floating_point() else -1
    memory = torch.full((size,), unwritten, dtype=x.dtype, device=DEVICE)
    return torch.as_strided(memory, x.shape, x.stride()).copy_(x)


def draw_gradient(out: Tensor) -> Tensor:
    """A gradient of the output, with the strides of a transposed tensor where it has so many dimensions."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype).to(DEVICE)
    if out.dim() < 2:
        return values
    return values.transpose(-2, -1).contiguous().transpose(-2, -1)


def results(samples: Samples, call: Call, training: bool, backend: str, gradient: bool) -> dict[str, Tensor]:
    """Output, gradients if they are wanted and there are any, and the state afterwards, on the CPU."""
    gradient = gradient and samples.differentiable
    here = on_device(call, gradient)
    out = samples.run(here, training, backend=backend)
    found = {"out": out.detach()}
    if gradient:
        leaves = list(here.leaves.values())
        found |= zip(here.leaves, torch.autograd.grad(out, leaves, draw_gradient(out)), strict=True)
    if training:
        found |= here.state
    return {key: value.cpu() for key, value in found.items()}


def assert_exact(samples: Samples, call: Call, training: bool, actual: dict[str, Tensor], gradient: bool) -> None:
    """`actual`, as from `results`, is as close to plain torch in float64 as `exactness` asks."""
    gradient = gradient and samples.differentiable

    def evaluate(u: Tensor, parameters: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(gradient) for x in (u, *parameters)]
        moved = [x.clone() for x in state]
        plain = replace(
            call,
            leaves=dict(zip(call.leaves, leaves, strict=True)),
            state=dict(zip(call.state, moved, strict=True)),
        )
        out = samples.reference(plain, training)
        found = [out.detach()]
        if gradient:
            found += torch.autograd.grad(out, leaves, draw_gradient(out).cpu().to(out.dtype))
        return found + moved * training

    u, *parameters = call.leaves.values()
    assert_as_exact(evaluate, u, parameters, list(call.state.values()), actual)
