"""Convolution, batch norm and linear layer over kept channels, on the whole network's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyext.subnet.graph import LAYERS, Layer, Norm, Plan, channel_padding, is_padding, is_reshape, position_padding


@dataclass(frozen=True)
class Part:
    """Groups of a convolution that keep equally many inputs and outputs: one call.

    `positions` are the inputs' places in the compact input (None: all, in order), `rows` the kept outputs, `columns`
    (len(rows), inputs per group) each row's kept inputs within its group. A group with outputs and without inputs gives
    its bias: `columns` is then empty.
    """

    positions: np.ndarray | None
    rows: np.ndarray
    columns: np.ndarray
    groups: int

    @property
    def fan_in(self) -> int:
        """Inputs of each group; one, with weight zero, where none is kept."""
        return max(1, self.columns.shape[1])

    def weight(self, conv: nn.Conv2d) -> Tensor:
        """The kept part of the weight of `conv`; gradients reach the whole weight."""
        if self.columns.shape[1] == 0:
            return conv.weight.new_zeros(len(self.rows), 1, *conv.kernel_size)
        rows = torch.from_numpy(self.rows).to(conv.weight.device)
        if conv.groups == 1:
            columns = torch.from_numpy(np.ascontiguousarray(self.columns[0])).to(conv.weight.device)
            return conv.weight.index_select(0, rows).index_select(1, columns)
        return conv.weight[rows[:, None], torch.from_numpy(self.columns).to(conv.weight.device)]


def parts(conv: nn.Conv2d, inputs: np.ndarray, outputs: np.ndarray) -> list[Part]:
    """The calls that make `conv` over the kept channels `inputs` and `outputs`, both sorted; outputs stay in order."""
    fan_in, fan_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    found = []
    for group in np.unique(outputs // fan_out):
        positions = np.flatnonzero(inputs // fan_in == group)
        rows = outputs[outputs // fan_out == group]
        columns = np.tile(inputs[positions] - group * fan_in, (len(rows), 1))
        found.append(Part(positions if len(positions) else np.zeros(1, dtype=np.int64), rows, columns, 1))
    shapes = {part.columns.shape for part in found}
    if len(shapes) > 1 or next(iter(shapes))[1] == 0:
        return found
    positions = np.concatenate([part.positions for part in found])
    everything = len(positions) == len(inputs)
    rows, columns = (np.concatenate([getattr(part, name) for part in found]) for name in ("rows", "columns"))
    return [Part(None if everything else positions, rows, columns, len(found))]


@dataclass(frozen=True)
class _Pack:
    """Kept weights and biases of a layer, gathered from tensors that are the same as long as their `state` is."""

    state: tuple[Any, ...]
    tensors: list[Tensor | None]


def _state(layer: nn.Module) -> tuple[Any, ...] | None:
    """Differs once a parameter or running statistic of `layer` has changed or moved; None where that cannot be told."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if any(t.is_inference() for t in tensors) or torch.compiler.is_compiling():
        return None
    return tuple((t._version, t.data_ptr(), t.dtype, t.device) for t in tensors)


