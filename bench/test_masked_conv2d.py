"""masked_conv2d: layers of VGG-16 for 32x32 images over a quarter of their channels, with batch norm and ReLU, at
inference: against torch's convolution with the kept weights, batch norm folded into them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, graphed, inference_runner, on_backend
from bench.roofs import Work
from pyext.ops import masked_conv2d, pack_masked_conv2d

KEEP = 0.25
LAYERS = ((64, 64, 32), (128, 128, 16), (256, 256, 8), (512, 512, 4), (512, 512, 2))
"""Input and output channels of the whole layer, height and width."""
BATCHES = {"cpu": (1, 64), "cuda": (1, 64, 256)}


@dataclass(frozen=True)
class Setup:
    """A 3x3 convolution of `channels` to `outputs`, of which random ones are kept."""

    channels: int
    outputs: int
    size: int
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def kept(self) -> tuple[Tensor, Tensor]:
        """Of the inputs and of the outputs."""
        generator = torch.Generator().manual_seed(0)
        lists = (torch.randperm(n, generator=generator)[: round(KEEP * n)] for n in (self.channels, self.outputs))
        inputs, outputs = (kept.sort().values.to(self.device) for kept in lists)
        return inputs, outputs

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x, and weight, scale and shift of the whole layer."""
        generator = torch.Generator().manual_seed(1)
        shapes = [(self.batch, len(self.kept()[0]), self.size, self.size), (self.outputs, self.channels, 3, 3)]
        x, weight = (torch.randn(shape, generator=generator) for shape in shapes)
        scale, shift = (torch.rand(self.outputs, generator=generator) for _ in range(2))
        weight /= (9 * KEEP * self.channels) ** 0.5
        rounded = (tensor.to(self.dtype).to(dtype) for tensor in (x, weight, scale, shift))
        return tuple(tensor.to(self.device) for tensor in rounded)

    def ours(self, kind: str) -> Runner:
        """The operator; `kind` may name a backend and a CUDA graph."""
        (inputs, outputs), (x, weight, scale, shift) = self.kept(), self.tensors(self.dtype)
        packed = pack_masked_conv2d(weight, inputs=inputs, outputs=outputs) if self.device.type == "cpu" else None
        fixed = {"inputs": inputs, "outputs": outputs, "scale": scale, "shift": shift, "packed": packed}
        call = functools.partial(masked_conv2d, weight=weight, activation="relu", padding=1, **fixed)
        subject = Subject(call, (), ())
        for backend in ("cuda", "triton"):
            if backend in kind:
                subject = on_backend(subject, backend)
        runner = inference_runner(subject, x)
        return graphed(runner) if "graph" in kind else runner

    def sliced(self, layout: str, compiler: bool = False, dtype: torch.dtype | None = None) -> Runner:
        """torch's convolution with the kept weights."""
        (inputs, outputs), (x, weight, scale, shift) = self.kept(), self.tensors(dtype or self.dtype)
        own = (weight[outputs][:, inputs] * scale[outputs, None, None, None]).contiguous(memory_format=FORMATS[layout])
        bias = shift[outputs]
        subject = Subject(lambda y: F.relu(F.conv2d(y, own, bias, padding=1)), (), ())
        subject = compiled(subject, False) if compiler else subject
        return inference_runner(subject, x.contiguous(memory_format=FORMATS[layout]))

    def truth(self) -> Runner:
        return self.sliced("", dtype=torch.float64)

    def work(self) -> Work:
        """Maps read and written once, kept weights read once; scale, shift and ReLU are 3 operations an element."""
        (inputs, outputs), positions = self.kept(), self.size**2
        weights, results = 9 * len(inputs) * len(outputs), self.batch * len(outputs) * positions
        moved = weights + results + self.batch * len(inputs) * positions
        return Work(self.dtype.itemsize * moved, results * (18 * len(inputs) + 3))


def _case(setup: Setup) -> Case:
    on_gpu = setup.device.type == "cuda"
    kinds = ("pyext cuda", "pyext cuda graph", "pyext triton", "pyext triton graph") if on_gpu else ("pyext",)
    contenders = [Contender(kind, functools.partial(setup.ours, kind), True) for kind in kinds]
    contenders += [Contender(f"sliced eager{name}", functools.partial(setup.sliced, name)) for name in FORMATS]
    contenders.append(Contender("sliced torch.compile", functools.partial(setup.sliced, " channels_last", True)))
    dtype = "" if setup.dtype == torch.float32 else f", {setup.dtype}".replace("torch.", "")
    layer = f"{setup.channels} to {setup.outputs} channels, {KEEP:.0%} kept, {setup.size}x{setup.size}"
    return Case(
        f"masked_conv2d {layer}, batch {setup.batch}{dtype}",
        contenders,
        setup.truth,
        setup.work,
        plain=tuple(f"sliced eager{name}" for name in FORMATS),
        dtype=setup.dtype,
    )


def cases(device: torch.device) -> list[Case]:
    """On a GPU also in bfloat16."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    setups = [Setup(*layer, n, device, dtype) for dtype in dtypes for n in BATCHES[device.type] for layer in LAYERS]
    return [_case(setup) for setup in setups]


def test_masked_conv2d(speed, case, contender):
    speed(case, contender)
