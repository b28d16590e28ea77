"""In-batch contrast between peers (mutual contrastive learning) as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pyext.ops.peer_contrast import PeerContrastTerms, peer_contrast, stacked


class PeerContrast(nn.Module):
    """The four in-batch terms of mutual contrastive learning; no parameters.

    With one peer, its `vcl` is the supervised contrastive loss, and the module a drop-in for it.

    Args:
        temperature: divides the similarities.
        soft_temperature: divides them further in the softened terms.
        normalize: L2-normalise the embeddings first; False where the caller has done it.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.1, soft_temperature: float = 3.0, *, normalize: bool = True) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("soft_temperature", soft_temperature)):
            if not 0 < value < float("inf"):
                raise ValueError(f"PeerContrast: {name} is {value}, expected more than 0")
        self.temperature = temperature
        self.soft_temperature = soft_temperature
        self.normalize = normalize

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], labels: Tensor, rows: tuple[int, int] | None = None
    ) -> PeerContrastTerms:
        """The terms (vcl, icl, soft_vcl, soft_icl), scalars.

        Args:
            embeddings: M tensors (B, d), or one (M, B, d).
            labels: (B,) int64.
            rows: rows of the batch whose terms are computed (see `pyext.ops.peer_contrast`).
        """
        v = stacked(embeddings)
        if self.normalize:
            v = F.normalize(v, dim=-1)
        return peer_contrast(v, labels, temperature=self.temperature, soft_temperature=self.soft_temperature, rows=rows)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, soft_temperature={self.soft_temperature}, normalize={self.normalize}"
