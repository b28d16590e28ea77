"""The linear probe of many sets at once against scikit-learn's of one."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pyext.train.linear_probe import fit_linear_probe


def _features(sets, shots, width, scale, ways):
    torch.manual_seed(0)
    return scale * torch.randn(sets, ways * shots, width, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ways", "shots", "width", "scale"), [(5, 1, 64, 0.1), (5, 5, 12, 1.0), (2, 3, 1, 5.0), (4, 2, 30, 10.0)]
)
def test_logits_are_scikit_learns(ways, shots, width, scale):
    features, queries = (_features(3, n, width, scale, ways) for n in (shots, 4))
    labels = torch.arange(ways).repeat_interleave(shots)
    logits = fit_linear_probe(features, labels, ways)(queries)
    for x, q, found in zip(features, queries, logits, strict=True):
        # For two classes scikit-learn has one logit, the difference of these, and penalises its weights.
        probe = LogisticRegression(C=2 if ways == 2 else 1, solver="newton-cholesky", tol=1e-12, max_iter=1000)
        probe.fit(x.numpy(), labels.numpy())
        expected = torch.from_numpy(probe.decision_function(q.numpy()))
        found = found[:, 1] - found[:, 0] if ways == 2 else found - found.mean(dim=1, keepdim=True)
        expected = expected if ways == 2 else expected - expected.mean(dim=1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_a_set_has_no_part_in_anothers_fit():
    """A hard set beside easy ones: steps are taken until all have arrived."""
    features, labels = _features(3, 2, 8, 1.0, 5), torch.arange(5).repeat_interleave(2)
    features[1] *= 30
    together = fit_linear_probe(features, labels, 5)(features)
    for i in range(3):
        alone = fit_linear_probe(features[i : i + 1], labels, 5)(features[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-7, atol=1e-7)


def test_equal_shots_and_features_without_length_are_fitted():
    features, labels = torch.zeros(2, 6, 4), torch.arange(3).repeat_interleave(2)
    features[1] = 1.0
    assert fit_linear_probe(features, labels, 3)(torch.ones(2, 1, 4)).abs().max() < 1e-12
