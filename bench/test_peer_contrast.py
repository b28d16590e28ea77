"""peer_contrast: the four in-batch terms of mutual contrastive learning, forward and backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass

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


def _case(setup: Setup) -> Case:
    kinds = ("pyext", "eager", "torch.compile")
    return Case(
        f"peer_contrast forward+backward {setup.peers} peers, {setup.batch} images",
        [Contender(kind, functools.partial(setup.build, kind), kind == "pyext") for kind in kinds],
        setup.truth,
        functools.partial(work, setup.peers, setup.batch, FEATURES),
        needs_seconds=60 if setup.batch > 1000 else 0,
    )


def cases(device: torch.device) -> list[Case]:
    """Forward with backward on the CPU; there are no kernels for other devices yet."""
    return [_case(Setup(*size)) for size in SIZES] if device.type == "cpu" else []


def test_peer_contrast(speed, case, contender):
    speed(case, contender)
