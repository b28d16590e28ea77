"""hybrid_block: the blocks of HCGNet-A1 at inference, concatenation included, at batch 1 and 64."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, from_tests, graphed, inference_runner, on_backend
from bench.roofs import Work
from bench.test_gated_excitation import inference_work
from pyext.nn import HybridBlock
from pyext.ops.hybrid_block import TENSORS, Extents, reference

BATCHES = (1, 64)
SHAPES = ((24, 12, 32), (60, 24, 16), (126, 36, 8))
"""Channels of the input, growth rate and height (width) of the three hybrid blocks of HCGNet-A1."""
MODULES = 8


class Composition(nn.Module):
    """The operator as plain torch composes it: the peer in eager mode and under torch.compile.

    The block's tensors are parameters of its own, so that torch.compile can freeze them and no call looks them up.
    """

    def __init__(self, block: HybridBlock) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in block_tensors(block)])
        self.extents = _extents(block)

    def forward(self, x: Tensor) -> Tensor:
        return reference(x, list(self.tensors), self.extents)


def _extents(block: HybridBlock) -> Extents:
    sizes = from_tests("ops/block_inputs.py")
    layer = block.SMG1
    squeeze, attention, forget = layer.conv1_1x1.conv, layer.fcall, layer.fc1
    return sizes.dense(
        len(block), squeeze.out_channels, layer.growth_rate, 4, attention.out_channels, forget.out_channels
    )


def block_tensors(block: HybridBlock) -> list[Tensor]:
    """The operator's tensors of a block, by their state-dict names."""
    return [layer.state_dict()[name] for layer in block for name in TENSORS]


def work(channels: int, growth: int, positions: int, batch: int, element_bytes: int = 4) -> Work:
    """Two convolutions per module and the gates; the input and all weights read once, the result written once."""
    operations, weights = 0, 0
    for module in range(MODULES):
        cell = 4 * growth * (channels + module * growth) + 9 * growth * growth
        weights += cell
        operations += batch * positions * 2 * cell + inference_work(batch, growth, positions).operations
    maps = batch * positions * (2 * channels + MODULES * growth)
    return Work(element_bytes * (maps + weights), operations)


@dataclass(frozen=True)
class Setup:
    """What one case runs: `channels` by `height` by `height` through eight modules that add `growth` channels each,
    all tensors in `dtype`."""

    channels: int
    growth: int
    height: int
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def block(self) -> HybridBlock:
        block = HybridBlock(MODULES, self.channels, 4, self.growth).eval()
        inputs = from_tests("ops/block_inputs.py")
        _, tensors = inputs.make_block(inputs.Block(1, self.channels, 1, 1, _extents(block)), torch.float32)
        names = [f"SMG{m + 1}.{name}" for m in range(MODULES) for name in TENSORS]
        block.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
        return block

    def images(self) -> Tensor:
        shape = (self.batch, self.channels, self.height, self.height)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def build(self, kind: str) -> Runner:
        """A contender by the words of its name: the program, then what is special about it."""
        block = self.block().to(self.device, self.dtype)
        module = block if kind.startswith("pyext") else Composition(block)
        subject = Subject(module.eval(), list(module.parameters()), [])
        if kind.startswith("torch.compile"):
            subject = compiled(subject, training=False)
        if "triton" in kind:
            subject = on_backend(subject, "triton")
        layout = FORMATS[" channels_last" if "channels_last" in kind else ""]
        images = self.images().to(self.device, self.dtype).contiguous(memory_format=layout)
        runner = inference_runner(subject, images)
        return graphed(runner) if "graph" in kind else runner

    def truth(self) -> Runner:
        """Of the values that the contenders are given: rounded to `dtype`, then float64."""
        module = Composition(self.block().to(self.device, self.dtype)).double().eval()
        images = self.images().to(self.device, self.dtype).double()
        return inference_runner(Subject(module, list(module.parameters()), []), images)


def _kinds(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return [program + suffix for program in ("pyext", "eager", "torch.compile") for suffix in FORMATS]
    return ["pyext", "pyext triton", "eager", "eager channels_last", "torch.compile"] + [
        f"{program} graph" for program in ("pyext", "pyext triton", "eager")
    ]


def _case(setup: Setup) -> Case:
    c, height = setup.channels, setup.height
    suffix = "" if setup.dtype == torch.float32 else f" {setup.dtype}".replace("torch.", "")
    return Case(
        f"hybrid_block inference {setup.batch}x{c}x{height}x{height}{suffix}",
        [
            Contender(kind, functools.partial(setup.build, kind), kind.startswith("pyext"))
            for kind in _kinds(setup.device)
        ],
        setup.truth,
        functools.partial(work, c, setup.growth, height * height, setup.batch, setup.dtype.itemsize),
        needs_seconds=30,  # most of it torch.compile's
        dtype=setup.dtype,
    )


def cases(device: torch.device) -> list[Case]:
    """Inference in float32, on a GPU also in bfloat16."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return [_case(Setup(*shape, batch, device, dtype)) for dtype in dtypes for batch in BATCHES for shape in SHAPES]


def test_hybrid_block(speed, case, contender):
    speed(case, contender)
