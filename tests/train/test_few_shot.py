"""Few-shot episodes: known features, intervals, repetition, and what cannot be drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from pyext.train import few_shot
from pyext.train.errors import UserError
from pyext.train.few_shot import Episodes, FewShotScores, evaluate

LABELS = torch.arange(10).repeat_interleave(20)


def _random(seed=0):
    return torch.randn(200, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("probe", ["centroid", "linear"])
@pytest.mark.parametrize("normalise", [True, False])
def test_separable_features_are_all_right(probe, normalise):
    features = torch.eye(10)[LABELS] * 5 + 0.01 * _random()[:, :10]
    scores = evaluate(features, LABELS, Episodes(count=10, probe=probe, normalise=normalise))
    assert (scores.mean, scores.interval) == (1, 0)


@pytest.mark.parametrize("probe", ["centroid", "linear"])
def test_features_without_meaning_are_right_by_chance(probe):
    labels = torch.arange(10).repeat_interleave(200)
    features = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    scores = evaluate(features, labels, Episodes(count=150, probe=probe))
    assert abs(scores.mean - 1 / 5) < 2 * scores.interval < 0.1


def _one_by_one(features, labels, asked):
    """The accuracies by scikit-learn, one episode after the other, of the same draws."""
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    features = F.normalize(features, dim=1).numpy()
    generator, accuracies = torch.Generator().manual_seed(asked.seed), []
    way = torch.arange(asked.ways)[:, None]
    for _ in range(asked.count):
        drawn = few_shot._draw(rows, asked, generator)
        shots, queries = drawn[:, : asked.shots], drawn[:, asked.shots :]
        if asked.probe == "linear":
            probe = LogisticRegression(tol=1e-10, max_iter=10000)
            probe.fit(features[shots.flatten()], way.expand_as(shots).flatten())
            guesses = probe.predict(features[queries.flatten()]).reshape(queries.shape)
        else:  # of normalised centroids the nearest is that of the largest cosine
            centroids = features[shots].mean(axis=1)
            cosines = features[queries] @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T
            guesses = cosines.argmax(axis=2)
        accuracies.append(float((guesses == way.numpy()).mean()))
    return torch.tensor(accuracies, dtype=torch.float64)


@pytest.mark.parametrize("probe", ["centroid", "linear"])
@pytest.mark.parametrize("shots", [1, 4])
def test_episodes_together_are_those_one_by_one(probe, shots):
    asked = Episodes(count=few_shot.TOGETHER + 7, probe=probe, shots=shots)
    features = 2 * torch.eye(16)[LABELS] + _random()
    scores = evaluate(features, LABELS, asked)
    assert 0.3 < scores.mean < 0.9
    torch.testing.assert_close(scores.accuracies, _one_by_one(features, LABELS, asked), rtol=1e-12, atol=0)


def test_length_of_a_feature_counts_only_without_normalisation():
    labels = torch.arange(2).repeat_interleave(20)
    features = torch.ones(40, 3) * (1 + labels)[:, None]
    asked = Episodes(ways=2, queries=5, count=5)
    assert evaluate(features, labels, replace(asked, normalise=False)).mean == 1
    assert evaluate(features, labels, asked).mean == 0.5


def test_interval():
    scores = FewShotScores(torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64))
    deviation = math.sqrt(sum((x - 0.5) ** 2 for x in (0.2, 0.4, 0.9)) / 2)
    assert scores.mean == pytest.approx(0.5)
    assert scores.interval == pytest.approx(1.96 * deviation / math.sqrt(3))


def test_a_seed_names_the_episodes():
    first, again = (evaluate(_random(), LABELS, Episodes(count=20)).accuracies for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, evaluate(_random(), LABELS, Episodes(count=20, seed=1)).accuracies)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Episodes(ways=11), "11-way episodes need as many classes; the images have 10"),
        (Episodes(shots=6), "class 0 has 20"),
        (Episodes(ways=1), "ways is 1"),
        (Episodes(shots=0), "shots is 0"),
        (Episodes(probe="tree"), "unknown probe 'tree'"),
    ],
)
def test_what_cannot_be_drawn_is_said(asked, message):
    with pytest.raises(UserError, match=message):
        evaluate(_random(), LABELS, asked)


def test_features_that_are_not_finite_are_said():
    features = _random()
    features[3, 3] = math.nan
    with pytest.raises(UserError, match="not all finite"):
        evaluate(features, LABELS, Episodes())
