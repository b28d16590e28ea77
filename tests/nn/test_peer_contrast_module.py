"""`PeerContrast` alone, as a drop-in supervised contrastive loss, and the module's states."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from pyext._backend import backend
from pyext.nn import PeerContrast


def supervised_contrast(v, labels, temperature):
    """Written out: the mean over rows with positives (arXiv 2004.11362, equation 2)."""
    losses = []
    for b in range(len(v)):
        others = [c for c in range(len(v)) if c != b]
        positives = [c for c in others if labels[c] == labels[b]]
        if positives:
            x = F.normalize(v) @ F.normalize(v)[b] / temperature
            losses.append(x[others].logsumexp(0) - x[positives].mean())
    return torch.stack(losses).mean()


def metric_learning(v, labels, temperature):
    """pytorch-metric-learning's."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=temperature)(v, labels)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("other", [supervised_contrast, metric_learning])
def test_one_peer_is_supervised_contrast(other, name):
    v = torch.randn(21, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(21) % 5
    labels[7] = 77  # a row without positives
    expected = other(v, labels, 0.1)
    with backend(name):
        found = PeerContrast(0.1)([v], labels).vcl
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, v)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_state_copies_and_representation():
    module = PeerContrast(0.2, 4.0)
    assert list(module.state_dict()) == []
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == "PeerContrast(temperature=0.2, soft_temperature=4.0, normalize=True)"


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"soft_temperature": float("nan")}])
def test_temperatures_must_be_positive(options):
    with pytest.raises(ValueError, match=f"PeerContrast: {next(iter(options))} is .*, expected more than 0"):
        PeerContrast(**options)


def test_unequal_batches_are_named():
    with pytest.raises(ValueError, match=r"embeddings\[1\] has shape \(3, 5\)"):
        PeerContrast()([torch.ones(4, 5), torch.ones(3, 5)], torch.zeros(4, dtype=torch.int64))
