"""MemoryContrast under DistributedDataParallel, with 2 and 4 gloo processes, against one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from gloo_processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyext.nn import MemoryContrast
from pyext.nn.exchange import gather
from pyext.nn.memory_contrast import banks_in

PEERS, SAMPLES, BATCH, NEGATIVES = 3, 30, 8, 5


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(6, 4) for _ in range(PEERS))
        self.contrast = MemoryContrast(PEERS, 4, 5, num_samples=SAMPLES, relaxed=True)

    def forward(self, x, index, negatives):
        return self.contrast([network(x) for network in self.networks], index, negatives)


def _steps():
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        index = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        index[-1] = index[0]  # on the first and the last process
        yield x, index, torch.randint(SAMPLES, (BATCH, NEGATIVES), generator=generator)


def _train(model, module, rank=0, processes=1):
    """Losses, gradients and banks of three steps of gradient descent on this process's share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    records = []
    for batch in _steps():
        loss = module(*(part[share] for part in batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.contrast.update()
        records.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        records.append([bank.clone() for bank in model.contrast.contrast.banks()])
    return records


def _check_training(rank, processes, model, expected):
    model = copy.deepcopy(model)
    if rank:  # banks begin as the first process's
        for bank in model.contrast.contrast.banks():
            bank.zero_()
    model.contrast.distribute()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, banks_in(model))
    module = DistributedDataParallel(model)
    assert not any("memory" in name for name in module.named_module_buffers)
    found = _train(model, module, rank, processes)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for bank in model.contrast.contrast.banks():
        everyone = [torch.empty_like(bank) for _ in range(processes)]
        dist.all_gather(everyone, bank)
        assert all(torch.equal(other, bank) for other in everyone)


def _check_gather(rank, processes):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(processes, 2, 3 * processes, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (gather(x, dist.group.WORLD, dim=1) * weights[rank]).sum().backward()
    torch.testing.assert_close(x.grad, weights.sum(0)[:, 3 * rank : 3 * rank + 3])


def _message(call, kind):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def _check_errors(rank, processes, model):
    """Each of these would leave processes waiting (the group's time limit) if they did not learn of it."""
    model.contrast.distribute()
    x, index, negatives = next(_steps())
    last = processes - 1
    rows = 3 if rank == last else 2
    message = _message(lambda: model(x[:rows], index[:rows], negatives[:rows]), ValueError)
    assert f"batch size differs between processes: {[2] * last + [3]}" in message
    columns = 4 if rank == 0 else 3
    message = _message(lambda: model(x[:2], index[:2], negatives[:2, :columns]), ValueError)
    assert "number of negatives differs" in message
    for wrong_index, wrong_negatives in ((True, False), (False, True)):
        i, k = index[:2].clone(), negatives[:2].clone()
        if rank == last:
            i[0], k[0, 0] = (SAMPLES if wrong_index else i[0]), (-1 if wrong_negatives else k[0, 0])
            assert "holds" in _message(lambda i=i, k=k: model(x[:2], i, k), IndexError)
        else:
            call = lambda i=i, k=k: model(x[:2], i, k)  # noqa: E731
            assert f"process {last} of the group has an error" in _message(call, RuntimeError)
    model(x[:2], index[:2], negatives[:2])  # and all of them can go on


def _process(rank, processes, model, expected):
    _check_training(rank, processes, model, expected)
    _check_gather(rank, processes)
    _check_errors(rank, processes, copy.deepcopy(model))


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one(processes, tmp_path):
    torch.manual_seed(0)
    model = _Model().double()
    single = copy.deepcopy(model)
    expected = _train(single, single)
    run(_process, processes, tmp_path, model, expected)


def test_a_checkpoint_with_banks_of_another_size_is_refused():
    other = MemoryContrast(2, 4, 5, num_samples=SAMPLES + 1, relaxed=True).state_dict()
    with pytest.raises(RuntimeError, match=r"contrast\.memory_v0"):
        MemoryContrast(2, 4, 5, num_samples=SAMPLES, relaxed=True).load_state_dict(other)
