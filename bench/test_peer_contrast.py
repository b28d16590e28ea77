"""peer_contrast: the four in-batch terms of mutual contrastive learning, forward and backward.

No Triton kernel on PyPI computes them, so none is a contender. Inf-CL 1.2.1, the fastest public one for InfoNCE, has
one positive per row and each image among its own negatives, rounds products to TF32 whatever the embeddings are, and
has no softened terms; liger-kernel 0.8.5 has no contrastive loss. With one peer the terms are the supervised
contrastive loss, and pytorch-metric-learning's is a contender where it is installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Callable
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
CPU_SIZES = ((2, 128), (2, 2048), (4, 2048), (1, 256), (1, 2048))
"""Peers and images of a batch."""
GPU_SIZES = tuple(itertools.product((2, 4), (8192, 4096, 1024, 256)))
ONE_PEER = (1, 4096)
TRUTH_ROWS = 512
"""Rows at a time in float64: all at once, four peers of 8,192 images need more memory than a GPU has."""

Contrast = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def work(peers: int, batch: int, features: int, element_size: int = 4) -> Work:
    """The similarities of all peers' rows are one symmetric matrix: half of it is computed, in the backward pass again,
    and there one product with all of its gradient. Bytes: embeddings read twice and their gradient written."""
    rows = peers * batch
    return Work(element_size * 3 * rows * features, 4 * rows * rows * features)


def supervised_contrast(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """One peer's terms by pytorch-metric-learning."""
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    similarity = DotProductSimilarity(normalize_embeddings=False)
    loss = SupConLoss(temperature=0.1, distance=similarity)(embeddings[0], labels)
    return loss, *loss.new_zeros(3)


@dataclass(frozen=True)
class Setup:
    """What one case runs on."""

    peers: int
    batch: int
    device: torch.device
    dtype: torch.dtype

    def draw(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings (peers, batch, features), of length 1, and labels."""
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn((self.peers, self.batch, FEATURES), generator=generator, dtype=torch.float64)
        labels = torch.randint(min(CLASSES, max(2, self.batch // 4)), (self.batch,), generator=generator)
        # Rounded as the contenders' embeddings are, the truth's too.
        embeddings = F.normalize(embeddings, dim=2).to(self.dtype)
        return embeddings.to(self.device, dtype), labels.to(self.device)

    def build(self, contrast: Contrast, autocast: bool = False) -> Runner:
        embeddings, labels = self.draw(self.dtype)
        embeddings.requires_grad_()

        def run() -> Tensor:
            embeddings.grad = None
            with torch.autocast(self.device.type, self.dtype) if autocast else contextlib.nullcontext():
                terms = torch.stack([term.float() for term in contrast(embeddings, labels)])
            terms.sum().backward()
            return terms.detach()

        return Runner(run, lambda: {"terms": run(), "grad_embeddings": embeddings.grad})

    def compiled(self, autocast: bool = False) -> Runner:
        return self.build(torch.compile(reference, dynamic=False), autocast)

    def truth(self) -> Runner:
        embeddings, labels = self.draw(torch.float64)
        embeddings.requires_grad_()

        def run() -> Tensor:
            embeddings.grad = None
            sums = embeddings.new_zeros(4)
            for start in range(0, self.batch, TRUTH_ROWS):
                rows = (start, min(start + TRUTH_ROWS, self.batch))
                terms = torch.stack(list(reference(embeddings, labels, rows=rows)))
                terms.sum().backward()
                sums += terms.detach()
            return sums

        return Runner(run, lambda: {"terms": run(), "grad_embeddings": embeddings.grad})


def _contenders(setup: Setup) -> list[Contender]:
    def contender(name: str, contrast: Contrast, ours: bool = False) -> Contender:
        return Contender(name, functools.partial(setup.build, contrast), ours)

    found = [contender("pyext", peer_contrast, True)]
    if setup.device.type == "cuda":
        found.append(contender("pyext triton", functools.partial(peer_contrast, backend="triton"), True))
    found.append(contender("eager", reference))
    if setup.dtype == torch.float32:
        found.append(Contender("torch.compile", setup.compiled))
    else:  # the definition's products are in float32: peers have the tensor cores too
        found.append(Contender("eager autocast", functools.partial(setup.build, reference, autocast=True)))
        found.append(Contender("torch.compile autocast", functools.partial(setup.compiled, autocast=True)))
    if setup.peers == 1 and importlib.util.find_spec("pytorch_metric_learning"):
        found.append(contender("pytorch-metric-learning", supervised_contrast))
    return found


def _case(setup: Setup) -> Case:
    dtype = "" if setup.device.type == "cpu" else f" {setup.dtype}".replace("torch.", "")
    seconds = 60 if setup.batch > 1000 else 0
    return Case(
        f"peer_contrast forward+backward {setup.peers} peer{'s' * (setup.peers > 1)}, {setup.batch} images{dtype}",
        _contenders(setup),
        setup.truth,
        functools.partial(work, setup.peers, setup.batch, FEATURES, setup.dtype.itemsize),
        needs_seconds=seconds if setup.device.type == "cpu" else 30,  # compiling is most of it
        dtype=setup.dtype,
    )


def cases(device: torch.device) -> list[Case]:
    """Forward with backward: on GPUs in bfloat16 and float32, the large batches first."""
    if device.type == "cpu":
        return [_case(Setup(*size, device, torch.float32)) for size in CPU_SIZES]
    dtypes = (torch.bfloat16, torch.float32)
    return [_case(Setup(*size, device, dtype)) for dtype in dtypes for size in (*GPU_SIZES, ONE_PEER)]


def test_peer_contrast(speed, case, contender):
    speed(case, contender)
