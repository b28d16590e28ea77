"""Which channel groups a sub-network keeps, and what it then costs."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import numpy as np
from torch import fx, nn

from pyext.subnet.atlas import UNIT, Atlas
from pyext.subnet.graph import NORMS, Layer, Plan
from pyext.subnet.sizes import Sizes

_ROWS = 128
"""Classes whose scores are remembered; of VGG16's groups one takes 34 kB."""
_LEVELS, _EXACT = 64, 256
"""Sub-networks that are counted at once while the largest that fits is looked for."""


@dataclass(frozen=True)
class LayerCost:
    """Parameters and multiply-adds of one layer, of the whole network and of the sub-network."""

    layer: str
    kind: str
    parameters: int
    kept_parameters: int
    multiply_adds: int
    kept_multiply_adds: int


def combined(atlas: Atlas, classes: np.ndarray, combine: str) -> dict[str, np.ndarray]:
    """By layer, the importance of each channel to all of `classes`, float64 (C,); `combine` is "max" or "mean"."""
    sums = np.concatenate([own.numpy().take(classes, 0) for own in atlas.sums.values()], axis=1)
    means = sums * UNIT / atlas.counts.numpy()[classes, None]
    merged = means.max(0) if combine == "max" else means.mean(0)
    ends = itertools.accumulate((own.shape[1] for own in atlas.sums.values()), initial=0)
    bounds = itertools.pairwise(ends)
    return {layer: merged[start:end] for layer, (start, end) in zip(atlas.sums, bounds, strict=True)}


def scores(plan: Plan, importance: dict[str, np.ndarray], combine: str) -> np.ndarray:
    """The score of each group, float64 (groups,): its importance over the layers that share it; -inf without any.

    `importance` gives each layer's, (C,). `combine` is "max" or "mean".
    """
    groups = np.concatenate([plan.groups_of(layer) for layer in importance])
    values, size = np.concatenate(list(importance.values())), len(plan.fixed)
    if combine == "max":
        found = np.full(size, -np.inf)
        np.maximum.at(found, groups, values)
        return found
    total, count = np.bincount(groups, values, minlength=size), np.bincount(groups, minlength=size)
    return np.divide(total, count, out=np.full(size, -np.inf), where=count > 0)


def class_scores(plan: Plan, atlas: Atlas, classes: np.ndarray, combine: str) -> np.ndarray:
    """The score of each group, float64 (groups,), by its importance to `classes`: `scores` of what is `combined`."""
    if combine == "mean":
        return scores(plan, combined(atlas, classes, combine), combine)
    # The highest over classes and then over layers is the highest over layers and then over classes.
    rows, own = _tables(plan).rows.setdefault(atlas, {}), []
    for c in classes.tolist():
        if c not in rows:
            rows[c] = scores(plan, combined(atlas, np.array([c]), combine), combine)
        own.append(rows[c])
    while len(rows) > _ROWS:
        rows.pop(next(iter(rows)))
    return np.maximum.reduce(own)


def choose(plan: Plan, group_scores: np.ndarray, classes: np.ndarray, keep: float, scope: str) -> np.ndarray:
    """The groups to keep, bool (groups,): the best that fit `keep` of the parameters that `classes` need undiminished.

    Every layer's best group is kept first, so none runs dry; the others follow by score, over the whole network
    (``"global"``) or in equal parts of each layer (``"layer"``).

    Raises:
        ValueError: the best group of every layer is already more than `keep`.
    """
    tables = _tables(plan)
    key = group_scores if scope == "global" else tables.ranked(group_scores)
    kept, budget = base(plan, classes), keep * tables.sizes.whole
    kept[tables.best(group_scores)] = True
    undecided = np.flatnonzero(np.isfinite(group_scores) & ~kept)
    while True:  # the parameters grow with the groups: all above the level at which they exceed the budget are kept
        values = key[undecided]
        last = len(values) <= _EXACT or values.min() == values.max()
        levels = _places(values) if last else _levels(values)
        count = 1 + (len(values) if last else _LEVELS)
        joins = ~kept * count  # a choice between two numbers by `where` takes thrice as long
        joins[undecided] = levels
        sizes = tables.sizes.growing(joins, count)
        fitting = np.count_nonzero(sizes <= budget)
        if fitting == 0:
            raise ValueError(
                f"reconstruct: keep is {keep:g}, {budget:.0f} parameters, which leaves a layer without channels: one "
                f"in each takes {sizes[0]:.0f}"
            )
        kept = joins < fitting
        if last:
            return kept
        undecided = undecided[levels == fitting]


def _levels(values: np.ndarray) -> np.ndarray:
    """1 for the highest of the values (n,) to `_LEVELS` for the lowest, by their distance from them."""
    highest = values.max()
    shares = (highest - values) / (highest - values.min())
    return np.minimum((shares * _LEVELS).astype(np.int64) + 1, _LEVELS)


