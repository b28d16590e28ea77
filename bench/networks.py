"""Whole networks: inference and training steps, by pyext's models and by `accelerate` on a plain torch program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.case import Case, Contender, Runner
from bench.peers import (
    BFLOAT16_ENGINES,
    FORMATS,
    INFERENCE_ENGINES,
    Subject,
    autocast,
    compiled,
    inference_runner,
    missing_engines,
    module_subject,
    step_runner,
)
from bench.roofs import Work
from pyext.accelerate import accelerate
from pyext.nn import set_memory

_DISTINCT = 8
_GRADIENT_DISTANCE = 0.2
"""Of a whole network's gradient in float32 from float64: rounding moves ReLUs across zero, each in all repetitions of
an image (measured on A1 with plain torch: 5e-3 in NCHW, 5e-2 in channels_last). In mixed precision plain torch's is
about its own norm away (0.9 on A1, 1.5 on A2), so it says nothing and is no result there: loss and statistics are."""


OURS = ("pyext", "accelerate")


@dataclass(frozen=True)
class Network:
    """A published network: its plain torch program, and pyext's model with the same state dictionary."""

    name: str
    classes: int
    size: int
    program: Callable[[], nn.Module]
    """The published program as torch initialises it."""
    own: Callable[[], nn.Module] | None = None
    ours: tuple[str, ...] = OURS
    """Which of pyext's forms there are."""

    def plain(self) -> nn.Module:
        """The published program with weights that depend on nothing but their names' order."""
        return _fill(self.program())

    def pyext(self) -> nn.Module:
        """pyext's model with the same weights."""
        assert self.own is not None
        model = self.own()
        model.load_state_dict(self.plain().state_dict())
        return model


MODELS: dict[str, Callable[[Network], nn.Module]] = {
    "pyext": Network.pyext,
    "pyext-lean": lambda network: set_memory(network.pyext(), "lean"),
    "accelerate": lambda network: accelerate(network.plain()),
    "eager": Network.plain,
    "torch.compile": Network.plain,
}


