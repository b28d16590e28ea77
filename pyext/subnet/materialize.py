"""A sub-network as an ordinary, physically small module with weights of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyext.subnet.execution import Compact
from pyext.subnet.graph import NORMS, Norm, Plan, is_padding, is_reshape, position_padding


@dataclass(frozen=True)
class Part:
    """Groups of a convolution that keep equally many inputs and outputs: one convolution.

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
        """The kept part of the weight of `conv`."""
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


class PartedConv2d(nn.Module):
    """A grouped convolution whose groups keep different numbers of channels: one convolution for each.

    Args:
        parts: the convolutions, whose outputs are concatenated.
        positions: the channels of the input that each reads.
    """

    def __init__(self, parts: list[nn.Conv2d], positions: list[Tensor]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        for i, own in enumerate(positions):
            self.register_buffer(f"positions{i}", own, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, sum of the parts' outputs, H', W')."""
        own = [x.index_select(1, getattr(self, f"positions{i}")) for i in range(len(self.parts))]
        return torch.cat([conv(y) for conv, y in zip(self.parts, own, strict=True)], dim=1)


class PlacedPadding(nn.Module):
    """Zero padding of positions and channels, of which some channels are left out.

    Args:
        padding: of columns and rows, as ``torch.nn.functional.pad`` takes it.
        places: int64 (channels,), the input channel that each output channel shows, -1 for zeros.
    """

    def __init__(self, padding: tuple[int, ...], places: Tensor):
        super().__init__()
        self.padding = padding
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H', W')."""
        return place(x, self.padding, self.get_buffer("places"))


def place(x: Tensor, padding: Sequence[int], places: Tensor) -> Tensor:
    """`x` padded by `padding` at its positions, channel `places[i]` of it at i, zeros where that is -1."""
    x = F.pad(x, list(padding))
    zeros = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    return torch.cat([zeros, x], dim=1).index_select(1, places + 1)


@torch.no_grad()
def materialize(plan: Plan, compact: Compact, name: str) -> fx.GraphModule:
    """A module in eval mode that computes what `compact` does and shares no memory with the network."""
    root, graph = nn.Module(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(plan.module.graph, copies))
    for old, new in copies.items():
        if (module := plan.submodule(old)) is not None:
            _add(root, str(old.target), _small(old, module, compact))
        elif is_padding(old):
            target = f"places_{new.name}"
            root.add_module(target, PlacedPadding(position_padding(old), torch.from_numpy(compact.places(old))))
            _replace(new, functools.partial(graph.call_module, target))
        elif is_reshape(old):
            _replace(new, lambda sources: graph.call_function(torch.flatten, (*sources, 1)))
    return fx.GraphModule(root, graph, class_name=name).eval()


def _replace(node: fx.Node, make: Callable[[tuple[Any, ...]], fx.Node]) -> None:
    with node.graph.inserting_before(node):
        other = make((node.args[0],))
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _add(root: nn.Module, target: str, module: nn.Module) -> None:
    """Put `module` where `target` says, with plain modules on the way: the small network has the names of the whole."""
    *path, last = target.split(".")
    for name in path:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(last, module)


def _small(node: fx.Node, module: nn.Module, compact: Compact) -> nn.Module:
    kept = compact.kept(node.name)
    outputs = torch.from_numpy(kept)
    if isinstance(module, nn.Conv2d):
        return _small_convolution(module, parts(module, compact.inputs(node), kept))
    if isinstance(module, nn.Linear):
        inputs = torch.from_numpy(compact.inputs(node))
        like: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
        linear = nn.Linear(len(inputs), len(outputs), module.bias is not None, **like)
        linear.weight.copy_(module.weight[outputs][:, inputs])
        if module.bias is not None:
            linear.bias.copy_(module.bias[outputs])
        return linear
    if isinstance(module, NORMS):
        return _small_norm(module, outputs)
    return copy.deepcopy(module)


def _small_convolution(conv: nn.Conv2d, calls: list[Part]) -> nn.Module:
    small = []
    for part in calls:
        weight = part.weight(conv)
        settings: dict[str, Any] = {
            name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")
        }
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "bias": conv.bias is not None}
        channels = weight.shape[1] * part.groups
        own = nn.Conv2d(channels, len(weight), groups=part.groups, **settings, **like)
        own.weight.copy_(weight)
        if own.bias is not None and conv.bias is not None:
            own.bias.copy_(conv.bias[torch.from_numpy(part.rows)])
        small.append(own)
    read = [part.positions for part in calls if part.positions is not None]
    positions = [torch.from_numpy(own).to(conv.weight.device) for own in read]
    return PartedConv2d(small, positions) if positions else small[0]


def _small_norm(norm: Norm, outputs: Tensor) -> Norm:
    like = next((t for t in (norm.weight, norm.running_mean) if t is not None), torch.empty(0))
    tracked = norm.running_mean is not None
    small = type(norm)(len(outputs), norm.eps, norm.momentum, norm.affine, tracked, like.device, like.dtype)
    for name, tensor in norm.state_dict().items():
        small.get_buffer(name).copy_(tensor) if tensor.dim() == 0 else getattr(small, name).copy_(tensor[outputs])
    return small


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Measure anew the running statistics of every batch norm of `module`, and return it in eval mode.

    A sub-network's maps have other means and variances than the whole network's, whose statistics it starts with. No
    weight is changed. Meant for `Subnet.materialize()`: on a shared network it would change the network's statistics.

    Args:
        module: a network with batch norm that tracks statistics.
        batches: images (N, C, H, W) of the sub-task; each batch counts alike.

    Raises:
        ValueError: no batch, or no batch norm that tracks statistics.
    """
    norms = [m for m in module.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        raise ValueError("recalibrate: module has no batch norm with running statistics")
    momenta, count = [norm.momentum for norm in norms], 0
    module.eval()
    for images in batches:
        if count == 0:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over the batches
                norm.train()
        module(images)
        count += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    if count == 0:
        raise ValueError("recalibrate: batches has no batch")
    return module.eval()