def _places(values: np.ndarray) -> np.ndarray:
    """1 for the highest of the values (n,) to n for the lowest; equal ones in their order."""
    places = np.empty(len(values), dtype=np.int64)
    places[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return places


def above(plan: Plan, group_scores: np.ndarray, classes: np.ndarray, threshold: float) -> np.ndarray:
    """The groups of at least the score `threshold`, bool (groups,); ValueError names a layer left without any."""
    groups = base(plan, classes) | (group_scores >= threshold)
    check_layers(plan, groups)
    return groups


def base(plan: Plan, classes: np.ndarray) -> np.ndarray:
    """What a sub-network for `classes` keeps in any case: the images' channels and its own outputs."""
    groups = plan.fixed.copy()
    groups[plan.classes[classes]] = True
    return groups


def check_layers(plan: Plan, groups: np.ndarray) -> None:
    """ValueError where `groups` leave a gated layer without channels."""
    tables = _tables(plan)
    kept = np.logical_or.reduceat(groups[tables.channels], tables.starts)
    if not kept.all():
        raise ValueError(f"reconstruct: layer {list(plan.gates)[kept.argmin()]} is left without channels")


class _Tables:
    """What of a choice depends on the plan alone."""

    def __init__(self, plan: Plan):
        self.sizes = Sizes(plan)
        self.rows: weakref.WeakKeyDictionary[Atlas, dict[int, np.ndarray]] = weakref.WeakKeyDictionary()
        layers = [plan.groups_of(layer) for layer in plan.gates]
        self.channels, self.widths, self.starts = _joined(layers)
        self.sharing: list[list[int]] = [[] for _ in plan.fixed]
        for number, own in enumerate(layers):
            for group in np.unique(own).tolist():
                self.sharing[group].append(number)
        # The groups of each layer once; a group that layers share is ranked in the first of them.
        self.own, counts, starts = _joined([np.unique(own) for own in layers])
        self.layer = np.repeat(np.arange(len(layers), dtype=np.uint16), counts)
        self.within = np.arange(len(self.own)) - np.repeat(starts, counts)
        self.size = counts[self.layer]
        self.first = np.unique(self.own, return_index=True)[1]

    def best(self, group_scores: np.ndarray) -> np.ndarray:
        """The best group of each layer that has not the best of a layer before it."""
        values = group_scores[self.channels]
        highest = np.repeat(np.maximum.reduceat(values, self.starts), self.widths)
        places = np.flatnonzero(values == highest)
        found, served = [], set[int]()
        for layer, group in enumerate(self.channels[places[np.searchsorted(places, self.starts)]].tolist()):
            if layer not in served:
                found.append(group)
                served.update(self.sharing[group])
        return np.array(found)

    def ranked(self, group_scores: np.ndarray) -> np.ndarray:
        """Instead of each score, minus the share of its layer's groups that come before it."""
        falling = np.argsort(-group_scores[self.own], kind="stable")
        falling = falling[np.argsort(self.layer[falling], kind="stable")]
        shares = np.empty(len(falling))
        shares[falling] = -self.within / self.size
        key = np.full(len(group_scores), -np.inf)
        key[self.own[self.first]] = shares[self.first]
        return key


_seen: weakref.WeakKeyDictionary[Plan, _Tables] = weakref.WeakKeyDictionary()


def _tables(plan: Plan) -> _Tables:
    found = _seen.get(plan)
    if found is None:
        _seen[plan] = found = _Tables(plan)
    return found


def _joined(layers: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`layers` one after another, their lengths, and where each begins."""
    lengths = np.array([len(own) for own in layers])
    return np.concatenate(layers), lengths, np.cumsum(lengths) - lengths


def costs(plan: Plan, groups: np.ndarray) -> list[LayerCost]:
    """A row per layer; batch norm, which inference folds into a convolution, counts no multiply-adds."""
    rows, everything = [], np.ones(len(plan.fixed), dtype=bool)
    for node, layer in plan.layers():
        positions = int(np.prod(plan.shapes[node.name][1:]))
        whole, kept = _weights(plan, node, layer, everything), _weights(plan, node, layer, groups)
        kind = type(layer).__name__
        rows.append(LayerCost(str(node.target), kind, whole[0], kept[0], whole[1] * positions, kept[1] * positions))
    return rows


def _weights(plan: Plan, node: fx.Node, layer: Layer, groups: np.ndarray) -> tuple[int, int]:
    """Parameters of `layer`, and products per position."""
    outputs = groups[plan.channels[node.name]]
    if isinstance(layer, NORMS):
        return (2 * int(outputs.sum()) if layer.affine else 0), 0
    inputs = groups[plan.inputs(node)]
    bias = int(outputs.sum()) if layer.bias is not None else 0
    if isinstance(layer, nn.Linear):
        products = int(inputs.sum()) * int(outputs.sum())
    else:
        pairs = inputs.reshape(layer.groups, -1).sum(1) * outputs.reshape(layer.groups, -1).sum(1)
        products = int(pairs.sum()) * layer.kernel_size[0] * layer.kernel_size[1]
    return products + bias, products
