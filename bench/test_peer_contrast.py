"""peer_contrast: the four in-batch terms of mutual contrastive learning, forward and backward."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Contender, Runner
from bench.roofs import Work
from pyext.ops import peer_contrast
from pyext.ops.peer_contrast import reference

FEATURES = 128
CLASSES = 100
SIZES = ((2, 128), (2, 2048), (4, 2048))
"""Peers and images of a batch."""


def work(peers: int, batch: int, features: int) -> Work:
    """The similarities of all peers' rows are one symmetric matrix: half of it is computed, in the backward pass again,
    and there one product with all of its gradient. Bytes: embeddings read twice and their gradient written."""
    rows = peers * batch
    return Work(4 * 3 * rows * features, 4 * rows * rows * features)


@dataclass(frozen=True)
class Setup:
    """What one case runs on."""

    peers: int
    batch: int

    def draw(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings (peers, batch, features), of length 1, and labels."""
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn((self.peers, self.batch, FEATURES), generator=generator, dtype=torch.float64)
        labels = torch.randint(min(CLASSES, max(2, self.batch // 4)), (self.batch,), generator=generator)
        return F.normalize(embeddings, dim=2).to(dtype), labels

    def build(self, kind: str, dtype: torch.dtype = torch.float32) -> Runner:
        embeddings, labels = self.draw(dtype)
        embeddings.requires_grad_()
        call = peer_contrast if kind == "pyext" else reference
        if kind == "torch.compile":
            call = torch.compile(reference, dynamic=False)

        def run() -> Tensor:
            embeddings.grad = None
            terms = torch.stack(list(call(embeddings, labels)))
            terms.sum().backward()
            return terms.detach()

        return Runner(run, lambda: {"terms": run(), "grad_embeddings": embeddings.grad})

    def truth(self) -> Runner:
        return self.build("eager", torch.float64)


@dataclass(frozen=True)
class OnePeer(Setup):
    """The supervised contrastive loss (arXiv 2004.11362) of one peer's embeddings: `peer_contrast` as a drop-in."""

    peers: int = field(default=1, init=False)

    def build(self, kind: str, dtype: torch.dtype = torch.float32) -> Runner:
        embeddings, labels = self.draw(dtype)
        v = embeddings[0].requires_grad_()
        loss = self._loss(kind)

        def run() -> Tensor:
            v.grad = None
            out = loss(v, labels)
            out.backward()
            return out.detach()

        return Runner(run, lambda: {"loss": run(), "grad_embeddings": v.grad})

    def _loss(self, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        if kind == "pytorch-metric-learning":
            from pytorch_metric_learning.losses import SupConLoss

            return SupConLoss(temperature=0.1)
        if kind == "torch.compile":
            return torch.compile(self._loss("eager"), dynamic=False)
        call = peer_contrast if kind == "pyext" else reference
        return lambda v, labels: call(F.normalize(v)[None], labels).vcl  # as SupConLoss does it


def _case(setup: Setup) -> Case:
    kinds = ("pyext", "eager", "torch.compile")
    return Case(
        f"peer_contrast forward+backward {setup.peers} peers, {setup.batch} images",
        [Contender(kind, functools.partial(setup.build, kind), kind == "pyext") for kind in kinds],
        setup.truth,
        functools.partial(work, setup.peers, setup.batch, FEATURES),
        needs_seconds=60 if setup.batch > 1000 else 0,
    )


def _one_peer_case(setup: OnePeer) -> Case:
    kinds = ["pyext", "eager", "torch.compile"]
    if importlib.util.find_spec("pytorch_metric_learning"):
        kinds.append("pytorch-metric-learning")
    return Case(
        f"peer_contrast as supervised contrastive loss forward+backward {setup.batch} images",
        [Contender(kind, functools.partial(setup.build, kind), kind == "pyext") for kind in kinds],
        setup.truth,
        functools.partial(work, 1, setup.batch, FEATURES),
    )


def cases(device: torch.device) -> list[Case]:
    """Forward with backward on the CPU."""
    if device.type != "cpu":
        return []
    return [_case(Setup(*size)) for size in SIZES] + [_one_peer_case(OnePeer(batch)) for batch in (256, 2048)]


def test_peer_contrast(speed, case, contender):
    speed(case, contender)
