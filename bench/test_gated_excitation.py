"""gated_excitation: inference, and forward with backward in training mode, at the sizes of HCGNet-A1."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, from_tests, gradient_runner, inference_runner, module_subject
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


def inference_work(n: int, c: int, positions: int) -> Work:
    """u read once and the output written once, in float32; the operations above."""
    operations = n * (positions * (c * _FORWARD + _SOFTMAX) + _matrices(c))
    return Work(2 * 4 * n * c * positions, operations)


def training_work(n: int, c: int, positions: int) -> Work:
    """Forward: u read, the output written. Backward: u and the output's gradient read, u's gradient written.

    The batch statistics need all of u before anything else, so where u does not stay in cache, more is moved. The small
    matrices take twice the forward pass's operations in the backward pass.
    """
    forward = inference_work(n, c, positions).operations
    backward = n * (positions * c * (_STATISTICS + _BACKWARD) + 2 * _matrices(c))
    return Work(5 * 4 * n * c * positions, forward + backward)


class _Inputs:
    """u, the gradient of the output, parameters and running statistics of one shape, drawn once."""

    def __init__(self, c: int, height: int) -> None:
        make_inputs = from_tests("ops/inputs.py").make_inputs
        sizes = {"forget": c // 2, "attention": c}
        self.channels = c
        self.u, self.parameters, self.running = make_inputs(BATCH, c, height, height, dtype=torch.float32, **sizes)
        self.grad_out = torch.randn(self.u.shape, generator=torch.Generator().manual_seed(1))

    def composition(self, dtype: torch.dtype) -> Subject:
        # Copies: training moves the running statistics, and every contender starts from the same ones.
        module = Composition(
            [p.to(dtype, copy=True) for p in self.parameters], [r.to(dtype, copy=True) for r in self.running]
        )
        return Subject(module, list(module.parameters()), list(module.buffers()))

    def fused(self) -> Subject:
        module = GatedExcitation(self.channels)
        values = zip((*PARAMETERS, *RUNNING), (*self.parameters, *self.running), strict=True)
        module.load_state_dict(dict(values), strict=False)
        return module_subject(module, PARAMETERS, RUNNING)


def _runner(subject: Subject, inputs: _Inputs, training: bool, place: Callable[[Tensor], Tensor]) -> Runner:
    if training:
        return gradient_runner(subject, place(inputs.u), place(inputs.grad_out))
    return inference_runner(subject, place(inputs.u))


def _build(kind: str, c: int, height: int, training: bool, device: torch.device, layout: torch.memory_format) -> Runner:
    inputs = _Inputs(c, height)
    subject = inputs.fused() if kind == "pyext" else inputs.composition(torch.float32)
    subject.call.train(training).to(device)
    if kind == "torch.compile":
        subject = compiled(subject, training)
    return _runner(subject, inputs, training, lambda x: x.to(device).contiguous(memory_format=layout))


def _truth(c: int, height: int, training: bool) -> Runner:
    inputs = _Inputs(c, height)
    subject = inputs.composition(torch.float64)
    subject.call.train(training)
    return _runner(subject, inputs, training, lambda x: x.double())


def _case(c: int, height: int, training: bool, device: torch.device) -> Case:
    contenders = [
        Contender(kind + suffix, functools.partial(_build, kind, c, height, training, device, layout), kind == "pyext")
        for kind in ("pyext", "eager", "torch.compile")
        for suffix, layout in FORMATS.items()
    ]
    mode, work = ("forward+backward", training_work) if training else ("inference", inference_work)
    name = f"gated_excitation {mode} {BATCH}x{c}x{height}x{height}"
    return Case(
        name,
        contenders,
        functools.partial(_truth, c, height, training),
        functools.partial(work, BATCH, c, height * height),
    )


def cases(device: torch.device) -> list[Case]:
    """Inference and forward+backward for every shape; the concatenation that follows is left out for all contenders."""
    return [_case(c, height, training, device) for training in (False, True) for c, height in SHAPES]


def test_gated_excitation(speed, case, contender):
    speed(case, contender)
