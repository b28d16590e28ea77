"""Dissection: the gates of every image, by the critical-data-routing-path method, many images at once.

The gates of different images do not touch each other, so a batch's are one tensor (images, channels of all layers) and
one optimisation: one forward and one backward pass of the frozen network move them all, without weight gradients.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import RandomSampler

from pyext.checkpoint import CheckpointError, atomic_save, load_checkpoint
from pyext.subnet.atlas import UNIT, Atlas, fingerprint
from pyext.subnet.graph import Plan, calls, only_user, plan

LARGEST_GATE = 5.0


@dataclass(frozen=True)
class Settings:
    """How gates are found: see `dissect`."""

    steps: int = 30
    lr: float = 0.1
    momentum: float = 0.9
    sparsity: float = 0.05
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"dissect: steps is {self.steps}, expected 1 or more")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"dissect: patience is {self.patience}, expected None or 1 or more")
        for name, value in (("lr", self.lr), ("sparsity", self.sparsity)):
            if not 0 <= value < float("inf") or (name == "lr" and value == 0):
                raise ValueError(f"dissect: {name} is {value}, expected a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"dissect: momentum is {self.momentum}, expected 0 to 1, 1 excluded")


def dissect(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    steps: int = 30,
    lr: float = 0.1,
    momentum: float = 0.9,
    sparsity: float = 0.05,
    patience: int | None = None,
    shard: tuple[int, int] = (0, 1),
    checkpoint: str | os.PathLike[str] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Atlas:
    """Find which channels each class needs (DRNet, arXiv 1911.08691, by critical data routing paths).

    For every image, gates λ in [0, 5], one per channel of every convolution, start at 1 and are moved by SGD with
    momentum to minimise −Σ p·log p_gated + sparsity·Σ|λ|, where p are the probabilities of the network as it is, in
    eval mode. The image's gates are the iterate of lowest loss whose most probable class is still the network's. A
    gate stands behind the convolution and its batch norm, before the activation; on the output of a residual block,
    behind the addition. An atlas holds each class's sum over its images.

    Args:
        model: a network that `pyext.subnet.graph.plan` can follow, on any device. It is left as it was.
        loader: batches of images (B, C, H, W), in the dtype of the network, and labels int64 (B,). All of one size.
        num_classes: outputs of the network.
        steps: updates of the gates.
        lr, momentum: of SGD.
        sparsity: weight of Σ|λ|.
        patience: an image is finished when its best iterate is so many steps old; None: never before the last step.
        shard: (i, n): batches i, i + n, i + 2n, … alone, for one of n processes; `Atlas.merge` unites them exactly.
        checkpoint: a file that is replaced after every batch. Where it exists, the work goes on after the batches that
            it has: an interruption loses one batch at most. The loader must then give the same batches again.
        report: called after every batch with the batches and the images done so far.

    Raises:
        UnsupportedNetwork: see `plan`.
        CheckpointError: `checkpoint` is damaged, or of another network or other arguments.
        ValueError: batches, labels or numbers other than those above; a loader that shuffles, with `shard` or
            `checkpoint`; no batch at all.
    """
    settings = Settings(steps, lr, momentum, sparsity, patience)
    index, shards = shard
    if not 0 <= index < shards:
        raise ValueError(f"dissect: shard is {shard}, expected (i, n) with 0 <= i < n")
    if (checkpoint is not None or shards > 1) and isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError("dissect: loader shuffles, so a checkpoint or a shard would not know which images it has seen")
    work = _Work(model, num_classes, settings, shard, None if checkpoint is None else Path(checkpoint))
    for number, (images, labels) in enumerate(loader):
        _check_batch(images, labels, num_classes)
        if number % shards != index:
            continue
        if work.take(images, labels) and report is not None:
            report(work.done, int(work.counts.sum()))
    return work.atlas()


def _check_batch(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"dissect: loader gives images {tuple(images.shape)} {images.dtype}, expected (B, C, H, W) floats"
        )
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise ValueError(f"dissect: loader gives labels {tuple(labels.shape)} {labels.dtype}, expected int64 (B,)")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"dissect: a label is outside 0 to {num_classes - 1}")


class _Work:
    """The sums so far, on the disk after every batch where there is a checkpoint."""

    def __init__(
        self, model: nn.Module, num_classes: int, settings: Settings, shard: tuple[int, int], path: Path | None
    ):
        self.model, self.num_classes, self.settings, self.shard, self.path = model, num_classes, settings, shard, path
        self.fingerprint = fingerprint(model)
        self.plan: Plan | None = None
        self.gated: Gated | None = None
        self.sums: dict[str, Tensor] = {}
        self.counts = torch.zeros(num_classes, dtype=torch.int64)
        self.input_shape: tuple[int, ...] = ()
        self.done = self.already = 0
        if path is not None and path.exists():
            self._restore(path)

    def _restore(self, path: Path) -> None:
        entries = load_checkpoint(path)
        found = Atlas.from_entries(entries, str(path))
        own = {"fingerprint": self.fingerprint, "settings": asdict(self.settings)}
        for name, value in own.items():
            if getattr(found, name) != value:
                raise CheckpointError(f"{path} was begun with another {name}: remove it to begin anew")
        if entries.get("shard") != list(self.shard):
            raise CheckpointError(f"{path} was begun for shard {entries.get('shard')}, not {list(self.shard)}")
        self.sums, self.counts, self.input_shape = found.sums, found.counts, found.input_shape
        self.already = int(entries["batches"])

    def take(self, images: Tensor, labels: Tensor) -> bool:
        """Add a batch; False where the checkpoint has it already."""
        if self.already > 0:
            self.already -= 1
            self.done += 1
            return False
        if self.gated is None:
            self._prepare(tuple(images.shape[1:]))
        assert self.gated is not None
        if tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(f"dissect: loader gives images of {tuple(images.shape[1:])} after {self.input_shape}")
        gates = find_gates(self.gated, images.to(self.gated.like), self.settings)
        for layer, values in self.gated.split(gates).items():
            self.sums[layer].index_add_(0, labels.cpu(), (values.double() / UNIT).round().long().cpu())
        self.counts += torch.bincount(labels.cpu(), minlength=self.num_classes)
        self.done += 1
        if self.path is not None:
            atomic_save(self.path, {**self.atlas().to_entries(), "batches": self.done, "shard": list(self.shard)})
        return True

    def _prepare(self, input_shape: tuple[int, ...]) -> None:
        if self.input_shape not in ((), input_shape):
            raise CheckpointError(f"{self.path} was begun with images of {self.input_shape}, not {input_shape}")
        self.plan, self.input_shape = plan(self.model, input_shape), input_shape
        if len(self.plan.classes) != self.num_classes:
            outputs = len(self.plan.classes)
            raise ValueError(f"dissect: num_classes is {self.num_classes}, but the network has {outputs} outputs")
        self.gated = Gated(self.plan)
        for layer, width in self.gated.widths.items():
            self.sums.setdefault(layer, torch.zeros(self.num_classes, width, dtype=torch.int64))

    def atlas(self) -> Atlas:
        """The atlas of what has been done."""
        if not self.sums:
            raise ValueError("dissect: loader has no batch for this shard")
        return Atlas(self.sums, self.counts, self.fingerprint, self.input_shape, asdict(self.settings))


class Gated(fx.Interpreter):
    """A frozen copy of a network, batch norms folded into convolutions, whose channels are multiplied by gates.

    Gates are not negative, so relu(λ·x) is λ·relu(x), and so it is with max-pooling behind it: the product is taken
    where the maps are smallest. Its derivative differs at λ = 0 alone, where that of relu(λ·x) is 0 (`gradient`).
    """

    def __init__(self, traced: Plan):
        module = copy.deepcopy(traced.module).eval().requires_grad_(False)
        _fold(module)
        super().__init__(module)
        self.widths = {layer: len(traced.groups_of(layer)) for layer in traced.gates}
        self.like = next(module.parameters())
        self.gates: dict[str, Tensor] = {}
        self.layer_of: dict[str, str] = {}
        nodes, behind = {node.name: node for node in module.graph.nodes}, []
        for layer, gate in traced.gates.items():
            node = _last_activation(module, nodes[gate])
            self.layer_of[node.name] = layer
            behind += [node.name != gate] * self.widths[layer]
        self.behind_relu = torch.tensor(behind, device=self.like.device)

    def split(self, gates: Tensor) -> dict[str, Tensor]:
        """By layer, (B, C), from the gates of all layers (B, sum of C)."""
        return dict(zip(self.widths, gates.split(list(self.widths.values()), dim=1), strict=True))

    def logits(self, images: Tensor, gates: Tensor) -> Tensor:
        """(B, num_classes), from images and their gates of all layers (B, sum of C)."""
        self.gates = self.split(gates)
        return self.run(images)

    def gradient(self, loss: Tensor, gates: Tensor) -> Tensor:
        """The derivative of `loss` by the `gates` of all layers that it was computed with."""
        (found,) = torch.autograd.grad(loss, gates)
        return found.masked_fill_(self.behind_relu & (gates == 0), 0)

    def run_node(self, n: fx.Node) -> Any:
        """The value of `n`, times its gates where it has some."""
        value = super().run_node(n)
        layer = self.layer_of.get(n.name)
        if layer is None:
            return value
        gates = self.gates[layer]
        return value * gates.view(*gates.shape, *[1] * (value.dim() - 2))


def _last_activation(module: fx.GraphModule, gate: fx.Node) -> fx.Node:
    """The ReLU that alone reads `gate`, or the last of the max-pools behind it; `gate` itself where there is none."""
    node = only_user(gate)
    if node is None or not calls(module, node, nn.ReLU, "relu"):
        return gate
    while (user := only_user(node)) is not None and calls(module, user, nn.MaxPool2d, "max_pool2d"):
        node = user
    return node


@torch.no_grad()
def _fold(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = (module.get_submodule(str(n.target)) for n in (source, node))
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            module.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm).requires_grad_(False))
            module.set_submodule(str(node.target), nn.Identity())


def find_gates(gated: Gated, images: Tensor, settings: Settings) -> Tensor:
    """The best gates of each of `images` (B, C, H, W): (B, channels of all layers)."""
    images = images.contiguous(memory_format=torch.channels_last)
    state = _State(gated, images)
    for step in range(settings.steps + 1):
        active = state.active
        gates = state.gates[active].requires_grad_(True)
        with torch.set_grad_enabled(step < settings.steps):
            logits = gated.logits(images if len(active) == len(images) else images[active], gates)
            loss = state.distance(logits)
        state.note(logits.detach(), loss.detach() + settings.sparsity * gates.detach().sum(1), step)
        if step == settings.steps:
            break
        state.move(gated.gradient(loss.sum(), gates) + settings.sparsity * gates.detach().sign(), settings)
        state.finish(step, settings.patience)
        if not len(state.active):
            break
    return state.best


class _State:
    """Gates of a batch, their velocities, and each image's best iterate; `active` are the images not finished."""

    def __init__(self, gated: Gated, images: Tensor):
        count, channels = len(images), sum(gated.widths.values())
        self.gates = images.new_ones(count, channels)
        self.velocity = torch.zeros_like(self.gates)
        self.best = self.gates.clone()
        self.lowest = images.new_full((count,), float("inf"))
        self.found = torch.zeros(count, dtype=torch.int64, device=images.device)
        self.active = torch.arange(count, device=images.device)
        self.target: Tensor | None = None

    def distance(self, logits: Tensor) -> Tensor:
        """−Σ p·log p_gated of each active image; p comes from the first call, whose gates are all 1."""
        if self.target is None:
            self.target = logits.detach().softmax(1)
            if not self.target.isfinite().all():
                raise ValueError("dissect: the network's outputs are not finite")
        return -(self.target[self.active] * logits.log_softmax(1)).sum(1)

    def note(self, logits: Tensor, loss: Tensor, step: int) -> None:
        """Remember the iterates that are better than all before and leave the most probable class as it was."""
        assert self.target is not None
        same = logits.argmax(1) == self.target[self.active].argmax(1)
        better = self.active[same & (loss < self.lowest[self.active])]
        self.best[better] = self.gates[better]
        self.lowest[better] = loss[torch.isin(self.active, better)]
        self.found[better] = step

    def move(self, gradient: Tensor, settings: Settings) -> None:
        """One step of SGD with momentum, within [0, 5]."""
        velocity = settings.momentum * self.velocity[self.active] + gradient
        self.velocity[self.active] = velocity
        self.gates[self.active] = (self.gates[self.active] - settings.lr * velocity).clamp(0, LARGEST_GATE)

    def finish(self, step: int, patience: int | None) -> None:
        """Let go of the images whose best iterate is `patience` steps old."""
        if patience is not None:
            self.active = self.active[step - self.found[self.active] < patience]
