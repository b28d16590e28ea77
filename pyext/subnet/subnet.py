"""Reconstruction: a sub-network for some classes, run on the whole network's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from pyext.subnet import selection
from pyext.subnet.atlas import Atlas, AtlasError
from pyext.subnet.execution import Compact
from pyext.subnet.graph import Plan, plan
from pyext.subnet.materialize import materialize
from pyext.subnet.selection import LayerCost

SELECTIONS = 64
"""Selections that a sub-network remembers (lists of channels alone), so that switching back takes microseconds."""


@dataclass(frozen=True)
class Summary:
    """What a sub-network costs."""

    layers: list[LayerCost]

    @property
    def parameters(self) -> tuple[int, int]:
        """Of the sub-network and of the whole network."""
        return sum(row.kept_parameters for row in self.layers), sum(row.parameters for row in self.layers)

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Of one image, by the sub-network and by the whole network."""
        return sum(row.kept_multiply_adds for row in self.layers), sum(row.multiply_adds for row in self.layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", "parameters kept", "of", "multiply-adds kept", "of")]
        for r in self.layers:
            counts = r.kept_parameters, r.parameters, r.kept_multiply_adds, r.multiply_adds
            rows.append((r.layer, r.kind, *(f"{n:,}" for n in counts)))
        totals = (f"{n:,}" for pair in (self.parameters, self.multiply_adds) for n in pair)
        rows.append(("all", "", *totals))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Subnet(nn.Module):
    """Part of a network, over the same weights: the channels that some classes need, and the outputs of those classes.

    The whole network is the attribute `network`, whose parameters are this module's; a step of an optimizer on them
    trains the sub-network in place. Removing a channel is what zeroing it after every operation does.

    Attributes:
        classes: the classes of the outputs, ascending.
        labels: output column by class.
        groups: the kept channel groups, bool (groups,) (`pyext.subnet.graph.Plan`).

    Shape: (N, C, H, W) to (N, len(classes)).
    """

    def __init__(self, network: nn.Module, atlas: Atlas, traced: Plan):
        super().__init__()
        self.network, self.atlas, self.plan = network, atlas, traced
        self.classes: list[int] = []
        self.labels: dict[int, int] = {}
        self.groups = np.ones(len(traced.fixed), dtype=bool)
        self._compact: Compact | None = None
        self._seen: dict[tuple[Any, ...], tuple[np.ndarray, Compact]] = {}

    def switch(
        self,
        classes: Sequence[int],
        *,
        keep: float | None = 0.11,
        threshold: float | None = None,
        scope: str = "global",
        combine: str = "max",
    ) -> Subnet:
        """Become the sub-network of other classes; arguments, errors and defaults as `reconstruct`. Returns itself."""
        _check(keep, threshold, scope, combine)
        chosen = self.atlas.check_classes(classes)
        key = (*chosen, keep, threshold, scope, combine)
        if key not in self._seen:
            if len(self._seen) == SELECTIONS:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = self._selected(chosen, keep, threshold, scope, combine)
        return self._become(chosen, *self._seen[key])

    def _selected(
        self, classes: list[int], keep: float | None, threshold: float | None, scope: str, combine: str
    ) -> tuple[np.ndarray, Compact]:
        chosen = np.array(classes)
        importance = selection.combined(self.atlas, chosen, combine)
        scores = selection.scores(self.plan, importance, combine)
        if threshold is not None:
            groups = selection.above(self.plan, scores, chosen, threshold)
        else:
            groups = selection.choose(self.plan, scores, chosen, float(keep or 0), scope)
        return groups, Compact(self.plan, groups)

    def _become(self, classes: list[int], groups: np.ndarray, compact: Compact) -> Subnet:
        if self._compact is not None and self._compact is not compact:
            self._compact.forget()
        self._compact, self.groups = compact, groups
        self.classes, self.labels = classes, {c: i for i, c in enumerate(classes)}
        return self

    def select(self, classes: Sequence[int], groups: np.ndarray) -> Subnet:
        """Keep exactly `groups` (bool, by channel group), with the outputs of `classes`; returns itself.

        Raises:
            ValueError: `groups` has another length, or leaves a layer without channels; classes as `reconstruct`.
        """
        if groups.shape != self.plan.fixed.shape or groups.dtype != bool:
            raise ValueError(f"select: groups has shape {groups.shape}, expected bool {self.plan.fixed.shape}")
        chosen = self.atlas.check_classes(classes)
        groups = groups.copy()
        groups[self.plan.classes] = False
        groups |= selection.base(self.plan, np.array(chosen))
        selection.check_layers(self.plan, groups)
        return self._become(chosen, groups, Compact(self.plan, groups))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `classes`."""
        assert self._compact is not None
        return self._compact.run(x)

    def materialize(self) -> fx.GraphModule:
        """This sub-network as a small module of its own, in eval mode: its weights are copies, ONNX can export it."""
        assert self._compact is not None
        return materialize(self.plan, self._compact, f"{type(self.network).__name__}Subnet")

    def summary(self) -> Summary:
        """Parameters and multiply-adds kept, layer by layer."""
        return Summary(selection.costs(self.plan, self.groups))

    def extra_repr(self) -> str:
        """The classes and the share of parameters."""
        kept, whole = self.summary().parameters
        return f"classes={self.classes}, parameters={kept}/{whole}"


def reconstruct(
    model: nn.Module,
    atlas: Atlas,
    classes: Sequence[int],
    *,
    keep: float | None = 0.11,
    threshold: float | None = None,
    scope: str = "global",
    combine: str = "max",
) -> Subnet:
    """The sub-network of `model` that tells `classes` apart (DRNet, arXiv 1911.08691; the aggregation is our reading).

    A channel's importance to a class is its mean gate over the class's images. Importances are combined over the
    classes, then over the layers that share the channel (residual additions, depthwise convolutions), by `combine`.

    Args:
        model: the dissected network. The sub-network runs on its very parameters.
        atlas: of `model`, by `dissect`.
        classes: what the sub-network tells apart.
        keep: the share of the network's parameters, in (0, 1], that is kept at most; the best channels that fit.
        threshold: instead of `keep`: the importance from which on a channel is kept.
        scope: with `keep`, ``"global"``: channels of all layers compete; ``"layer"``: every layer keeps the same
            share of its channels.
        combine: ``"max"`` or ``"mean"``.

    Raises:
        AtlasError: the atlas is of another network.
        UnsupportedNetwork: see `pyext.subnet.graph.plan`.
        ValueError: a class that is unknown, named twice or without images, none at all; `keep` outside (0, 1] or so
            small that a layer would be left without channels; `threshold` that leaves one so; unknown words.
    """
    _check(keep, threshold, scope, combine)
    atlas.check_classes(classes)
    atlas.check_network(model)
    traced = plan(model, atlas.input_shape)
    widths = {layer: (len(traced.classes), len(traced.groups_of(layer))) for layer in traced.gates}
    if widths != {layer: tuple(s.shape) for layer, s in atlas.sums.items()}:
        raise AtlasError(f"the atlas lists other layers than this {type(model).__name__} has")
    subnet = Subnet(model, atlas, traced)
    subnet.switch(classes, keep=keep, threshold=threshold, scope=scope, combine=combine)
    return subnet.train(model.training)


def _check(keep: float | None, threshold: float | None, scope: str, combine: str) -> None:
    if threshold is None and (keep is None or not 0 < keep <= 1):
        raise ValueError(f"reconstruct: keep is {keep}, expected a share in (0, 1]")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"reconstruct: threshold is {threshold}, expected 0 or more")
    for name, value, words in (("scope", scope, ("global", "layer")), ("combine", combine, ("max", "mean"))):
        if value not in words:
            raise ValueError(f"reconstruct: {name} is {value!r}, expected one of {words}")
