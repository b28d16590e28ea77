"""Distillation between peers: against the equations in float64, who learns, and wrong input."""

import pytest
import torch

from pyext.nn import EnsembleDistillation, MutualDistillation


def logits(peers=3, batch=5, classes=7):
    generator = torch.Generator().manual_seed(0)
    return [
        (4 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(peers)
    ]


def divergence(target, own, temperature):
    p, q = (target / temperature).softmax(dim=1), (own / temperature).softmax(dim=1)
    return (p * (p.log() - q.log())).sum() / len(p) * temperature**2


@pytest.mark.parametrize("student", [-1, 0])
def test_ensemble_teaches_the_student_alone(student):
    peers = logits()
    loss = EnsembleDistillation(3.0, student)(peers)
    ensemble = torch.stack(peers).mean(dim=0).detach()
    torch.testing.assert_close(loss, divergence(ensemble, peers[student], 3.0), rtol=1e-12, atol=1e-14)
    loss.backward()
    expected = torch.zeros(3, 5, 7, dtype=torch.float64)
    # T² d KL / d logits = T (q - p) per image.
    expected[student] = 3.0 / 5 * ((peers[student] / 3).softmax(dim=1) - (ensemble / 3).softmax(dim=1)).detach()
    found = torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in peers])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_ensemble_teaches_every_peer():
    peers = logits()
    each = [EnsembleDistillation(2.0, i)(peers) for i in range(3)]
    torch.testing.assert_close(EnsembleDistillation(2.0, None)(torch.stack(peers)), sum(each), rtol=1e-12, atol=0)


def test_mutual_learning_averages_over_the_other_peers_and_holds_them_constant():
    peers = logits()
    expected = sum(divergence(peers[j].detach(), peers[i], 1.0) / 2 for i in range(3) for j in range(3) if i != j)
    loss = MutualDistillation()(peers)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(torch.autograd.grad(loss, peers), torch.autograd.grad(expected, peers), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("module", [EnsembleDistillation(student=None), MutualDistillation()])
def test_agreement_and_extreme_logits(module):
    same = torch.randn(4, 6).mul(1e4)
    assert module([same, same]).item() == 0
    assert module(torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]])).isfinite()
    half = [x.detach().bfloat16() for x in logits()]
    assert module(half).dtype == torch.float32
    torch.testing.assert_close(module(half), module([x.float() for x in half]), rtol=0, atol=0)


def test_compiles_without_graph_break():
    peers = torch.stack(logits()).detach()
    for module in (EnsembleDistillation(), MutualDistillation()):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(peers), module(peers), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [EnsembleDistillation, MutualDistillation])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_wrong_temperature(make, temperature):
    with pytest.raises(ValueError, match=r"temperature is .*, expected more than 0"):
        make(temperature)


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 4)], [(2, 3), (3, 3)], [], [(2,), (2,)], [(0, 3), (0, 3)]])
@pytest.mark.parametrize("module", [EnsembleDistillation(), MutualDistillation()])
def test_wrong_logits(module, shapes):
    with pytest.raises(ValueError, match=r"logits have shapes .*, expected the same \(B, C\) for every peer"):
        module([torch.randn(shape) for shape in shapes])


def test_wrong_peers():
    with pytest.raises(ValueError, match="student is 3, and there are 3 peers"):
        EnsembleDistillation(student=3)(logits())
    with pytest.raises(ValueError, match="logits of one peer"):
        MutualDistillation()(logits(peers=1))
