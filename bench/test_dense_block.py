"""dense_block: the blocks of DenseNet-121 on 64x64 images at inference, concatenations included, at batch 1 and 16."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, from_tests, inference_runner
from bench.roofs import Work
from pyext.ops import dense_block, pack_dense_block
from pyext.ops.dense_block import Extents, reference

BATCHES = (1, 16)
SHAPES = ((64, 6, 16), (128, 12, 8), (256, 24, 4), (512, 16, 2))
"""Channels of the input, layers and height (width) of DenseNet-121's blocks; all squeeze to 128 and add 32 channels."""


class Composition(nn.Module):
    """The operator as plain torch composes it; its tensors are parameters, so that torch.compile can freeze them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in tensors])

    def forward(self, x: Tensor) -> Tensor:
        return reference(x, list(self.tensors))


class Packed(nn.Module):
    """The operator with its constants packed once, as modules keep them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors, self.packed = tensors, pack_dense_block(tensors)

    def forward(self, x: Tensor) -> Tensor:
        return dense_block(x, self.tensors, packed=self.packed)


def work(block: Extents, height: int, batch: int) -> Work:
    """The 1x1 convolutions, and 16 products for each tile of 2x2 results of the 3x3 ones, which is what the operator
    multiplies (plain convolutions multiply 36); input, weights and result moved once."""
    operations, weights = 0, 0
    tiles = ((height + 1) // 2) ** 2
    for layer in range(block.layers):
        squeeze = block.squeeze * (block.channels + layer * block.growth)
        weights += squeeze + 9 * block.squeeze * block.growth
        operations += 2 * batch * (height * height * squeeze + 16 * tiles * block.squeeze * block.growth)
    maps = batch * height * height * (2 * block.channels + block.layers * block.growth)
    return Work(4 * (maps + weights), operations)


@dataclass(frozen=True)
class Setup:
    """What one case runs: `channels` by `height` by `height` through `layers` layers."""

    channels: int
    layers: int
    height: int
    batch: int

    def extents(self) -> Extents:
        return Extents(self.channels, self.layers, 128, 32)

    def inputs(self) -> tuple[Tensor, list[Tensor]]:
        inputs = from_tests("ops/dense_inputs.py")
        return inputs.make_dense(inputs.Dense(self.batch, self.height, self.height, self.extents()), torch.float32)

    def build(self, kind: str) -> Runner:
        """A contender by the words of its name: the program, then the memory format."""
        x, tensors = self.inputs()
        module = Packed(tensors) if kind.startswith("pyext") else Composition(tensors)
        subject = Subject(module, [], [])
        if kind.startswith("torch.compile"):
            subject = compiled(subject, training=False)
        layout = FORMATS[" channels_last" if "channels_last" in kind else ""]
        return inference_runner(subject, x.contiguous(memory_format=layout))

    def truth(self) -> Runner:
        x, tensors = self.inputs()
        return inference_runner(Subject(Composition(tensors).double(), [], []), x.double())


def _case(setup: Setup) -> Case:
    c, height = setup.channels, setup.height
    kinds = [program + suffix for program in ("pyext", "eager", "torch.compile") for suffix in FORMATS]
    return Case(
        f"dense_block inference {setup.batch}x{c}x{height}x{height}",
        [Contender(kind, functools.partial(setup.build, kind), kind.startswith("pyext")) for kind in kinds],
        setup.truth,
        functools.partial(work, setup.extents(), height, setup.batch),
        needs_seconds=60,  # most of it torch.compile's
    )


def cases(device: torch.device) -> list[Case]:
    """On the CPU, which alone has a kernel."""
    if device.type != "cpu":
        return []
    return [_case(Setup(*shape, batch)) for batch in BATCHES for shape in SHAPES]


def test_dense_block(speed, case, contender):
    speed(case, contender)