class Compact(fx.Interpreter):
    """Runs a plan over the channels of `groups` alone: tensors hold those, in the network's order.

    Without gradients the kept weights are gathered once and used again until the network's change; `forget` drops them.
    """

    def __init__(self, plan: Plan, groups: np.ndarray):
        super().__init__(plan.module)
        self.plan = plan
        self.kept = {name: np.flatnonzero(groups[ids]) for name, ids in plan.channels.items()}
        self.parts: dict[str, list[Part]] = {}
        for node, layer in plan.layers():
            if isinstance(layer, nn.Conv2d):
                self.parts[node.name] = parts(layer, self.inputs(node), self.kept[node.name])
        self._packs: dict[str, _Pack] = {}

    def inputs(self, n: fx.Node) -> np.ndarray:
        """The kept channels of what `n` reads."""
        return self.kept[str(n.args[0])]

    def forget(self) -> None:
        """Let go of gathered weights."""
        self._packs.clear()

    def _tensors(self, n: fx.Node, layer: Layer) -> list[Tensor | None]:
        """What the layer of `n` computes with: weight and bias of each of its calls."""
        state = None if torch.is_grad_enabled() or layer.training else _state(layer)
        pack = self._packs.get(n.name)
        if state is not None and pack is not None and pack.state == state:
            return pack.tensors
        tensors = self._gather(n, layer)
        if state is not None:
            self._packs[n.name] = _Pack(state, tensors)
        return tensors

    def _gather(self, n: fx.Node, layer: Layer) -> list[Tensor | None]:
        if isinstance(layer, nn.Conv2d):
            calls = self.parts[n.name]
            return [t for part in calls for t in (part.weight(layer), _rows(layer.bias, part.rows))]
        rows = self.kept[n.name]
        if isinstance(layer, nn.Linear):
            columns = torch.from_numpy(self.inputs(n)).to(layer.weight.device)
            weight = _rows(layer.weight, rows)
            assert weight is not None
            return [weight.index_select(1, columns), _rows(layer.bias, rows)]
        return [_rows(t, rows) for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)]

    def run_node(self, n: fx.Node) -> Any:
        """The value of `n` over the kept channels."""
        layer = self.plan.submodule(n)
        if isinstance(layer, LAYERS):
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            return self._layer(n, layer, x)
        if is_padding(n):
            x = self.fetch_args_kwargs_from_env(n)[0][0]
            return place(x, position_padding(n), self.places(n).to(x.device))
        if is_reshape(n):
            return torch.flatten(self.fetch_args_kwargs_from_env(n)[0][0], 1)
        return super().run_node(n)

    def places(self, n: fx.Node) -> Tensor:
        """Where each kept channel of the padding `n` comes from in its compact input; -1 is zero."""
        inputs = self.inputs(n) + channel_padding(n)[0]
        found = np.searchsorted(inputs, self.kept[n.name])
        found[found == len(inputs)] = 0
        return torch.from_numpy(np.where(inputs[found] == self.kept[n.name], found, -1))

    def _layer(self, n: fx.Node, layer: Layer, x: Tensor) -> Tensor:
        tensors = self._tensors(n, layer)
        if isinstance(layer, nn.Conv2d):
            return convolve(x, layer, self.parts[n.name], tensors)
        if isinstance(layer, nn.Linear):
            return F.linear(x, *tensors)  # type: ignore[arg-type]
        return normalise(x, layer, self.kept[n.name], tensors)


def _rows(tensor: Tensor | None, rows: np.ndarray) -> Tensor | None:
    return None if tensor is None else tensor.index_select(0, torch.from_numpy(rows).to(tensor.device))


def convolve(x: Tensor, conv: nn.Conv2d, calls: list[Part], tensors: list[Tensor | None]) -> Tensor:
    """`conv` over the compact `x`, as `parts` divides it; `tensors` are each call's weight and bias."""
    results = []
    for part, weight, bias in zip(calls, tensors[::2], tensors[1::2], strict=True):
        own = x if part.positions is None else x.index_select(1, torch.from_numpy(part.positions).to(x.device))
        results.append(F.conv2d(own, weight, bias, conv.stride, conv.padding, conv.dilation, part.groups))  # type: ignore[arg-type]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


def normalise(x: Tensor, norm: Norm, rows: np.ndarray, tensors: list[Tensor | None]) -> Tensor:
    """`norm` over its channels `rows`, whose `tensors` are given; in training their statistics alone are moved."""
    weight, bias, own_mean, own_variance = tensors
    if own_mean is None or own_variance is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    y = F.batch_norm(x, own_mean, own_variance, weight, bias, norm.training, momentum or 0.0, norm.eps)
    if norm.training:
        places = torch.from_numpy(rows).to(x.device)
        for whole, own in ((norm.running_mean, own_mean), (norm.running_var, own_variance)):
            assert whole is not None
            whole.index_copy_(0, places, own)
    return y


def place(x: Tensor, padding: Sequence[int], places: Tensor) -> Tensor:
    """`x` padded by `padding` at its positions, channel `places[i]` of it at i, zeros where that is -1."""
    x = F.pad(x, list(padding))
    zeros = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    return torch.cat([zeros, x], dim=1).index_select(1, places + 1)
