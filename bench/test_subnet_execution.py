"""Sub-networks of VGG-16 for 32x32 images, random channels kept: against the same sub-network as a module of its own,
and batches whose images each run a sub-network of their own against a loop over such modules."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, inference_runner
from bench.roofs import Work
from pyext import models
from pyext.subnet import Atlas, Subnet, fingerprint, plan, reconstruct

CLASSES, SIZE = 10, 32
KEEPS = (0.5, 0.25, 0.11)
"""Of every layer's channels: of the parameters and multiply-adds about the square."""
BATCHES = (1, 64)
TASKS, TASK_KEEP = 16, 0.25


def _network() -> nn.Module:
    """The network with running statistics as training leaves them: maps that neither vanish nor explode."""
    torch.manual_seed(0)
    model = models.vgg16(CLASSES).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


@functools.cache
def whole() -> Subnet:
    """A sub-network that keeps everything, of which the cases are selections."""
    model = _network()
    traced = plan(model, (3, SIZE, SIZE))
    sums = {layer: torch.ones(CLASSES, len(traced.groups_of(layer)), dtype=torch.int64) for layer in traced.gates}
    counts = torch.ones(CLASSES, dtype=torch.int64)
    return reconstruct(model, Atlas(sums, counts, fingerprint(model), (3, SIZE, SIZE), {}), range(CLASSES), keep=1.0)


def random_groups(keep: float, seed: int) -> np.ndarray:
    """Random channels, `keep` of every layer's."""
    random, traced = np.random.default_rng(seed), whole().plan
    groups = traced.fixed.copy()
    for layer in traced.gates:
        own = np.unique(traced.groups_of(layer))
        groups[random.choice(own, max(1, round(keep * len(own))), replace=False)] = True
    return groups


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Setup:
    """One sub-network for all images."""

    keep: float
    batch: int
    device: torch.device

    def subnet(self) -> Subnet:
        """A sub-network object of this case alone."""
        found = Subnet(whole().network, whole().atlas, whole().plan)
        return found.select(range(CLASSES), random_groups(self.keep, 0)).to(self.device).eval()

    def ours(self) -> Runner:
        return inference_runner(Subject(self.subnet(), (), ()), images(self.batch).to(self.device))

    def sliced(self, layout: str, compiler: bool = False) -> Runner:
        memory_format = FORMATS[layout]
        model = self.subnet().materialize().to(memory_format=memory_format)
        subject = Subject(model, (), ())
        x = images(self.batch).to(self.device).contiguous(memory_format=memory_format)
        return inference_runner(compiled(subject, False) if compiler else subject, x)

    def truth(self) -> Runner:
        model = self.subnet().materialize().double()
        return inference_runner(Subject(model, (), ()), images(self.batch).to(self.device).double())

    def work(self) -> Work:
        cost = self.subnet().summary()
        moved = cost.parameters[0] + self.batch * (3 * SIZE * SIZE + CLASSES)
        return Work(4 * moved, 2 * cost.multiply_adds[0] * self.batch)


def _case(keep: float, batch: int, device: torch.device) -> Case:
    setup = Setup(keep, batch, device)
    sliced = {f"sliced eager{layout}": functools.partial(setup.sliced, layout) for layout in FORMATS}
    sliced["sliced torch.compile"] = functools.partial(setup.sliced, " channels_last", True)
    contenders = [Contender("pyext", setup.ours, True), *(Contender(name, build) for name, build in sliced.items())]
    name = f"subnet_execution vgg16, {keep:.0%} of channels, batch {batch}"
    return Case(name, contenders, setup.truth, setup.work, plain=("sliced eager", "sliced eager channels_last"))


class Mixed:
    """64 images over 16 sub-networks."""

    def __init__(self, device: torch.device):
        self.device, self.batch = device, 64
        self.groups = [random_groups(TASK_KEEP, seed) for seed in range(TASKS)]
        self.ids = torch.arange(self.batch) % TASKS

    def ours(self) -> Runner:
        """All in one batch."""
        subnet = Subnet(whole().network, whole().atlas, whole().plan)
        subnet.assign_groups([range(CLASSES)] * TASKS, self.groups).to(self.device).eval()
        ids = self.ids.to(self.device)
        return inference_runner(Subject(lambda x: subnet(x, task=ids), (), ()), images(self.batch).to(self.device))

    def loop(self, layout: str, dtype: torch.dtype = torch.float32) -> Runner:
        """A module for every sub-network, each given its images."""
        subnet = Subnet(whole().network, whole().atlas, whole().plan)
        modules = [subnet.select(range(CLASSES), groups).materialize() for groups in self.groups]
        modules = [m.to(self.device, dtype).to(memory_format=FORMATS[layout]) for m in modules]
        rows = [(self.ids == task).nonzero()[:, 0].to(self.device) for task in range(TASKS)]

        def call(x: Tensor) -> Tensor:
            out = x.new_empty(len(x), CLASSES)
            for module, own in zip(modules, rows, strict=True):
                out[own] = module(x[own])
            return out

        x = images(self.batch).to(self.device, dtype).contiguous(memory_format=FORMATS[layout])
        return inference_runner(Subject(call, (), ()), x)

    def truth(self) -> Runner:
        return self.loop("", torch.float64)

    def work(self) -> Work:
        """Of the sub-networks' weights each is read once."""
        one = Setup(TASK_KEEP, self.batch, self.device).work()
        return Work(one.bytes * TASKS, one.operations)


def _mixed_case(device: torch.device) -> Case:
    mixed = Mixed(device)
    loops = {f"loop over sliced eager{layout}": functools.partial(mixed.loop, layout) for layout in FORMATS}
    contenders = [Contender("pyext", mixed.ours, True), *(Contender(name, build) for name, build in loops.items())]
    name = f"subnet_execution vgg16, {mixed.batch} images over {TASKS} sub-networks of {TASK_KEEP:.0%}"
    return Case(name, contenders, mixed.truth, mixed.work, plain=tuple(loops))


def cases(device: torch.device) -> list[Case]:
    """One sub-network for all images, by batch and channels kept, then a sub-network for each."""
    return [*(_case(keep, batch, device) for batch in BATCHES for keep in KEEPS), _mixed_case(device)]


def test_subnet_execution(speed, case, contender):
    speed(case, contender)
