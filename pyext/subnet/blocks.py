"""HCGNet's modules in sub-networks: their kept channels alone, as the operator `hybrid_block` runs them.

The operator's modules are of one width and their 3x3 convolutions have groups of one size, while a sub-network keeps of
each what it keeps. Modules and groups are therefore filled up with channels whose weights are zero, which are zero
after every operation; or several groups become one, whose weights between the groups are zero. Of these forms the one
with the fewest multiply-adds is taken: at most those of the whole block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyext.nn.hybrid_inference import are_block, tensors_of
from pyext.ops.hybrid_block import TENSORS, hybrid_block
from pyext.subnet.graph import Block, Plan

_AXES = {
    "conv1_1x1.norm": ("inputs",),
    "conv1_1x1.conv": ("squeeze", "inputs"),
    "conv2_3x3.norm": ("squeeze",),
    "conv_3x3.norm": ("growth",),
    "conv_3x3.conv": ("growth",),
    "conv_5x5.norm": ("growth",),
    "conv_5x5.conv": ("growth",),
    "global_context3x3": (None, "growth"),
    "global_context5x5": (None, "growth"),
    "fcall": ("attention", "branches"),
    "bn_attention": ("attention",),
    "fc3x3": ("growth", "attention"),
    "fc5x5": ("growth", "attention"),
    "global_forget_context": (None, "growth"),
    "bn_forget": ("forget",),
    "fc1": ("forget", "growth"),
    "fc2": ("growth", "forget"),
}
"""By submodule, what the first dimensions of its tensors count; a bias and statistics have the first alone."""
_GATES_COST = 40
"""Multiply-adds of the gates for each position and channel, about: two depthwise convolutions, five poolings."""


@dataclass(frozen=True)
class KeptBlock:
    """The kept channels of a dense block or a transition, as the operator reads them."""

    tensors: list[Tensor]
    outputs: Tensor | None
    """Which channels of the operator's result are kept ones; None: all."""
    stride: int
    dense: bool
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The kept channels of the block's result."""
        y = hybrid_block(x, self.tensors, stride=self.stride, dense=self.dense, eps=self.eps)
        return y if self.outputs is None else y.index_select(1, self.outputs)


def run_whole(blocks: Iterable[Block]) -> bool:
    """Whether all `blocks` are what the operator computes, with one eps."""
    modules: list[Any] = [block.module for block in blocks]
    alike = len({module.bn_forget.eps for module in modules}) == 1
    return alike and all(are_block([module], _stride(module), training=False) for module in modules)


def _stride(module: Any) -> int:
    return int(module.conv2_3x3.conv.stride[0])


class _Kept:
    """What a sub-network keeps of a module, channel numbers of the whole module."""

    def __init__(self, plan: Plan, path: str, selection: np.ndarray):
        self.module: Any = plan.blocks[path].module
        self.conv: nn.Conv2d = self.module.conv2_3x3.conv
        nodes = {str(node.target): node.name for node in plan.module.graph.nodes if node.op == "call_module"}

        def kept(name: str) -> np.ndarray:
            return np.flatnonzero(selection[plan.channels[nodes[f"{path}.{name}"]]])

        self.inputs, self.squeeze, self.growth = map(kept, ("conv1_1x1.norm", "conv1_1x1.conv", "conv2_3x3.conv"))
        self.attention, self.forget = kept("fcall"), kept("fc1")


def kept_block(plan: Plan, paths: Sequence[str], selection: np.ndarray, dense: bool) -> KeptBlock:
    """The modules at `paths`, of one dense block, or a transition, in the sub-network that keeps the channel groups
    `selection`. All modules are filled up to the widest."""
    modules = [_Kept(plan, path, selection) for path in paths]
    groups, squeezes, growths = _layout(modules)
    attentions, forgets = ([_padded(getattr(m, name), modules, name) for m in modules] for name in _HIDDEN)
    inputs, channels = modules[0].inputs, modules[0].module.in_channels
    tensors: list[Tensor] = []
    for own, squeeze, growth, *hidden in zip(modules, squeezes, growths, attentions, forgets, strict=True):
        branches = np.concatenate([growth, _moved(growth, own.conv.out_channels)])
        ids = dict(zip(_HIDDEN, hidden, strict=True), inputs=inputs, squeeze=squeeze, growth=growth, branches=branches)
        tensors += _gathered(own, ids, groups)
        inputs = np.concatenate([inputs, _moved(growth, channels)])
        channels += own.conv.out_channels
    real = np.flatnonzero((inputs if dense else growths[0]) >= 0)
    everything = len(real) == len(inputs if dense else growths[0])
    outputs = None if everything else torch.from_numpy(real).to(tensors[0].device)
    first = modules[0].module
    return KeptBlock(tensors, outputs, _stride(first), dense, first.bn_forget.eps)


