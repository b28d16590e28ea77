"""memory_contrast: forward with backward at the sizes of MCL-OKD on CIFAR-100 (four peers, batch 64, 50,000 rows)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Contender, Runner
from bench.roofs import Work
from pyext.ops import memory_contrast
from pyext.ops.memory_contrast import EPSILON

PEERS, BATCH, FEATURES, SAMPLES, TEMPERATURE = 4, 64, 128, 50_000, 0.1
NEGATIVES = (256, 4096, 16384)

Contrast = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]


def _noise_contrast(exponential: Tensor, normaliser: Tensor | float) -> Tensor:
    """Loss of exponentials (..., batch, entries), their first column the positives."""
    s = exponential / normaliser
    noise = (exponential.shape[-1] - 1) / SAMPLES
    positive, negatives = s[..., 0], s[..., 1:]
    terms = torch.log(positive / (positive + noise + EPSILON)).sum()
    return -(terms + torch.log(noise / (negatives + noise + EPSILON)).sum()) / exponential.shape[-2]


def _normaliser(exponential: Tensor, dims: tuple[int, ...]) -> Tensor:
    return SAMPLES * exponential.detach().mean(dims, keepdim=True)


def gather_per_pair(embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The published program's way: rows gathered for every ordered pair, the normaliser as a number of the host."""
    batch, entries = indices.shape
    exponentials = []
    for i, bank in enumerate(banks):
        for j, embedding in enumerate(embeddings):
            if i != j:
                rows = bank.index_select(0, indices.view(-1)).view(batch, entries, -1)
                exponentials.append(torch.exp(torch.bmm(rows, embedding.unsqueeze(2)).squeeze(2) / TEMPERATURE))
    return sum(_noise_contrast(e, SAMPLES * e.detach().mean().item()) for e in exponentials)  # type: ignore[return-value]


def gather_per_bank(embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor) -> Tensor:
    """One gather and one batched product for all peers that meet a bank."""
    loss = embeddings.new_zeros(())
    for i, bank in enumerate(banks):
        others = torch.cat([embeddings[:i], embeddings[i + 1 :]])
        exponential = torch.exp(torch.bmm(bank[indices], others.permute(1, 2, 0)) / TEMPERATURE).permute(2, 0, 1)
        loss = loss + _noise_contrast(exponential, _normaliser(exponential, (1, 2)))
    return loss


def product_per_pair(embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor) -> Tensor:
    """One matrix product with the whole bank for every pair, and the scores that are wanted picked from it."""
    loss = embeddings.new_zeros(())
    for i, bank in enumerate(banks):
        for j, embedding in enumerate(embeddings):
            if i != j:
                exponential = torch.exp((embedding @ bank.t()).gather(1, indices) / TEMPERATURE)
                loss = loss + _noise_contrast(exponential, _normaliser(exponential, (0, 1)))
    return loss


def fused(embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The library's operator."""
    return memory_contrast(embeddings, banks, indices, temperature=TEMPERATURE)


def fused_by_triton(embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The library's operator on its other backend for GPUs."""
    return memory_contrast(embeddings, banks, indices, temperature=TEMPERATURE, backend="triton")


def work(negatives: int) -> Work:
    """Every gathered row read once per pass, or, where that is less, every bank once per pass; scores written and read.

    Operations: a multiply-add per feature, pair and entry in each pass.
    """
    entries = BATCH * (negatives + 1)
    rows = PEERS * min(entries, SAMPLES) * FEATURES
    pairs = PEERS * (PEERS - 1)
    return Work(4 * 2 * (rows + pairs * entries), 2 * 2 * pairs * entries * FEATURES)


def _runner(contrast: Contrast, negatives: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Runner:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        drawn = F.normalize(torch.randn(size, generator=generator), dim=-1)
        return drawn.to(device, dtype)

    banks = [normal(SAMPLES, FEATURES) for _ in range(PEERS)]
    embeddings = normal(PEERS, BATCH, FEATURES).requires_grad_()
    indices = torch.randint(0, SAMPLES, (BATCH, negatives + 1), generator=generator).to(device)

    def run() -> Tensor:
        embeddings.grad = None
        loss = contrast(embeddings, banks, indices)
        loss.backward()
        return loss

    def results() -> dict[str, Tensor]:
        loss = run().detach()
        return {"loss": loss, "gradient": embeddings.grad}  # type: ignore[dict-item]

    return Runner(run, results)


def _compiled(contrast: Contrast) -> Contrast:
    # Said here because the compiler's cache would else return code for the threads of an earlier process.
    return torch.compile(contrast, dynamic=False, options={"cpp.threads": torch.get_num_threads()})


def _build(contrast: Contrast, compile_it: bool, negatives: int, device: torch.device) -> Runner:
    return _runner(_compiled(contrast) if compile_it else contrast, negatives, device)


def _case(negatives: int, device: torch.device) -> Case:
    def contender(name: str, contrast: Contrast, compile_it: bool = False) -> Contender:
        ours = contrast in (fused, fused_by_triton)
        return Contender(name, functools.partial(_build, contrast, compile_it, negatives, device), ours)

    contenders = [
        contender("pyext", fused),
        *([contender("pyext triton", fused_by_triton)] if device.type == "cuda" else []),
        contender("eager, gather per pair", gather_per_pair),
        contender("eager, gather per bank", gather_per_bank),
        contender("eager, product per pair", product_per_pair),
        contender("torch.compile, gather per bank", gather_per_bank, True),
        contender("torch.compile, product per pair", product_per_pair, True),
    ]
    return Case(
        f"memory_contrast forward+backward B={BATCH} M={PEERS} K={negatives}",
        contenders,
        functools.partial(_runner, product_per_pair, negatives, device, torch.float64),
        functools.partial(work, negatives),
        plain=("eager, gather per pair",),
        needs_seconds={256: 0, 4096: 60, 16384: 240}[negatives],
    )


def cases(device: torch.device) -> list[Case]:
    """Forward and backward for every number of negatives of the paper, and one between."""
    return [_case(negatives, device) for negatives in NEGATIVES]


def test_memory_contrast(speed, case, contender):
    speed(case, contender)
