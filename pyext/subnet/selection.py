"""Which channel groups a sub-network keeps, and what it then costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx, nn

from pyext.subnet.graph import NORMS, Layer, Plan


@dataclass(frozen=True)
class LayerCost:
    """Parameters and multiply-adds of one layer, of the whole network and of the sub-network."""

    layer: str
    kind: str
    parameters: int
    kept_parameters: int
    multiply_adds: int
    kept_multiply_adds: int


def scores(plan: Plan, importance: dict[str, np.ndarray], combine: str) -> np.ndarray:
    """The score of each group, float64 (groups,): its importance over the layers that share it; -inf without any.

    `importance` gives each layer's, (C,). `combine` is "max" or "mean".
    """
    size = len(plan.fixed)
    if combine == "max":
        found = np.full(size, -np.inf)
        for layer, values in importance.items():
            np.maximum.at(found, plan.groups_of(layer), values)
        return found
    total, count = np.zeros(size), np.zeros(size)
    for layer, values in importance.items():
        np.add.at(total, plan.groups_of(layer), values)
        np.add.at(count, plan.groups_of(layer), 1)
    return np.divide(total, count, out=np.full(size, -np.inf), where=count > 0)


def choose(plan: Plan, group_scores: np.ndarray, classes: np.ndarray, keep: float, scope: str) -> np.ndarray:
    """The groups to keep, bool (groups,): the best that fit `keep` of the parameters that `classes` need undiminished.

    Every layer's best group is kept first, so none runs dry; the others follow by score, over the whole network
    (``"global"``) or in equal parts of each layer (``"layer"``).

    Raises:
        ValueError: the best group of every layer is already more than `keep`.
    """
    order, forced = _order(plan, group_scores, scope)
    always = base(plan, classes)
    budget = keep * parameters(plan, np.ones(len(plan.fixed), dtype=bool))

    def kept(count: int) -> np.ndarray:
        groups = always.copy()
        groups[order[:count]] = True
        return groups

    least = parameters(plan, kept(forced))
    if least > budget:
        raise ValueError(
            f"reconstruct: keep is {keep:g}, {budget:.0f} parameters, which leaves a layer without channels: one "
            f"in each takes {least}"
        )
    low, high = forced, len(order)  # the parameters grow with the count: kept(low) fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if parameters(plan, kept(middle)) <= budget else (low, middle - 1)
    return kept(low)


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
    for layer in plan.gates:
        if not groups[plan.groups_of(layer)].any():
            raise ValueError(f"reconstruct: layer {layer} is left without channels")


def _order(plan: Plan, group_scores: np.ndarray, scope: str) -> tuple[np.ndarray, int]:
    """All scored groups, those to keep first in front, and how many of them are each layer's best."""
    key = group_scores.copy()
    if scope == "layer":
        key = np.full(len(key), -np.inf)
        for layer in reversed(plan.gates):  # a group that layers share is ranked in the first of them
            own = np.unique(plan.groups_of(layer))
            ranks = np.empty(len(own))
            ranks[np.argsort(-group_scores[own], kind="stable")] = np.arange(len(own))
            key[own] = -ranks / len(own)
    best: list[int] = []
    for layer in plan.gates:
        own = plan.groups_of(layer)
        if not np.isin(own, best).any():
            best.append(int(own[np.argmax(group_scores[own])]))
    free = np.flatnonzero(np.isfinite(group_scores) & ~plan.fixed)
    by_score = free[np.argsort(-key[free], kind="stable")]
    return np.concatenate([best, by_score[~np.isin(by_score, best)]]).astype(np.int64), len(best)


def parameters(plan: Plan, groups: np.ndarray) -> int:
    """Weights and biases that a network of `groups` has."""
    return sum(_weights(plan, node, layer, groups)[0] for node, layer in plan.layers())


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
