"""What several processes hold put together, with the right gradient and without a process left waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")


def together(
    group: dist.ProcessGroup,
    device: torch.device,
    make: Callable[[], Made],
    names: Sequence[str],
    facts: Callable[[Made], Sequence[int]],
) -> Made:
    """`make()`, where it succeeds on every process and the `facts` of what it made, called `names`, are the same.

    Raises what `make` raised, and on the other processes what `agree` raises.
    """
    try:
        made = make()
    except Exception as error:
        agree(group, error, dict.fromkeys(names, 0), device)
        raise
    agree(group, None, dict(zip(names, facts(made), strict=True)), device)
    return made


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
    def forward(ctx, x, group, same_loss):
        ctx.group, ctx.batch, ctx.same_loss = group, x.shape[0], same_loss
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.same_loss:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.batch
        return grad[start : start + ctx.batch], None, None


def gather(x: Tensor, group: dist.ProcessGroup, dim: int = 0, *, same_loss: bool = False) -> Tensor:
    """`x` of every process, concatenated over `dim` in the order of ranks; `x` has one shape everywhere (see `agree`).

    The gradient of a process's `x` is the sum over processes of their gradients of its part: the exact gradient of the
    sum of all processes' losses. So where every process computes one and the same loss, DistributedDataParallel's mean
    of the gradients is that loss's gradient.

    `same_loss`: every process computes one and the same loss and nothing averages over processes: the gradient is that
    of this loss, and the backward pass sends nothing.
    """
    return _Gather.apply(x.movedim(dim, 0).contiguous(), group, same_loss).movedim(0, dim)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x`, which is the same on every process; its gradient is the sum over processes of what follows on each."""
    return _SumGradient.apply(x, group)
