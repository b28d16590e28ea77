"""The vectorised choice of channels is the plain one, bit for bit."""

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CLASSES, NETWORKS, drawn_atlas, network

from pyext.subnet import plan, selection

PLANS = {}


def traced(name):
    """The network's atlas and plan; made once."""
    if name not in PLANS:
        model, shape = network(name)
        PLANS[name] = drawn_atlas(model, shape), plan(model, shape)
    return PLANS[name]


def parameters(net, groups):
    return sum(row.kept_parameters for row in selection.costs(net, groups))


def plain_order(net, scores, scope):
    """Every layer's best group that has none yet, then all others by score, or by their places in their layers."""
    key = dict(enumerate(scores))
    if scope == "layer":
        for layer in reversed(net.gates):
            own = sorted(set(net.groups_of(layer).tolist()), key=lambda g: (-scores[g], g))
            key.update({group: -place / len(own) for place, group in enumerate(own)})
    best = []
    for layer in net.gates:
        own = net.groups_of(layer).tolist()
        if not set(own) & set(best):
            best.append(max(own, key=lambda g: scores[g]))
    others = [g for g in np.flatnonzero(np.isfinite(scores) & ~net.fixed).tolist() if g not in best]
    return best, sorted(others, key=lambda g: (-key[g], g))


def plain_choice(net, scores, classes, keep, scope):
    """The longest beginning of the order that fits; None where the layers' best do not."""
    best, others = plain_order(net, scores, scope)

    def kept(count):
        groups = net.fixed.copy()
        groups[net.classes[classes]] = groups[best] = groups[others[:count]] = True
        return groups

    budget = keep * parameters(net, np.ones(len(net.fixed), dtype=bool))
    count = bisect.bisect_right(range(len(others) + 1), budget, key=lambda n: parameters(net, kept(n)))
    return kept(count - 1) if count else None


def drawn_scores(net, random, kind):
    """Of every gated group; most of the others have none. Many are equal, or the next number to one."""
    scores = np.full(len(net.fixed), -np.inf)
    own = np.unique(np.concatenate([net.groups_of(layer) for layer in net.gates]))
    scores[own] = {
        "even": lambda: random.random(len(own)),
        "equal": lambda: random.integers(-1, 2, len(own)) * 0.5,
        "one value": lambda: np.zeros(len(own)),
        "neighbours": lambda: np.nextafter(1.0, random.integers(0, 3, len(own))),
        "far apart": lambda: 10.0 ** random.integers(-300, 300, len(own)),
    }[kind]()
    return scores


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["even", "equal", "one value", "neighbours", "far apart"]),
    scope=st.sampled_from(["global", "layer"]),
    keep=st.sampled_from([0.02, 0.11, 0.3, 0.7, 1.0]),
)
def test_choice_is_the_plain_one(name, seed, kind, scope, keep):
    _, net = traced(name)
    random = np.random.default_rng(seed)
    classes = random.permutation(CLASSES)[: random.integers(1, CLASSES + 1)]
    scores = drawn_scores(net, random, kind)
    expected = plain_choice(net, scores, classes, keep, scope)
    if expected is None:
        with pytest.raises(ValueError, match="leaves a layer without channels"):
            selection.choose(net, scores, classes, keep, scope)
    else:
        assert np.array_equal(selection.choose(net, scores, classes, keep, scope), expected)


@pytest.mark.parametrize("combine", ["max", "mean"])
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_the_importances_over_classes_and_then_over_layers(name, combine, monkeypatch):
    monkeypatch.setattr(selection, "_ROWS", 2)
    atlas, net = traced(name)
    for classes in ([1, 3, 4], [1, 2], [4], [0, 1, 2, 3, 4, 5]):
        found = selection.class_scores(net, atlas, np.array(classes), combine)
        values = [[] for _ in net.fixed]
        for layer in atlas.layers:
            merged = getattr(np, combine)(atlas.importance(layer).numpy()[classes], axis=0)
            for group, value in zip(net.groups_of(layer), merged, strict=True):
                values[group].append(value)
        expected = [(max(own) if combine == "max" else sum(own) / len(own)) if own else -np.inf for own in values]
        assert np.array_equal(found, expected)


def test_another_atlas_of_the_same_network_has_scores_of_its_own():
    model, shape = network("resnet8")
    net, classes = plan(model, shape), np.array([0, 2])
    one, two = (
        selection.class_scores(net, atlas, classes, "max")
        for atlas in (drawn_atlas(model, shape, seed=0), drawn_atlas(model, shape, seed=1))
    )
    assert not np.array_equal(one, two)
