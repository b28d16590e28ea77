"""memory_update: the momentum update of a batch's rows in the memory banks of MCL-OKD."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Contender, Runner
from bench.roofs import Work
from bench.test_memory_contrast import BATCH, FEATURES, PEERS, SAMPLES
from pyext.ops import memory_update
from pyext.ops.memory_update import reference

MOMENTUM = 0.5
Update = Callable[[list[Tensor], Tensor, Tensor], None]


def fused(banks: list[Tensor], embeddings: Tensor, index: Tensor) -> None:
    """The library's operator."""
    memory_update(banks, embeddings, index, momentum=MOMENTUM)


def fused_by_triton(banks: list[Tensor], embeddings: Tensor, index: Tensor) -> None:
    """The library's operator on its other backend for GPUs."""
    memory_update(banks, embeddings, index, momentum=MOMENTUM, backend="triton")


def published(banks: list[Tensor], embeddings: Tensor, index: Tensor) -> None:
    """The published algorithm: rows are gathered, moved, normalised and copied back, bank by bank."""
    for bank, embedding in zip(banks, embeddings, strict=True):
        moved = bank.index_select(0, index) * MOMENTUM + embedding * (1 - MOMENTUM)
        bank.index_copy_(0, index, F.normalize(moved))


def plain(banks: list[Tensor], embeddings: Tensor, index: Tensor) -> None:
    """The operator's definition."""
    reference(banks, embeddings, index, MOMENTUM)


def work() -> Work:
    """Each row and each embedding read once, each row written once; two products, a sum and the norm per element."""
    elements = PEERS * BATCH * FEATURES
    return Work(4 * 3 * elements, 6 * elements)


def _runner(update: Update, device: torch.device, dtype: torch.dtype = torch.float32) -> Runner:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return F.normalize(torch.randn(size, generator=generator), dim=-1).to(device, dtype)

    banks = [normal(SAMPLES, FEATURES) for _ in range(PEERS)]
    embeddings = normal(PEERS, BATCH, FEATURES)
    index = torch.randperm(SAMPLES, generator=generator)[:BATCH].to(device)
    before = [bank[index] for bank in banks]

    def results() -> dict[str, Tensor]:
        for bank, rows in zip(banks, before, strict=True):
            bank[index] = rows
        update(banks, embeddings, index)
        return {"rows": torch.stack([bank[index] for bank in banks])}

    return Runner(lambda: update(banks, embeddings, index), results)


def cases(device: torch.device) -> list[Case]:
    """One batch of the paper's size."""
    contenders = {"pyext": fused, "eager": plain, "eager, published": published}
    if device.type == "cuda":
        contenders["pyext triton"] = fused_by_triton
    return [
        Case(
            f"memory_update B={BATCH} M={PEERS}",
            [
                Contender(name, functools.partial(_runner, update, device), name.startswith("pyext"))
                for name, update in contenders.items()
            ],
            functools.partial(_runner, plain, device, torch.float64),
            work,
        )
    ]


def test_memory_update(speed, case, contender):
    speed(case, contender)
