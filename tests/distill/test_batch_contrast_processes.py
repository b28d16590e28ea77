"""BatchContrast under DistributedDataParallel, with 2 and 4 gloo processes, against one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from gloo_processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyext.distill import BatchContrast

PEERS, BATCH = 3, 8


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(6, 4) for _ in range(PEERS))
        self.contrast = BatchContrast(PEERS, 4, 5)

    def forward(self, x, labels):
        return self.contrast([network(x) for network in self.networks], labels)


def _batch():
    generator = torch.Generator().manual_seed(3)
    # Classes whose images lie on several processes, and one image without a positive.
    return torch.randn(BATCH, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 3, 0, 1])


def _check(rank, processes, model, expected):
    model.contrast.distribute()
    module = DistributedDataParallel(model)
    x, labels = _batch()
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    loss = module(x[share], labels[share])
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    found = [mean / processes, *(p.grad for p in model.parameters())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    rows = 3 if rank == processes - 1 else 2
    with pytest.raises(ValueError, match="batch size differs between processes"):
        model(x[:rows], labels[:rows])


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one(processes, tmp_path):
    torch.manual_seed(0)
    model = _Model().double()
    single = copy.deepcopy(model)
    loss = single(*_batch())
    loss.backward()
    run(_check, processes, tmp_path, model, [loss.detach(), *(p.grad for p in single.parameters())])
