"""How many parameters sub-networks of one plan have, for many of them at once."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from torch import fx, nn

from pyext.subnet.graph import NORMS, Layer, Plan


class Sizes:
    """What the parameters of a plan's sub-networks follow from.

    Over i kept inputs and o kept outputs, a layer has i·o times its kernel's size weights; a bias, a batch norm and a
    depthwise convolution are a factor times o alone. So every set of channels that layers read or write is counted
    once, and what is added up are counts and products of two counts.

    Attributes:
        whole: parameters of the whole network.
    """

    def __init__(self, plan: Plan):
        self._numbers: dict[bytes, int] = {}
        self._sets: list[np.ndarray] = []
        counted, multiplied = defaultdict[int, int](int), defaultdict[tuple[int, int], int](int)
        for node, layer in plan.layers():
            self._add(plan, node, layer, counted, multiplied)
        lengths = [len(groups) for groups in self._sets]
        self._members, self._member_sets = np.concatenate(self._sets), np.repeat(np.arange(len(lengths)), lengths)
        # Floats, of which sums and products are fast, hold 2**53 parameters exactly.
        self._factors = np.array([counted[number] for number in range(len(lengths))], dtype=np.float64)
        self._inputs, self._outputs = np.array(list(multiplied), dtype=np.int64).reshape(-1, 2).T
        self._products = np.array(list(multiplied.values()), dtype=np.float64)
        self.whole = int(self.growing(np.zeros(len(plan.fixed), dtype=np.int64), 1)[0])

    def _add(
        self,
        plan: Plan,
        node: fx.Node,
        layer: Layer,
        counted: defaultdict[int, int],
        multiplied: defaultdict[tuple[int, int], int],
    ) -> None:
        """Add the factors of a layer to those of counts and of products of counts, by numbers of sets."""
        outputs = plan.channels[node.name]
        if isinstance(layer, NORMS):
            counted[self._number(outputs)] += 2 * layer.affine
            return
        inputs = plan.inputs(node)
        if layer.bias is not None:
            counted[self._number(outputs)] += 1
        groups, taps = (layer.groups, int(np.prod(layer.kernel_size))) if isinstance(layer, nn.Conv2d) else (1, 1)
        if groups == len(inputs) > 1:  # depthwise: a channel and its own input are kept together
            counted[self._number(outputs)] += taps
            return
        for own in zip(inputs.reshape(groups, -1), outputs.reshape(groups, -1), strict=True):
            read, written = map(self._number, own)
            multiplied[read, written] += taps

    def _number(self, groups: np.ndarray) -> int:
        """The number of the set `groups`, a new one where it was not seen."""
        number = self._numbers.setdefault(groups.tobytes(), len(self._sets))
        if number == len(self._sets):
            self._sets.append(groups)
        return number

    def growing(self, joins: np.ndarray, count: int) -> np.ndarray:
        """Parameters of networks 0 to count - 1, each the one before it and more groups: float64 (count,), exact.

        `joins`, int64 (groups,), names the first of the networks that has the group; `count` where none has.
        """
        width = count + 1
        places = self._member_sets * width + joins[self._members]
        added = np.bincount(places, minlength=len(self._sets) * width).reshape(-1, width)
        kept = added.cumsum(1, dtype=np.float64)
        return (self._factors @ kept + self._products @ (kept[self._inputs] * kept[self._outputs]))[:count]
