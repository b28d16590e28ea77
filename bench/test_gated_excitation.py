"""gated_excitation: inference, and forward with backward in training mode, at the sizes of HCGNet-A1."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import (
    FORMATS,
    Subject,
    compiled,
    from_tests,
    gradient_runner,
    graphed,
    inference_runner,
    module_subject,
    on_backend,
)
from bench.roofs import Work
from pyext.nn import GatedExcitation
from pyext.ops.gated_excitation import PARAMETERS, RUNNING, reference

BATCH = 64
SHAPES = ((12, 32), (24, 16), (36, 8))
"""Channels and height (width) of u in the three hybrid blocks of HCGNet-A1."""


class Composition(nn.Module):
    """The operator as plain torch composes it: the peer in eager mode and under torch.compile."""

    def __init__(self, parameters: list[Tensor], running: list[Tensor]) -> None:
        super().__init__()
        for name, value in zip(PARAMETERS, parameters, strict=True):
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value))
        for name, value in zip(RUNNING, running, strict=True):
            self.register_buffer(name.replace(".", "_"), value)

    def forward(self, u: Tensor) -> Tensor:
        parameters, running = tuple(self._parameters.values()), tuple(self._buffers.values())
        return reference(u, parameters, running, self.training, momentum=0.1)


_FORWARD = 2 * 18 + 2 * 3 + 3 * 2 + 3 * 2 + 2
"""Operations per element of u: two depthwise kernels of 9 multiply-adds; normalisation (multiply-add) and ReLU of each;
products of the three maps with their logit weights; their pooled sums; the output f*u + n."""
_SOFTMAX = 3 * 3
"""Per position: difference to the maximum, exponential and sum of three softmaxes."""
_STATISTICS = 3
"""Per element, in training mode: sum and sum of squares of u."""
_BACKWARD = (1 + 2 + 2) + (2 + 4 + 2) + 2 * (2 + 3 + 2 + 18 + 18 + 1 + 3 + 2) + 6
"""Per element, nothing computed twice, G the output's gradient. Gate and residual: sums of G and of G*u, f*G. Forget
pooling: gradients of logits, u and weight. Each branch: gradients of logits, map and logit weight, transposed
depthwise, kernel's gradient, ReLU, sums for the normalisation, its scale. Once: the normalisation's correction."""


def _matrices(c: int) -> int:
    """Operations of the five small matrices for one image: two of the forget gate, three of the update gate."""
    forget, attention = c // 2, c
    return 2 * (2 * forget * c + attention * 2 * c + 2 * c * attention)


def inference_work(n: int, c: int, positions: int, element_bytes: int = 4) -> Work:
    """u read once and the output written once; the operations above."""
    operations = n * (positions * (c * _FORWARD + _SOFTMAX) + _matrices(c))
    return Work(2 * element_bytes * n * c * positions, operations)


def training_work(n: int, c: int, positions: int, element_bytes: int = 4) -> Work:
    """Forward: u read, the output written. Backward: u and the output's gradient read, u's gradient written.

    The batch statistics need all of u before anything else, so where u does not stay in cache, more is moved. The small
    matrices take twice the forward pass's operations in the backward pass.
    """
    forward = inference_work(n, c, positions).operations
    backward = n * (positions * c * (_STATISTICS + _BACKWARD) + 2 * _matrices(c))
    return Work(5 * element_bytes * n * c * positions, forward + backward)


@dataclass(frozen=True)
class Setup:
    """What one case runs on: `channels` by `height` by `height`, u in `dtype`, parameters in float32."""

    channels: int
    height: int
    training: bool
    device: torch.device
    dtype: torch.dtype = torch.float32

    def draw(self) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """u, parameters, running statistics and the gradient of the output, the same every time."""
        make_inputs = from_tests("ops/inputs.py").make_inputs
        sizes = (BATCH, self.channels, self.height, self.height)
        rows = {"forget": self.channels // 2, "attention": self.channels}
        inputs = make_inputs(*sizes, **rows, dtype=self.dtype, parameter_dtype=torch.float32)
        grad_out = torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        return *inputs, grad_out

    def composition(self, dtype: torch.dtype) -> Subject:
        _, parameters, running, _ = self.draw()
        module = Composition([p.to(dtype) for p in parameters], [r.to(dtype) for r in running])
        module.train(self.training).to(self.device)
        return Subject(module, list(module.parameters()), list(module.buffers()))

    def fused(self) -> Subject:
        _, parameters, running, _ = self.draw()
        module = GatedExcitation(self.channels)
        values = zip((*PARAMETERS, *RUNNING), (*parameters, *running), strict=True)
        module.load_state_dict(dict(values), strict=False)
        return module_subject(module.train(self.training).to(self.device), PARAMETERS, RUNNING)

    def runner(self, subject: Subject, dtype: torch.dtype, layout: torch.memory_format) -> Runner:
        u, _, _, grad_out = self.draw()
        u, grad_out = (x.to(self.device, dtype).contiguous(memory_format=layout) for x in (u, grad_out))
        return gradient_runner(subject, u, grad_out) if self.training else inference_runner(subject, u)

    def truth(self) -> Runner:
        return self.runner(self.composition(torch.float64), torch.float64, torch.contiguous_format)


def _build(kind: str, setup: Setup) -> Runner:
    """A contender by the words of its name: the program, then what is special about it."""
    subject = setup.fused() if kind.startswith("pyext") else setup.composition(torch.float32)
    if kind.startswith("torch.compile"):
        subject = compiled(subject, setup.training)
    if "triton" in kind:
        subject = on_backend(subject, "triton")
    layout = FORMATS[" channels_last" if "channels_last" in kind else ""]
    runner = setup.runner(subject, setup.dtype, layout)
    return graphed(runner) if "graph" in kind else runner


def _kinds(setup: Setup) -> list[str]:
    if setup.device.type == "cpu":
        return [program + suffix for program in ("pyext", "eager", "torch.compile") for suffix in FORMATS]
    kinds = ["pyext", "pyext channels_last", "pyext triton", "eager", "eager channels_last", "torch.compile"]
    return kinds + ["pyext graph", "pyext triton graph", "eager graph"] * (not setup.training)


def _case(setup: Setup) -> Case:
    mode, work = ("forward+backward", training_work) if setup.training else ("inference", inference_work)
    suffix = "" if setup.dtype == torch.float32 else f" {setup.dtype}".replace("torch.", "")
    c, height = setup.channels, setup.height
    return Case(
        f"gated_excitation {mode} {BATCH}x{c}x{height}x{height}{suffix}",
        [Contender(kind, functools.partial(_build, kind, setup), kind.startswith("pyext")) for kind in _kinds(setup)],
        setup.truth,
        functools.partial(work, BATCH, c, height * height, setup.dtype.itemsize),
        # On a GPU torch.compile takes most of a case's time.
        needs_seconds=15 if setup.device.type == "cuda" else 0,
        dtype=setup.dtype,
    )


def cases(device: torch.device) -> list[Case]:
    """Inference and forward+backward for every shape; the concatenation that follows is left out for all contenders."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return [
        _case(Setup(c, height, training, device, dtype))
        for dtype in dtypes
        for training in (False, True)
        for c, height in SHAPES
    ]


def test_gated_excitation(speed, case, contender):
    speed(case, contender)
