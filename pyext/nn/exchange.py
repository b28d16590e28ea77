"""Batches of several processes put together, with the right gradient and without a process left waiting."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def agree(group: dist.ProcessGroup, error: Exception | None, facts: Mapping[str, int], device: torch.device) -> None:
    """One small collective, before the large ones: every process learns whether all of them can go on.

    Args:
        group: the processes, all of which call this.
        error: what is wrong here, or None; it is raised here, and the other processes name this one.
        facts: numbers that must be the same everywhere, by name; the same names on every process.
        device: where the group's backend takes its tensors.

    Raises:
        ValueError: `facts` differ; the message lists every process's.
        RuntimeError: another process had an `error`.
    """
    own = torch.tensor([error is not None, *([0] * len(facts) if error else facts.values())], device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    if error is not None:
        raise error
    rows = torch.stack(everyone).tolist()
    failed = [rank for rank, row in enumerate(rows) if row[0]]
    if failed:
        raise RuntimeError(f"process {failed[0]} of the group has an error, which it reports; this one stops with it")
    for column, name in enumerate(facts, start=1):
        values = [row[column] for row in rows]
        if len(set(values)) > 1:
            raise ValueError(f"{name} differs between processes: {values}, in the order of their ranks; expected one")


class _Gather(torch.autograd.Function):
    """Backward is all_reduce and a slice, which every backend has; the embeddings of a batch are small."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.batch = group, x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.batch
        return total[start : start + ctx.batch], None


def gather(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """`x` of every process, concatenated over `dim` in the order of ranks; `x` has one shape everywhere (see `agree`).

    The gradient of a process's `x` is the sum over processes of their gradients of its part: the exact gradient of the
    sum of all processes' losses. So where every process computes one and the same loss, DistributedDataParallel's mean
    of the gradients is that loss's gradient.
    """
    return _Gather.apply(x.movedim(dim, 0).contiguous(), group).movedim(0, dim)
