"""Losses by which peers teach each other through their predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EnsembleDistillation(nn.Module):
    """T² KL(softmax(mean of all peers' logits / T) || softmax(student's logits / T)), mean over the batch.

    The distillation loss of MCL-OKD (arXiv 2006.04093): the ensemble teaches one peer, and no gradient flows into the
    ensemble. Computed in float32 at least.

    Args:
        temperature: T.
        student: the peer that learns, counted from the end where negative; None sums the losses of every peer.

    Shape: M tensors (B, C), or one (M, B, C), to a scalar.

    Raises:
        ValueError: temperature that is not positive; logits of different shapes, no peer, no image, or no such student.
    """

    def __init__(self, temperature: float = 3.0, student: int | None = -1) -> None:
        super().__init__()
        self.temperature, self.student = _positive("EnsembleDistillation", temperature), student

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, student={self.student}"

    def forward(self, logits: Sequence[Tensor] | Tensor) -> Tensor:
        peers = _stack("EnsembleDistillation", logits)
        target = peers.detach().mean(dim=0)
        if self.student is not None:
            if not -len(peers) <= self.student < len(peers):
                raise ValueError(f"EnsembleDistillation: student is {self.student}, and there are {len(peers)} peers")
            peers = peers[self.student].unsqueeze(0)
        return _divergence(peers, target, self.temperature).sum()


class MutualDistillation(nn.Module):
    """Σ_i mean over j ≠ i of T² KL(softmax(logits_j / T) || softmax(logits_i / T)), mean over the batch.

    Deep mutual learning (arXiv 1706.00384, equation 9): each peer learns from every other, whose predictions are
    constants to it. There the peers take turns within a step; here all learn from one forward pass. float32 at least.

    Args:
        temperature: T.

    Shape: M tensors (B, C), or one (M, B, C), to a scalar.

    Raises:
        ValueError: temperature that is not positive; logits of different shapes, fewer than two peers, or no image.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _positive("MutualDistillation", temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, logits: Sequence[Tensor] | Tensor) -> Tensor:
        peers = _stack("MutualDistillation", logits)
        if len(peers) < 2:
            raise ValueError("MutualDistillation: logits of one peer, expected two at least")
        targets = peers.detach()
        # A peer's divergence from itself is 0 in value and in gradient, so the sum over all j is the sum over j ≠ i.
        total = torch.stack([_divergence(peers, target, self.temperature).sum() for target in targets]).sum()
        return total / (len(peers) - 1)


def _positive(module: str, temperature: float) -> float:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{module}: temperature is {temperature}, expected more than 0")
    return temperature


def _stack(module: str, logits: Sequence[Tensor] | Tensor) -> Tensor:
    """(M, B, C) in float32 or float64."""
    shapes = sorted({tuple(peer.shape) for peer in logits})
    if len(shapes) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"{module}: logits have shapes {shapes}, expected the same (B, C) for every peer, not empty")
    peers = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
    return peers.to(torch.promote_types(peers.dtype, torch.float32))


def _divergence(peers: Tensor, target: Tensor, temperature: float) -> Tensor:
    """(M,): the divergence of every peer's (M, B, C) from the target's (B, C), in its mean over the batch, times T²."""
    own, other = F.log_softmax(peers / temperature, dim=2), F.log_softmax(target / temperature, dim=1)
    terms = F.kl_div(own, other.expand_as(own), reduction="none", log_target=True)
    return terms.sum(dim=2).mean(dim=1) * temperature**2
