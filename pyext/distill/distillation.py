"""What MCL-OKD trains: peers, the heads and memory banks of their contrast, and the loss over all of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyext.distill.batch_contrast import BatchContrast
from pyext.distill.peers import Peers
from pyext.nn import MemoryContrast


class Distillation(nn.Module):
    """Σ cross-entropy of every peer + distillation between their logits + `contrast_weight` × contrast of features.

    The whole loss is one forward pass, so that DistributedDataParallel sees every parameter that learns.

    Args:
        peers: the networks.
        distillation: from a list of logits to a scalar (`pyext.nn.EnsembleDistillation`, `MutualDistillation`); None:
            none.
        contrast: over the peers' pooled features, by memory banks or within the batch; None: none.
        contrast_weight: weight of the contrast.

    Where the peers are spread over processes (`Peers.spread`), every process holds distillation and contrast whole and
    computes the one loss of all peers: they give the same images, in the same order, and the same negatives. Its
    gradient is complete on every process.

    `selected` is a buffer: the peer to deploy, the last one at first.

    Shape: images (B, ...), labels (B,) int64, index (B,) int64, rows of the banks, to a scalar.
    """

    selected: Tensor

    def __init__(
        self,
        peers: Peers,
        distillation: nn.Module | None = None,
        contrast: MemoryContrast | BatchContrast | None = None,
        contrast_weight: float = 0.025,
    ) -> None:
        super().__init__()
        self.peers, self.distillation, self.contrast = peers, distillation, contrast
        self.contrast_weight = contrast_weight
        self.register_buffer("selected", torch.tensor(len(peers) - 1))

    def extra_repr(self) -> str:
        return f"contrast_weight={self.contrast_weight}"

    def forward(self, images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        outputs = self.peers(images)
        loss = torch.stack([F.cross_entropy(logits, labels) for logits in outputs.logits]).sum()
        if self.distillation is not None:
            loss = loss + self.distillation(outputs.logits)
        if self.contrast is not None:
            target = labels if isinstance(self.contrast, BatchContrast) else index
            loss = loss + self.contrast_weight * self.contrast(outputs.features, target)
        return loss

    def deployed(self) -> nn.Module:
        """The selected peer as an ordinary network."""
        return self.peers.deploy(int(self.selected))