_HIDDEN = ("attention", "forget")


def _moved(ids: np.ndarray, distance: int) -> np.ndarray:
    return np.where(ids < 0, -1, ids + distance)


def _padded(ids: np.ndarray, modules: Sequence[_Kept], name: str) -> np.ndarray:
    most = max(len(getattr(module, name)) for module in modules)
    return np.pad(ids, (0, most - len(ids)), constant_values=-1)


def _layout(modules: Sequence[_Kept]) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """Groups of the 3x3 convolutions, and the channels that each reads and gives: group by group, -1 for zeros."""
    found = []
    whole = math.gcd(*(module.conv.groups for module in modules))
    for groups in (n for n in range(1, whole + 1) if whole % n == 0):
        read = _filled([(m.squeeze, m.conv.in_channels) for m in modules], groups)
        given = _filled([(m.growth, m.conv.out_channels) for m in modules], groups)
        squeeze, growth = len(read[0]), len(given[0])
        inputs = len(modules[0].inputs) + growth * (len(modules) - 1) / 2  # in the mean
        cost = squeeze * (inputs + 9 * growth / groups) + _GATES_COST * growth
        found.append((cost, groups, read, given))
    return min(found, key=lambda form: form[:2])[1:]


def _filled(kept: Sequence[tuple[np.ndarray, int]], groups: int) -> list[np.ndarray]:
    """Kept channels, of so many, of each module: those of each group filled up with -1 to the most of any."""
    parts = [[ids[ids * groups // channels == group] for group in range(groups)] for ids, channels in kept]
    most = max(len(part) for own in parts for part in own)
    return [np.concatenate([np.pad(p, (0, most - len(p)), constant_values=-1) for p in own]) for own in parts]


def _gathered(own: _Kept, ids: dict[str, np.ndarray], groups: int) -> Iterator[Tensor]:
    """The module's tensors at the channels `ids`."""
    for name, tensor in zip(TENSORS, tensors_of(own.module), strict=True):
        owner, kind = name.rsplit(".", 1)
        if owner == "conv2_3x3.conv":
            yield _grouped_weight(own.conv, ids["squeeze"], ids["growth"], groups)
            continue
        lists = [None if axis is None else ids[axis] for axis in _AXES[owner][: tensor.dim()]]
        taken = functools.reduce(_taken, enumerate(lists), tensor.detach())
        if kind == "running_var" and lists[0] is not None:
            taken[torch.from_numpy(lists[0] < 0)] = 1
        yield taken


def _taken(tensor: Tensor, chosen: tuple[int, np.ndarray | None]) -> Tensor:
    """Of one dimension the places listed, zeros where that is -1."""
    dim, ids = chosen
    if ids is None:
        return tensor
    index = torch.from_numpy(ids).to(tensor.device)
    return tensor.index_select(dim, index.clamp(min=0)).index_fill(dim, (index < 0).nonzero()[:, 0], 0)


def _grouped_weight(conv: nn.Conv2d, squeeze: np.ndarray, growth: np.ndarray, groups: int) -> Tensor:
    """(len(growth), len(squeeze) / groups, 3, 3)."""
    fan_in, fan_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    columns = np.repeat(squeeze.reshape(groups, -1), len(growth) // groups, 0)
    rows = np.repeat(growth[:, None], columns.shape[1], 1)
    absent = (rows < 0) | (columns < 0) | (rows // fan_out != columns // fan_in)
    index = (torch.from_numpy(ids).to(conv.weight.device) for ids in (rows.clip(0), columns.clip(0) % fan_in))
    weight = conv.weight.detach()[tuple(index)]
    return weight.masked_fill(torch.from_numpy(absent).to(weight.device)[:, :, None, None], 0)
