"""convolution_stem: the stem of HCGNet-B on 224x224 images at inference, at batch 1 and 8."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, from_tests, inference_runner
from bench.roofs import Work
from pyext.ops import convolution_stem
from pyext.ops.convolution_stem import reference

BATCHES = (1, 8)
SIZE, CHANNELS, STRIDE = 224, (3, 32, 32, 64), 2


class Composition(nn.Module):
    """The operator as plain torch composes it; its tensors are parameters, so that torch.compile can freeze them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in tensors])

    def forward(self, x: Tensor) -> Tensor:
        return reference(x, list(self.tensors), STRIDE)


class Whole(nn.Module):
    """The operator."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, x: Tensor) -> Tensor:
        return convolution_stem(x, self.tensors, stride=STRIDE)


def work(batch: int) -> Work:
    """Nine products for each result of the first convolution and 16 for each tile of 2x2 results of the others, which
    is what the operator multiplies (plain convolutions multiply 36); images, weights and result moved once."""
    height = SIZE // STRIDE
    first, *others = (a * b for a, b in itertools.pairwise(CHANNELS))
    operations = 2 * batch * (9 * height**2 * first + 16 * (height // 2) ** 2 * sum(others))
    maps = batch * (CHANNELS[0] * SIZE**2 + CHANNELS[-1] * (height // 2) ** 2)
    return Work(4 * (maps + 9 * (first + sum(others))), operations)


@dataclass(frozen=True)
class Setup:
    """What one case runs."""

    batch: int

    def inputs(self) -> tuple[Tensor, list[Tensor]]:
        inputs = from_tests("ops/stem_inputs.py")
        return inputs.make_stem(inputs.Stem(self.batch, SIZE, SIZE, CHANNELS, STRIDE), torch.float32)

    def build(self, kind: str) -> Runner:
        """A contender by the words of its name: the program, then the memory format."""
        x, tensors = self.inputs()
        subject = Subject(Whole(tensors) if kind == "pyext" else Composition(tensors), [], [])
        if kind.startswith("torch.compile"):
            subject = compiled(subject, training=False)
        layout = FORMATS[" channels_last" if "channels_last" in kind else ""]
        return inference_runner(subject, x.contiguous(memory_format=layout))

    def truth(self) -> Runner:
        x, tensors = self.inputs()
        return inference_runner(Subject(Composition(tensors).double(), [], []), x.double())


def _case(setup: Setup) -> Case:
    kinds = ["pyext", *(program + suffix for program in ("eager", "torch.compile") for suffix in FORMATS)]
    return Case(
        f"convolution_stem inference {setup.batch}x{CHANNELS[0]}x{SIZE}x{SIZE}",
        [Contender(kind, functools.partial(setup.build, kind), kind == "pyext") for kind in kinds],
        setup.truth,
        functools.partial(work, setup.batch),
        needs_seconds=30,  # most of it torch.compile's
    )


def cases(device: torch.device) -> list[Case]:
    """On the CPU, which alone has a kernel."""
    return [_case(Setup(batch)) for batch in BATCHES] if device.type == "cpu" else []


def test_convolution_stem(speed, case, contender):
    speed(case, contender)
