"""Contrast between peers over memory banks (MCL-OKD, arXiv 2006.04093), with the published checkpoints' names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pyext.nn.exchange import gather, together
from pyext.ops.memory_contrast import memory_contrast
from pyext.ops.memory_update import memory_update
from pyext.ops.sample_negatives import ClassTable, class_table, draw_negatives


class EmbeddingHead(nn.Module):
    """A peer's features (B, in_features) to its embedding (B, embedding_dim) of length 1."""

    def __init__(self, in_features: int, embedding_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x), dim=1)


class _Memory(nn.Module):
    """The banks, one buffer per peer, and a record of the settings as published checkpoints keep it."""

    def __init__(self, num_peers: int, num_samples: int, embedding_dim: int, settings: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("params", torch.tensor(settings))
        bound = math.sqrt(3 / embedding_dim)
        for i in range(num_peers):
            self.register_buffer(f"memory_v{i}", torch.empty(num_samples, embedding_dim).uniform_(-bound, bound))

    def banks(self) -> list[Tensor]:
        return [bank for name, bank in self.named_buffers() if name != "params"]


_FACTS = ("MemoryContrast: batch size", "MemoryContrast: 1 + number of negatives")


def banks_in(module: nn.Module) -> list[str]:
    """Names of all memory banks in `module`: buffers that every process keeps equal by itself (`distribute`)."""
    return [
        f"{name}.contrast.{bank}" if name else f"contrast.{bank}"
        for name, part in module.named_modules()
        if isinstance(part, MemoryContrast)
        for bank, _ in part.contrast.named_buffers()
        if bank != "params"
    ]


def _finish_update(module: MemoryContrast, *_: object) -> None:
    module.update()


class MemoryContrast(nn.Module):
    """Loss that pulls each peer's embedding of an image towards the other peers' memories of it.

    In training mode a forward pass remembers the batch, and its rows of the banks move at the start of the next
    training forward pass, or when `update()` or `state_dict()` is called: after the backward pass, which reads the
    banks again. Calling one of them between forward and backward makes torch refuse the backward pass.

    Args:
        num_peers: M, at least 2.
        in_features: width of every peer's pooled features.
        embedding_dim: width of the embeddings.
        num_samples: rows of every bank: the images of the training set.
        num_negatives: K, drawn for each image where forward is not given any.
        temperature: T.
        momentum: weight of a row's old value in its update.
        labels: (num_samples,) int64, for drawing negatives of other classes; may be given later (`set_labels`).
        relaxed: draw any row as a negative, without labels.

    State dict: ``embed_list.{i}.linear.weight`` and ``.bias``, ``contrast.params`` (num_negatives, temperature, -1, -1,
    momentum: a record, the constructor's values rule), ``contrast.memory_v{i}``. Labels are not part of it.

    Raises:
        ValueError: one peer, temperature that is not positive, momentum outside of 0 to 1, counts below 1.
    """

    def __init__(
        self,
        num_peers: int,
        in_features: int,
        embedding_dim: int = 128,
        *,
        num_samples: int,
        num_negatives: int = 16384,
        temperature: float = 0.1,
        momentum: float = 0.5,
        labels: Tensor | None = None,
        relaxed: bool = False,
    ) -> None:
        super().__init__()
        if num_peers < 2:
            raise ValueError(f"MemoryContrast: num_peers is {num_peers}, expected at least 2 to contrast")
        if not temperature > 0:
            raise ValueError(f"MemoryContrast: temperature is {temperature}, expected more than 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"MemoryContrast: momentum is {momentum}, expected 0 to 1")
        for name, count in (("num_samples", num_samples), ("num_negatives", num_negatives)):
            if count < 1:
                raise ValueError(f"MemoryContrast: {name} is {count}, expected at least 1")
        self.in_features, self.num_samples, self.num_negatives = in_features, num_samples, num_negatives
        self.temperature, self.momentum, self.relaxed = temperature, momentum, relaxed
        self.embed_list = nn.ModuleList(EmbeddingHead(in_features, embedding_dim) for _ in range(num_peers))
        settings = (num_negatives, temperature, -1, -1, momentum)
        self.contrast = _Memory(num_peers, num_samples, embedding_dim, settings)
        for field in ClassTable._fields:
            self.register_buffer(f"_table_{field}", None, persistent=False)
        self._pending: tuple[Tensor, Tensor] | None = None
        self._group: dist.ProcessGroup | None = None
        self._replicated = False
        if labels is not None:
            self.set_labels(labels)
        self.register_state_dict_pre_hook(_finish_update)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_samples={self.num_samples}, num_negatives={self.num_negatives}, "
            f"temperature={self.temperature}, momentum={self.momentum}, relaxed={self.relaxed}"
        )

    def set_labels(self, labels: Tensor) -> None:
        """Give the class of every row, (num_samples,) int64, from which negatives are drawn."""
        if labels.shape != (self.num_samples,):
            raise ValueError(f"MemoryContrast: labels has shape {tuple(labels.shape)}, expected ({self.num_samples},)")
        for field, value in zip(ClassTable._fields, class_table(labels), strict=True):
            setattr(self, f"_table_{field}", value)

    def distribute(self, group: dist.ProcessGroup | None = None) -> None:
        """Contrast over the batches of all processes of `group` (None: the default one) from now on; call it on all.

        Banks are replicated, and the first forward pass makes them the first process's. A forward pass is a collective
        then: it gathers embeddings and indices, every process computes the one loss of the whole batch, because the
        normaliser Z is a mean over all of it, and the same rows move on every process in the order of ranks: banks stay
        bit-equal without being sent. The gradient is right under DistributedDataParallel, which averages;
        `banks_in` names the buffers that it should leave alone. Each process does the work of the whole batch.

        Every process holds all banks, num_peers · num_samples · embedding_dim numbers. They are not divided: an image's
        negatives lie anywhere, so a process that held some rows would know a part of each image's scores, and
        `memory_contrast` has no form in which the sums for Z, and then those of the loss, are put together in between.
        """
        self._group, self._replicated = dist.group.WORLD if group is None else group, False

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, num_negatives) rows for the images `index`: of other classes, or any where `relaxed`."""
        if self.relaxed:
            return draw_negatives(None, self.num_samples, index, self.num_negatives, generator)
        table = [getattr(self, f"_table_{field}") for field in ClassTable._fields]
        if any(part is None for part in table):
            raise ValueError(
                "MemoryContrast: negatives of other classes need labels: give labels= or set_labels(), pass negatives "
                "to forward, or draw any row (relaxed=True)"
            )
        return draw_negatives(ClassTable(*table), self.num_samples, index, self.num_negatives, generator)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """(num_peers, B, embedding_dim), normalised, from every peer's (B, in_features)."""
        if len(features) != len(self.embed_list):
            raise ValueError(f"MemoryContrast: features of {len(features)} peers, expected {len(self.embed_list)}")
        for i, x in enumerate(features):
            expected = (len(features[0]), self.in_features)
            if x.shape != expected:
                raise ValueError(f"MemoryContrast: features[{i}] has shape {tuple(x.shape)}, expected {expected}")
        return torch.stack([head(x) for head, x in zip(self.embed_list, features, strict=True)])

    def forward(self, features: Sequence[Tensor], index: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of a batch, a scalar.

        Args:
            features: for every peer (B, in_features).
            index: (B,) int64, the images' rows in the banks.
            negatives: (B, K) int64, rows to contrast with, any K; None draws them.

        Raises:
            ValueError, TypeError, IndexError: naming the argument.
            RuntimeError: another process of the group (see `distribute`) raised one of these.
        """
        if self.training:
            self.update()
        embeddings, indices = self._gathered(features, index, negatives)
        loss = memory_contrast(embeddings, self.contrast.banks(), indices, temperature=self.temperature)
        if self.training:
            self._pending = (embeddings.detach(), indices[:, 0].contiguous())
        return loss

    def _gathered(self, features: Sequence[Tensor], index: Tensor, negatives: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings and indices of the batch, that of all processes where there are several."""
        if self._group is None:
            return self._own(features, index, negatives)
        # Whatever is wrong on one process, the others are told before they wait for it.
        embeddings, indices = together(
            self._group,
            self.contrast.banks()[0].device,
            lambda: self._own(features, index, negatives),
            _FACTS,
            lambda own: own[1].shape,
        )
        if not self._replicated:
            for bank in self.contrast.banks():
                dist.broadcast(bank, group=self._group, group_src=0)
            self._replicated = True
        return gather(embeddings, self._group, dim=1), gather(indices, self._group)

    def _own(self, features: Sequence[Tensor], index: Tensor, negatives: Tensor | None) -> tuple[Tensor, Tensor]:
        embeddings = self.embed(features)
        self._check_index(index, embeddings.shape[1])
        negatives = self.draw(index) if negatives is None else negatives
        indices = torch.cat([index.unsqueeze(1), negatives], dim=1)
        if self._group is not None:
            self._check_rows("negatives", indices)
        return embeddings, indices

    def update(self) -> None:
        """Move the rows of the last training batch now, if they have not moved yet."""
        if self._pending is not None:
            (embeddings, index), self._pending = self._pending, None
            memory_update(self.contrast.banks(), embeddings, index, momentum=self.momentum)

    def _check_index(self, index: Tensor, batch: int) -> None:
        if index.shape != (batch,) or index.dtype != torch.int64:
            raise ValueError(f"MemoryContrast: index is {tuple(index.shape)} {index.dtype}, expected ({batch},) int64")
        self._check_rows("index", index)

    def _check_rows(self, name: str, index: Tensor) -> None:
        if torch.compiler.is_compiling() or index.device.type != "cpu" or index.numel() == 0:
            return
        least, largest = (int(x) for x in index.aminmax())
        if least < 0 or largest >= self.num_samples:
            wrong = least if least < 0 else largest
            raise IndexError(
                f"MemoryContrast: {name} holds {wrong}, expected 0 to num_samples - 1 = {self.num_samples - 1}"
            )
