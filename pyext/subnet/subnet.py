"""Reconstruction: a sub-network for some classes, run on the whole network's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyext.subnet import selection
from pyext.subnet.atlas import Atlas, AtlasError
from pyext.subnet.execution import Compact, Recipe
from pyext.subnet.graph import Plan, plan
from pyext.subnet.materialize import materialize
from pyext.subnet.selection import LayerCost

SELECTIONS = 64
"""Selections that a sub-network remembers, so that switching back takes microseconds."""
GATHERED_BYTES = 2**28
"""Of the kept weights of remembered selections: beyond them, those used least recently let go of theirs."""


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


_MADE = frozenset(("plan", "_recipe", "_compact", "_mixed", "_seen"))
"""Attributes of a `Subnet` that follow from the others."""


class Subnet(nn.Module):
    """Part of a network, over the same weights: the channels that some classes need, and the outputs of those classes.

    The whole network is the attribute `network`, whose parameters are this module's; a step of an optimizer on them
    trains the sub-network in place. Removing a channel is what zeroing it after every operation does.

    Images of one batch may each run a sub-network of their own, from a list of tasks (`assign`).

    Attributes:
        classes: the classes of the outputs, ascending.
        labels: output column by class.
        groups: the kept channel groups, bool (groups,) (`pyext.subnet.graph.Plan`).
        tasks: by task, the classes of its outputs, ascending.

    Shape: (N, C, H, W) to (N, len(classes)); with `task` to (N, classes of the largest task).
    """

    def __init__(self, network: nn.Module, atlas: Atlas, traced: Plan):
        super().__init__()
        self.network, self.atlas = network, atlas
        self.classes: list[int] = []
        self.labels: dict[int, int] = {}
        self.groups = np.ones(len(traced.fixed), dtype=bool)
        self.tasks: list[list[int]] = []
        self._run_by(traced)

    def _run_by(self, traced: Plan) -> None:
        self.plan, self._recipe = traced, Recipe(traced)
        self._compact: Compact | None = None
        self._mixed: Compact | None = None
        self._seen: dict[tuple[Any, ...], tuple[np.ndarray, Compact]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: the network, the atlas and what is kept; how to run that is found anew."""
        state = {name: value for name, value in self.__dict__.items() if name not in _MADE}
        return state | {"_selections": self._mixed.selections if self._mixed else []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle or a copy."""
        super().__setstate__({name: value for name, value in state.items() if name != "_selections"})
        self._run_by(plan(self.network, self.atlas.input_shape))
        if self.classes:
            self._compact = Compact(self._recipe, [self.groups])
        if self.tasks:
            self._mixed = Compact(self._recipe, state["_selections"])

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
        found = self._seen.pop(key, None)
        if found is None:
            groups = self._selected(chosen, keep, threshold, scope, combine)
            found = groups, Compact(self._recipe, [groups])
        self._seen[key] = found  # the last of them is the one used last
        if len(self._seen) > SELECTIONS:
            self._seen.pop(next(iter(self._seen)))
        return self._become(chosen, *found)

    def assign(
        self,
        tasks: Sequence[Sequence[int]],
        *,
        keep: float | None = 0.11,
        threshold: float | None = None,
        scope: str = "global",
        combine: str = "max",
    ) -> Subnet:
        """Name the classes of the tasks that images of one batch may ask for; other arguments and errors as
        `reconstruct`. Returns itself.

        Raises:
            ValueError: no task.
        """
        _check(keep, threshold, scope, combine)
        if not tasks:
            raise ValueError("assign: tasks is empty, expected the classes of at least one task")
        chosen = [self.atlas.check_classes(classes) for classes in tasks]
        return self.assign_groups(chosen, [self._selected(own, keep, threshold, scope, combine) for own in chosen])

    def assign_groups(self, tasks: Sequence[Sequence[int]], groups: Sequence[np.ndarray]) -> Subnet:
        """`assign` with the channel groups that each task keeps exactly, as `select` has them for one."""
        chosen = [self._exactly(*pair) for pair in zip(tasks, groups, strict=True)]
        self.tasks = [classes for classes, _ in chosen]
        self._mixed = Compact(self._recipe, [own for _, own in chosen])
        return self

    def _selected(
        self, classes: list[int], keep: float | None, threshold: float | None, scope: str, combine: str
    ) -> np.ndarray:
        chosen = np.array(classes)
        scores = selection.class_scores(self.plan, self.atlas, chosen, combine)
        if threshold is not None:
            return selection.above(self.plan, scores, chosen, threshold)
        return selection.choose(self.plan, scores, chosen, float(keep or 0), scope)

    def _become(self, classes: list[int], groups: np.ndarray, compact: Compact) -> Subnet:
        self._compact, self.groups = compact, groups
        self.classes, self.labels = classes, {c: i for i, c in enumerate(classes)}
        self._let_go()
        return self

    def _let_go(self) -> None:
        """Keep the bytes of gathered weights within bounds."""
        used = [compact for _, compact in self._seen.values()]
        total = sum(compact.bytes for compact in used)
        for compact in used:
            if total <= GATHERED_BYTES:
                return
            if compact is not self._compact:
                total -= compact.bytes
                compact.forget()

    def select(self, classes: Sequence[int], groups: np.ndarray) -> Subnet:
        """Keep exactly `groups` (bool, by channel group), with the outputs of `classes`; returns itself.

        Raises:
            ValueError: `groups` has another length, or leaves a layer without channels; classes as `reconstruct`.
        """
        chosen, own = self._exactly(classes, groups)
        return self._become(chosen, own, Compact(self._recipe, [own]))

    def _exactly(self, classes: Sequence[int], groups: np.ndarray) -> tuple[list[int], np.ndarray]:
        """`classes`, checked, and `groups` with the outputs of those classes and no others."""
        if groups.shape != self.plan.fixed.shape or groups.dtype != bool:
            raise ValueError(f"select: groups has shape {groups.shape}, expected bool {self.plan.fixed.shape}")
        chosen = self.atlas.check_classes(classes)
        own = groups.copy()
        own[self.plan.classes] = False
        own |= selection.base(self.plan, np.array(chosen))
        selection.check_layers(self.plan, own)
        return chosen, own

    def forward(self, x: Tensor, task: Tensor | Sequence[int] | None = None) -> Tensor:
        """Logits of `classes`; with `task`, the task of each image, those of its task.

        Args:
            x: images (N, C, H, W).
            task: int64 (N,), numbers of `tasks`. Column i of an image is class ``tasks[task][i]``; behind a smaller
                task's last class stands -inf.

        Raises:
            ValueError: `task` without tasks (`assign`), of another shape, outside of them; or in training mode, since
                images of several sub-networks have no batch statistics in common.
        """
        if task is None:
            assert self._compact is not None
            return self._compact.run(x)
        if self._mixed is None:
            raise ValueError("task: this sub-network has no tasks: name them with assign(tasks)")
        subnets = torch.as_tensor(task, device=x.device)
        if subnets.dtype.is_floating_point or subnets.shape != (len(x),):
            raise ValueError(f"task has shape {tuple(subnets.shape)} {subnets.dtype}, expected int64 ({len(x)},)")
        if len(x) and not 0 <= int(subnets.min()) <= int(subnets.max()) < len(self.tasks):
            raise ValueError(f"task has numbers outside 0 to {len(self.tasks) - 1}, those of tasks")
        subnets = subnets.long()
        logits = self._mixed.run(x, subnets)
        widths = torch.tensor([len(classes) for classes in self.tasks], device=x.device)[subnets]
        return logits.masked_fill(torch.arange(logits.shape[1], device=x.device) >= widths[:, None], float("-inf"))

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
    classes: Sequence[int] | Sequence[Sequence[int]],
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
        classes: what the sub-network tells apart. Or several such lists, one for each task: the sub-network is then
            that of the first, and those of all run in one batch (`Subnet.assign`).
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
    tasks: list[Any] = [c for c in classes if not isinstance(c, Integral)]
    if tasks and len(tasks) < len(classes):
        raise ValueError("reconstruct: classes has numbers and lists of numbers, expected one or the other")
    for own in tasks or [classes]:
        atlas.check_classes(own)
    atlas.check_network(model)
    traced = plan(model, atlas.input_shape)
    widths = {layer: (len(traced.classes), len(traced.groups_of(layer))) for layer in traced.gates}
    if widths != {layer: tuple(s.shape) for layer, s in atlas.sums.items()}:
        raise AtlasError(f"the atlas lists other layers than this {type(model).__name__} has")
    subnet = Subnet(model, atlas, traced)
    if tasks:
        subnet.assign(tasks, keep=keep, threshold=threshold, scope=scope, combine=combine)
    first: Any = tasks[0] if tasks else classes
    subnet.switch(first, keep=keep, threshold=threshold, scope=scope, combine=combine)
    return subnet.train(model.training)


def _check(keep: float | None, threshold: float | None, scope: str, combine: str) -> None:
    if threshold is None and (keep is None or not 0 < keep <= 1):
        raise ValueError(f"reconstruct: keep is {keep}, expected a share in (0, 1]")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"reconstruct: threshold is {threshold}, expected 0 or more")
    for name, value, words in (("scope", scope, ("global", "layer")), ("combine", combine, ("max", "mean"))):
        if value not in words:
            raise ValueError(f"reconstruct: {name} is {value!r}, expected one of {words}")
