"""Peers spread over 2 and 4 gloo processes against all of them in one."""

from __future__ import annotations

import copy

import pytest
import torch
from gloo_processes import run
from torch import nn

from pyext.distill import BatchContrast, Distillation, peers
from pyext.nn import EnsembleDistillation, MemoryContrast, MutualDistillation

PEERS, SAMPLES, BATCH, CLASSES = 4, 30, 6, 3


def _network():
    stages = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.BatchNorm1d(6)]
    return nn.Sequential(*stages, nn.Linear(6, CLASSES))


def _mcl_okd():
    contrast = MemoryContrast(PEERS, 6, 5, num_samples=SAMPLES, num_negatives=8, relaxed=True)
    return Distillation(peers(_network, PEERS, "1"), EnsembleDistillation(), contrast, 0.5)


def _in_batch():
    return Distillation(peers(_network, PEERS, "1"), EnsembleDistillation(), BatchContrast(PEERS, 6, 5), 1.0)


MODELS = {
    "mcl-okd": _mcl_okd,
    "contrast within the batch": _in_batch,
    "dml, nothing shared": lambda: Distillation(peers(_network, PEERS), MutualDistillation()),
    "independent": lambda: Distillation(peers(_network, PEERS, "2")),
}


def _train(model):
    """After each of three steps: loss and image gradient, gradients by name, parameters and buffers by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    generator, records = torch.Generator().manual_seed(3), []
    for step in range(3):
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64).requires_grad_()
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        index = torch.randint(SAMPLES, (BATCH,), generator=generator)
        torch.manual_seed(step)  # of the negatives
        loss = model(x, labels, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters(remove_duplicate=False)}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        records.append({"loss": loss.detach(), "images.grad": x.grad, **gradients, **state})
    with torch.no_grad():
        return [*records, {"logits": torch.stack(model.eval().peers(x).logits)}]


def _check_training(rank, processes, model, expected):
    model.peers.spread()
    share = PEERS // processes
    assert list(model.peers.own) == list(range(rank * share, (rank + 1) * share))
    found = _train(model)
    for ours, theirs in zip(found, expected, strict=True):
        elsewhere = tuple(f"peers.networks.{i}." for i in range(PEERS) if i not in model.peers.own)
        assert set(ours) == {name for name in theirs if not name.startswith(elsewhere)}
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def _message(call, kind):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def _check_errors(rank, processes):
    """The first two would leave processes waiting (the group's time limit) if they did not learn of it."""
    last = processes - 1
    group = peers(_network, PEERS)
    group.spread()
    message = _message(lambda: group(torch.randn(3 if rank == last else 2, 5)), ValueError)
    assert message.startswith(f"Peers: batch size differs between processes: {[2] * last + [3]}")
    wrong = torch.randn(2, 4 if rank == last else 5)
    message = _message(lambda: group(wrong), RuntimeError)
    assert "shapes cannot be multiplied" in message if rank == last else f"process {last} of the group" in message
    elsewhere = (group.own[-1] + 1) % PEERS
    assert f"peer {elsewhere} is on another process" in _message(lambda: group.deploy(elsewhere), IndexError)
    assert group.deploy(group.own[0] - PEERS) is group.networks[group.own[0]]
    assert group.num_features == 6
    assert "spread already" in _message(group.spread, ValueError)
    message = _message(peers(_network, PEERS + 1).spread, ValueError)
    assert f"{PEERS + 1} peers cannot be spread equally over {processes} processes" in message
    group(torch.randn(2, 5))  # and all of them can go on


def _process(rank, processes, cases):
    for model, expected in cases:
        _check_training(rank, processes, copy.deepcopy(model), expected)
    _check_errors(rank, processes)


@pytest.mark.parametrize("processes", [2, 4])
def test_spread_peers_equal_those_of_one_process(processes, tmp_path):
    cases = []
    for make in MODELS.values():
        torch.manual_seed(0)
        model = make().double()
        cases.append((model, _train(copy.deepcopy(model))))
    run(_process, processes, tmp_path, cases)
