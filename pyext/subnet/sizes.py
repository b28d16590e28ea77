"""How many parameters sub-networks of one plan have, for many of them at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from pyext.subnet.graph import NORMS, Plan


class Sizes:
    """What the parameters of a plan's sub-networks follow from.

    A layer over i kept inputs and o kept outputs has i·o times its kernel's size weights: a product of two counts. So
    every set of channels that some layer reads or writes is counted once, and products of two counts are added up.
    What a channel brings alone (biases, batch norms, depthwise kernels) needs no product.

    Attributes:
        whole: parameters of the whole network.
    """

    def __init__(self, plan: Plan):
        self._alone = np.zeros(len(plan.fixed))
        self._sets: dict[bytes, int] = {}
        members: list[np.ndarray] = []
        products: list[tuple[int, int, int]] = []
        for factor, inputs, outputs in self._products(plan):
            if len(inputs) == len(outputs) == 1 and inputs[0] == outputs[0]:  # a channel is its own square
                self._alone[inputs] += factor
            else:
                products.append((self._number(inputs, members), self._number(outputs, members), factor))
        self._inputs, self._outputs, factors = np.array(products, dtype=np.int64).reshape(-1, 3).T
        self._factors = factors.astype(np.float64)  # exact up to 2**53 parameters
        self._member_sets = np.repeat(np.arange(len(members)), [len(groups) for groups in members])
        self._members = np.concatenate([*members, np.empty(0, dtype=np.int64)])
        self.whole = int(self.growing(np.zeros(len(plan.fixed), dtype=np.int64), 1)[0])

    def _products(self, plan: Plan) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Kernel size, inputs and outputs of every layer, of every group of a convolution; adds up `_alone`."""
        for node, layer in plan.layers():
            outputs = plan.channels[node.name]
            if isinstance(layer, NORMS):
                np.add.at(self._alone, outputs, 2 * layer.affine)
                continue
            if layer.bias is not None:
                np.add.at(self._alone, outputs, 1)
            groups, kernel = (layer.groups, layer.kernel_size) if isinstance(layer, nn.Conv2d) else (1, (1, 1))
            rows = (channels.reshape(groups, -1) for channels in (plan.inputs(node), outputs))
            for inputs, own in zip(*rows, strict=True):
                yield kernel[0] * kernel[1], inputs, own

    def _number(self, groups: np.ndarray, members: list[np.ndarray]) -> int:
        """The number of the set `groups`, a new one where it was not seen."""
        found = self._sets.setdefault(groups.tobytes(), len(members))
        if found == len(members):
            members.append(groups)
        return found

    def growing(self, joins: np.ndarray, count: int) -> np.ndarray:
        """Parameters of networks 0 to count - 1, each the one before it and more groups: float64 (count,), exact.

        `joins`, int64 (groups,), names the first of the networks that has the group; `count` where none has.
        """
        width = count + 1
        alone = np.bincount(joins, self._alone, minlength=width).cumsum()
        places = self._member_sets * width + joins[self._members]
        added = np.bincount(places, minlength=len(self._sets) * width).reshape(-1, width)
        kept = added.cumsum(1, dtype=np.float64)
        return (alone + self._factors @ (kept[self._inputs] * kept[self._outputs]))[:count]