def _fill(module: nn.Module) -> nn.Module:
    """Weights and running statistics like those of a trained network: neither vanishing nor exploding maps."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                noise = (0.1 * noise).exp()
            elif value.dim() > 1:
                noise *= 1.5 / math.sqrt(value[0].numel())
            else:
                noise = 0.1 * noise + (name.endswith("weight"))
            value.copy_(noise)
    return module


def work(network: Network, batch: int, training: bool) -> Work:
    """The least that the network must do.

    Operations: those of its convolutions and matrix products (counted by torch on the plain program), in training three
    times: forward, gradient of the maps, gradient of the weights. Bytes: images and parameters read, logits written; in
    training parameters and momenta read and written. Maps could in principle stay in cache, so this is a low floor.
    """
    with torch.device("meta"):
        model = network.program().eval()
        images = torch.empty(batch, 3, network.size, network.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(images)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    moved = images.numel() + logits.numel() + parameters * (4 if training else 1)
    return Work(4 * moved, counter.get_total_flops() * (3 if training else 1))


def _images(network: Network, batch: int) -> tuple[Tensor, Tensor]:
    """Images and labels: `_DISTINCT` different ones, repeated.

    Every output then has its float64 truth, at the cost of that few images: torch's float64 convolutions are slow. In
    training mode the repetition changes neither the batch's means and variances nor the mean loss and its gradient.
    """
    generator = torch.Generator().manual_seed(2)
    distinct = min(batch, _DISTINCT)
    images = torch.randn(distinct, 3, network.size, network.size, generator=generator)
    labels = torch.randint(network.classes, (distinct,), generator=generator)
    return images.repeat(batch // distinct, 1, 1, 1), labels.repeat(batch // distinct)


def _subject(model: nn.Module, network: Network) -> Subject:
    """`model` with its tensors in the published order, which an accelerated one need not share.

    Of the running statistics the means: the unbiased variances of repeated images are not those of the images alone.
    """
    with torch.device("meta"):
        published = network.program()
    means = [name for name, _ in published.named_buffers() if name.endswith("running_mean")]
    return module_subject(model, [name for name, _ in published.named_parameters()], means)


@dataclass(frozen=True)
class Setup:
    """What one case runs: a network in float32 or, by autocast, in mixed precision."""

    network: Network
    batch: int
    training: bool
    device: torch.device
    dtype: torch.dtype = torch.float32

    def build(self, kind: str) -> Runner:
        """A contender by the words of its name: the program, "cast" where the model is cast and not by autocast, then
        the memory format."""
        program, *words = kind.split(" ")
        memory_format = FORMATS[" channels_last" if "channels_last" in words else ""]
        model = MODELS[program](self.network).to(self.device).to(memory_format=memory_format).train(self.training)
        images, labels = _images(self.network, self.batch)
        images = images.to(self.device).contiguous(memory_format=memory_format)
        if "cast" in words:
            subject, images = _subject(model.to(self.dtype), self.network), images.to(self.dtype)
        else:
            subject = autocast(_subject(model, self.network), self.device, self.dtype)
        if program == "torch.compile":
            subject = compiled(subject, self.training)
        return self._runner(subject, images, labels.to(self.device))

    def _runner(self, subject: Subject, images: Tensor, labels: Tensor) -> Runner:
        if self.training:
            return step_runner(subject, images, labels, gradients=self.dtype == torch.float32)
        return inference_runner(subject, images)

    def engine(self, name: str) -> Runner:
        precision = () if self.dtype == torch.float32 else (self.dtype,)
        return INFERENCE_ENGINES[name](self.network.plain().eval(), _images(self.network, self.batch)[0], *precision)

    def truth(self) -> Runner:
        images, labels = (x.to(self.device) for x in _images(self.network, min(self.batch, _DISTINCT)))
        subject = _subject(self.network.plain().to(self.device).double().train(self.training), self.network)
        alone = self._runner(subject, images.double(), labels)
        if self.training:
            return alone
        return Runner(alone.run, lambda: {"out": alone.results()["out"].repeat(self.batch // len(images), 1)})

    def contenders(self, peers: str) -> list[Contender]:
        """pyext's, eager in both memory formats, and those that the words of `peers` name."""
        on_gpu = self.device.type == "cuda"
        ours = list(self.network.ours)
        if self.training and "pyext" in ours and not on_gpu:  # where blocks train as a whole
            ours.append("pyext-lean")
        if on_gpu and "accelerate channels_last" not in ours:  # where pyext leaves the memory format to the caller
            ours.append("accelerate channels_last")
        peer_kinds = ["eager" + suffix for suffix in FORMATS]
        if "compile" in peers:  # in training in its faster memory format; at inference it chooses one itself
            peer_kinds.append("torch.compile channels_last" if self.training else "torch.compile")
        if "cast" in peers:
            peer_kinds += [program + " cast" for program in ("eager", "torch.compile")]
        found = [Contender(kind, functools.partial(self.build, kind), True) for kind in ours]
        found += [Contender(kind, functools.partial(self.build, kind)) for kind in peer_kinds]
        if "engines" in peers and self.device.type == "cpu":
            absent, able = missing_engines(), INFERENCE_ENGINES
            if self.dtype == torch.bfloat16:
                able = {name: able[name] for name in BFLOAT16_ENGINES}
            engines = [name for name in able if name not in absent]
            found += [Contender(name, functools.partial(self.engine, name)) for name in engines]
        return found


def case_of(setup: Setup, peers: str = "", needs_seconds: float = 0, memory: bool = False) -> Case:
    mode = "training step" if setup.training else "inference"
    suffix = "" if setup.dtype == torch.float32 else f", autocast to {setup.dtype}".replace("torch.", "")
    return Case(
        f"{setup.network.name} {mode}, batch {setup.batch}{suffix}",
        setup.contenders(peers),
        setup.truth,
        functools.partial(work, setup.network, setup.batch, setup.training),
        plain=tuple("eager" + layout for layout in FORMATS),
        distances={"grad_parameters": _GRADIENT_DISTANCE},
        needs_seconds=needs_seconds,
        dtype=setup.dtype,
        memory=memory,
    )
