"""Contrast between peers within the batch, in place of memory banks (mutual contrastive learning)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyext.nn import PeerContrast
from pyext.nn.exchange import gather, together
from pyext.nn.memory_contrast import EmbeddingHead

WEIGHTS = (0.1, 0.1, 1.0, 1.0)
"""The published weights of vcl, icl, soft_vcl and soft_icl."""

_FACTS = ("BatchContrast: batch size", "BatchContrast: embedding_dim")


class BatchContrast(nn.Module):
    """Weighted sum of the four terms of `pyext.nn.PeerContrast` over each peer's linear, normalised embedding.

    Args:
        num_peers: M.
        in_features: width of every peer's pooled features.
        embedding_dim: width of the embeddings.
        temperature: of the similarities.
        weights: of vcl, icl, soft_vcl and soft_icl.

    State dict: ``embed_list.{i}.linear.weight`` and ``.bias``, as `pyext.nn.MemoryContrast` names them.
    """

    def __init__(
        self,
        num_peers: int,
        in_features: int,
        embedding_dim: int = 128,
        *,
        temperature: float = 0.1,
        weights: Sequence[float] = WEIGHTS,
    ) -> None:
        super().__init__()
        self.embed_list = nn.ModuleList(EmbeddingHead(in_features, embedding_dim) for _ in range(num_peers))
        self.terms = PeerContrast(temperature, normalize=False)
        self.weights = tuple(weights)
        self._group: dist.ProcessGroup | None = None

    def extra_repr(self) -> str:
        return f"weights={self.weights}"

    def distribute(self, group: dist.ProcessGroup | None = None) -> None:
        """Contrast the batches of all processes of `group` (None: the default one) from now on; call it on all.

        A forward pass is a collective then, embeddings and labels are gathered. Each process computes its own rows
        against all images, and what it returns is its part times the number of processes: their mean is the loss of the
        whole batch, and its gradient is what DistributedDataParallel's mean makes of theirs.
        """
        self._group = dist.group.WORLD if group is None else group

    def forward(self, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Loss of a batch, a scalar, from every peer's (B, in_features) and (B,) int64."""
        if self._group is None:
            return self._weighted(self._embed(features), labels, None)
        embeddings = together(
            self._group, labels.device, lambda: self._embed(features), _FACTS, lambda made: made.shape[1:]
        )
        processes, rank, batch = dist.get_world_size(self._group), dist.get_rank(self._group), len(labels)
        whole = gather(embeddings, self._group, dim=1), gather(labels, self._group)
        return processes * self._weighted(*whole, (rank * batch, (rank + 1) * batch))

    def _embed(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(x) for head, x in zip(self.embed_list, features, strict=True)])

    def _weighted(self, embeddings: Tensor, labels: Tensor, rows: tuple[int, int] | None) -> Tensor:
        terms = self.terms(embeddings, labels, rows)
        return torch.stack([weight * term for weight, term in zip(self.weights, terms, strict=True)]).sum()
