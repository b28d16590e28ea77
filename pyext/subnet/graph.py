"""Which channels of a network belong together, read from its torch.fx graph.

Every channel of every tensor gets a number, its group. An operation that keeps channels apart (batch norm, activation,
pooling, depthwise convolution) hands the groups on; addition and multiplication of two tensors unite theirs pairwise;
concatenation appends them; a convolution or linear layer begins new ones. So all tensors that must lose a channel
together share its group, whatever connected them. A removed channel is zero after every operation, whatever that makes
of zero: a sigmoid's 0.5 is zeroed too, and the logits of a softmax between branches share the branches' groups.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyext.models.backbone import checked_images
from pyext.nn import SMG, BNReLUConv2d, DropBlock2d, GatedExcitation, HybridBlock, Transition
from pyext.nn.hooks import has_forward_hooks

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Conv2d, nn.Linear, *NORMS)
Norm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d
Layer: TypeAlias = nn.Conv2d | nn.Linear | Norm

_PLAIN = (BNReLUConv2d, GatedExcitation, HybridBlock, SMG, Transition)
"""Modules that choose among fused forms by what they are given: their method `plain` is traced."""

_CHANNELWISE_MODULES = (
    *NORMS,
    DropBlock2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_CHANNELWISE = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid"),
    *("tanh", "dropout", "dropout2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "contiguous", "clone"),
    *("checked_images", "to_torch_format", "to_convolution_format", "type_as"),
}
_PAIRWISE = {"add", "add_", "iadd", "sub", "mul", "mul_", "imul", "branch_selection"}
_CONCATENATIONS = {"cat", "concat"}
_RESHAPES = {"flatten", "view", "reshape"}


class UnsupportedNetwork(ValueError):
    """The network has an operation whose channels cannot be followed; the message names its node."""


@dataclass(frozen=True, eq=False)
class Block:
    """An SMG module or transition in a trace, which has its submodules alone."""

    module: SMG | Transition
    first: str
    """The first of its nodes."""
    last: str
    """That of its result before any DropBlock."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A traced network and the group of every channel.

    Attributes:
        module: the traced network; its modules are the network's own.
        channels: by node name, the group of each channel, int64 (C,).
        shapes: by node name, the shape without the batch for images of `input_shape`.
        gates: by layer, the node that a gate follows: the convolution, its batch norm, or the addition behind it.
        classes: the group of each output of the network, int64 (num_classes,).
        fixed: groups that are always kept: the image's channels and hidden linear layers' features, bool (groups,).
        input_shape: (C, H, W).
        blocks: by path, HCGNet's modules.
    """

    module: fx.GraphModule
    channels: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    gates: dict[str, str]
    classes: np.ndarray
    fixed: np.ndarray
    input_shape: tuple[int, ...]
    blocks: dict[str, Block]

    def submodule(self, node: fx.Node) -> nn.Module | None:
        """The module that `node` calls, or None."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def layers(self) -> Iterator[tuple[fx.Node, Layer]]:
        """The nodes with parameters, in the order in which they run."""
        for node in self.module.graph.nodes:
            module = self.submodule(node)
            if isinstance(module, LAYERS):
                yield node, module

    def inputs(self, node: fx.Node) -> np.ndarray:
        """The group of each channel that `node` reads."""
        return self.channels[str(node.args[0])]

    def groups_of(self, layer: str) -> np.ndarray:
        """The group of each channel of the gated `layer`."""
        return self.channels[self.gates[layer]]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def plan(model: nn.Module, input_shape: tuple[int, ...]) -> Plan:
    """Trace `model` and follow its channels.

    Args:
        model: a network of convolutions, batch norms, activations, pooling, additions, multiplications,
            concatenations, linear layers and the modules of `pyext.nn` for HCGNet and DenseNet, from images
            (N, C, H, W) to logits (N, num_classes). It is traced in eval mode.
        input_shape: (C, H, W) of its images.

    Raises:
        UnsupportedNetwork: torch.fx cannot trace it, or an operation's channels cannot be followed.
        ValueError: `input_shape` is not three positive numbers.
    """
    if len(input_shape) != 3 or any(size < 1 for size in input_shape):
        raise ValueError(f"plan: input_shape is {tuple(input_shape)}, expected (C, H, W)")
    with evaluating(model):
        try:
            tracer = _Tracer()
            with torch.enable_grad():  # without, modules may choose their form by the device of the images
                graph = tracer.trace(model)
            for node in graph.nodes:
                node.type = None  # annotations that are strings would keep the module from being pickled
            traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
        except Exception as error:  # a network's own code runs under the tracer, so anything can be raised
            name = type(model).__name__
            raise UnsupportedNetwork(f"plan: torch.fx cannot trace {name}: {str(error).splitlines()[0]}") from error
        like, shapes = next(model.parameters(), torch.empty(0)), _Shapes(traced)
        with torch.no_grad():
            shapes.run(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    return _Follower(traced, tuple(input_shape), shapes.found).plan(tracer.blocks)


class _Tracer(fx.Tracer):
    """Follows a network down to torch's modules and to those of `pyext.nn` that keep channels apart.

    Attributes:
        blocks: as `Plan` has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, Block] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is DropBlock2d or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plain = type(m) in _PLAIN and not has_forward_hooks(m)
        if plain:
            forward = m.plain  # type: ignore[assignment]
        before = next(iter(reversed(self.graph.nodes)))
        result = super().call_module(m, forward, args, kwargs)
        if plain and isinstance(m, (SMG, Transition)):
            drops = result.node.target == f"{self.path_of_module(m)}.dropblock"
            last = result.node.args[0] if drops else result.node
            self.blocks[self.path_of_module(m)] = Block(m, before.next.name, last.name)
        return result


class _Shapes(fx.Interpreter):
    """Runs a network and notes the shape, without the batch, of every tensor."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, ...]] = {}
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """The value of `n`; UnsupportedNetwork where it cannot be had."""
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever the network raises for images of this shape
            raise UnsupportedNetwork(f"plan: node {n.name} fails: {str(error).splitlines()[0]}") from error
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape[1:])
        return value


@dataclass
class _Groups:
    """Union-find over channel numbers."""

    parents: list[int] = field(default_factory=list)

    def fresh(self, count: int) -> np.ndarray:
        first = len(self.parents)
        self.parents += range(first, first + count)
        return np.arange(first, first + count)

    def root(self, i: int) -> int:
        while self.parents[i] != i:
            self.parents[i] = i = self.parents[self.parents[i]]
        return i

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((self.root(i), self.root(j)))
            self.parents[high] = low

    def numbered(self) -> np.ndarray:
        """The group of each number, counted from 0 without gaps."""
        roots = [self.root(i) for i in range(len(self.parents))]
        return np.unique(roots, return_inverse=True)[1]


class _Follower:
    """Follows the channels through one graph."""

    def __init__(self, module: fx.GraphModule, input_shape: tuple[int, ...], shapes: dict[fx.Node, tuple[int, ...]]):
        self.module, self.input_shape, self.shapes = module, input_shape, shapes
        self.groups = _Groups()
        self.channels: dict[fx.Node, np.ndarray] = {}
        self.fixed: list[np.ndarray] = []
        self.called: set[str] = set()

    def plan(self, blocks: dict[str, Block]) -> Plan:
        graph, classes = self.module.graph, np.empty(0, dtype=np.int64)
        for node in graph.nodes:
            if node.op == "output":
                classes = self._classes(node)
            elif node in self.shapes:
                self.channels[node] = self._follow(node)
        numbers = self.groups.numbered()
        channels = {node.name: numbers[ids] for node, ids in self.channels.items()}
        fixed = np.zeros(numbers.max() + 1, dtype=bool)
        for ids in self.fixed:
            fixed[numbers[ids]] = True
        fixed[numbers[classes]] = False
        shapes = {node.name: shape for node, shape in self.shapes.items()}
        gates = self._gates(set(numbers[classes].tolist()), channels, fixed)
        return Plan(self.module, channels, shapes, gates, numbers[classes], fixed, self.input_shape, blocks)

    def _classes(self, output: fx.Node) -> np.ndarray:
        logits = output.args[0]
        shape = self.shapes.get(logits) if isinstance(logits, fx.Node) else None
        if shape is None or len(shape) != 1:
            raise UnsupportedNetwork(f"plan: the network returns {shape or 'several values'}, expected logits (N, K)")
        found = self.channels[logits]  # type: ignore[index]
        if len({self.groups.root(i) for i in found.tolist()}) != len(found):
            raise UnsupportedNetwork(f"plan: node {logits}: classes share channels, so none can be left out alone")
        return found

    def _follow(self, node: fx.Node) -> np.ndarray:
        if node.op == "placeholder":
            return self._kept(self.groups.fresh(self.input_shape[0]))
        if node.op == "call_module":
            return self._module(node)
        if node.op in ("call_function", "call_method"):
            name = _name(node)
            rules: dict[str, Callable[[fx.Node], np.ndarray]] = {
                **dict.fromkeys(_CHANNELWISE, self._same),
                **dict.fromkeys(_PAIRWISE, self._pairwise),
                **dict.fromkeys(_CONCATENATIONS, self._concatenated),
                **dict.fromkeys(_RESHAPES, self._flattened),
                **{
                    "mean": self._mean,
                    "sum": self._mean,
                    "getitem": self._cropped,
                    "pad": self._padded,
                    "context_pool": self._pooled,
                },
            }
            if name in rules:
                return rules[name](node)
        raise self._unsupported(node, "an operation whose channels cannot be followed")

    def _kept(self, ids: np.ndarray) -> np.ndarray:
        self.fixed.append(ids)
        return ids

    def _module(self, node: fx.Node) -> np.ndarray:
        module = self._called(node)
        if isinstance(module, LAYERS) and str(node.target) in self.called:
            raise self._unsupported(node, "a layer that is called twice")
        self.called.add(str(node.target))
        if type(module) is nn.Conv2d:
            return self._convolution(node, module)
        if type(module) is nn.Linear:
            self._input(node)
            return self._kept(self.groups.fresh(module.out_features))
        if type(module) is nn.Flatten:
            return self._flattened(node)
        if type(module) in _CHANNELWISE_MODULES:
            return self._same(node)
        raise self._unsupported(node, f"a {type(module).__name__}, whose channels cannot be followed")

    def _called(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _convolution(self, node: fx.Node, conv: nn.Conv2d) -> np.ndarray:
        if conv.padding_mode != "zeros":
            raise self._unsupported(node, f"a convolution with padding_mode {conv.padding_mode!r}")
        channels = self._input(node)
        if conv.groups == conv.in_channels and conv.groups > 1:  # depthwise, each channel `multiplier` times
            return np.repeat(channels, conv.out_channels // conv.in_channels)
        return self.groups.fresh(conv.out_channels)

    def _input(self, node: fx.Node) -> np.ndarray:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source not in self.channels:
            raise self._unsupported(node, "an operation without a tensor as its first argument")
        return self.channels[source]

    def _same(self, node: fx.Node) -> np.ndarray:
        return self._input(node)

    def _pairwise(self, node: fx.Node) -> np.ndarray:
        operands = node.args if _name(node) == "branch_selection" else node.args[:2]
        tensors = [a for a in operands if isinstance(a, fx.Node) and a in self.channels]
        others = [a for a in operands if a not in tensors]
        if any(not isinstance(other, (int, float)) for other in others) or not tensors:
            raise self._unsupported(node, "arithmetic with something other than tensors and numbers")
        if len({len(self.shapes[tensor]) for tensor in tensors}) > 1:
            raise self._unsupported(node, "arithmetic with tensors of different dimensions")
        found = [self.channels[tensor] for tensor in tensors]
        first = max(found, key=len)
        for other in found:
            if len(other) == len(first):
                self.groups.unite(first, other)
            else:  # one, which all channels of the others share: it is always kept
                self._kept(other)
        return first

    def _concatenated(self, node: fx.Node) -> np.ndarray:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        tensors: Any = node.args[0] if node.args else node.kwargs["tensors"]
        rank = len(self.shapes[node]) + 1
        if dim not in (1, 1 - rank):
            raise self._unsupported(node, f"a concatenation over dimension {dim}, expected the channels (1)")
        return np.concatenate([self.channels[tensor] for tensor in tensors])

    def _flattened(self, node: fx.Node) -> np.ndarray:
        channels, shape = self._input(node), self.shapes[node]
        if len(shape) != 1 or shape[0] % len(channels):
            raise self._unsupported(node, f"a reshape to (N, {', '.join(map(str, shape))}), expected (N, features)")
        return np.repeat(channels, shape[0] // len(channels))

    def _mean(self, node: fx.Node) -> np.ndarray:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        over = {d % 4 for d in dims} if isinstance(dims, (tuple, list)) else None
        if over is None or not over <= {2, 3}:
            raise self._unsupported(node, f"a {_name(node)} over {dims}, expected the positions (2, 3)")
        return self._input(node)

    def _pooled(self, node: fx.Node) -> np.ndarray:
        """The mean over positions, weighted by a map that all channels share, which is therefore always kept."""
        context: Any = node.args[1]
        self._kept(self.channels[context])
        return self._input(node)

    def _cropped(self, node: fx.Node) -> np.ndarray:
        index: Any = node.args[1]
        if not isinstance(index, tuple) or index[:2] != (slice(None),) * 2:
            raise self._unsupported(node, "an index into images or channels, expected one into positions")
        return self._input(node)

    def _padded(self, node: fx.Node) -> np.ndarray:
        """Zero channels before and after are groups of their own: an addition gives them their partners."""
        before, after = channel_padding(node)
        channels, (pad, *rest) = self._input(node), node.args[1:]
        if len(pad) > 6 or rest[:1] not in ([], ["constant"]) or any(rest[1:]) or node.kwargs.get("value"):  # type: ignore[arg-type]
            raise self._unsupported(node, "padding other than with zeros, of channels and positions")
        return np.concatenate([self.groups.fresh(before), channels, self.groups.fresh(after)])

    def _gates(self, classes: set[int], channels: dict[str, np.ndarray], fixed: np.ndarray) -> dict[str, str]:
        gates: dict[str, str] = {}
        for node in self.module.graph.nodes:
            if node.op != "call_module" or not isinstance(self._called(node), nn.Conv2d):
                continue
            gate = self._gate(node)
            if fixed[channels[node.name]].all():  # there is no choice to make
                continue
            if gate.name not in gates.values() and not classes.intersection(channels[gate.name].tolist()):
                gates[str(node.target)] = gate.name
        if not gates:
            raise UnsupportedNetwork("plan: the network has no convolution whose channels could be left out")
        return gates

    def _gate(self, conv: fx.Node) -> fx.Node:
        """Where the gate of `conv` stands: before the activation; on a residual block's output, the addition."""
        gate = conv
        user = only_user(gate)
        if user is not None and is_reshape(user) and self.shapes[conv][1:] == (1, 1):
            user = only_user(user)
        if user is not None and user.op == "call_module" and isinstance(self._called(user), NORMS):
            gate = user
        user = only_user(gate)
        if user is not None and user.op in ("call_function", "call_method") and _name(user) in ("add", "add_", "iadd"):
            gate = user
        return gate

    def _unsupported(self, node: fx.Node, what: str) -> UnsupportedNetwork:
        called = f" ({node.target})" if node.op == "call_module" else ""
        return UnsupportedNetwork(f"plan: node {node.name}{called} is {what}")


def channel_padding(node: fx.Node) -> tuple[int, int]:
    """Zero channels that the padding `node` puts before and after those of its input."""
    pad: Any = (*node.args[1], *(0,) * 6)  # type: ignore[misc]
    return pad[4], pad[5]


def position_padding(node: fx.Node) -> tuple[int, ...]:
    """How far the padding `node` pads columns and rows, as ``torch.nn.functional.pad`` takes it."""
    pad: Any = (*node.args[1], *(0,) * 4)  # type: ignore[misc]
    return pad[:4]


def is_padding(node: fx.Node) -> bool:
    """Whether `node` adds zero channels."""
    return node.op == "call_function" and _name(node) == "pad" and channel_padding(node) != (0, 0)


def is_reshape(node: fx.Node) -> bool:
    """Whether `node` flattens maps to features by numbers that hold for the whole network alone."""
    return node.op in ("call_function", "call_method") and _name(node) in _RESHAPES


def is_mean(plan: Plan, node: fx.Node) -> bool:
    """Whether `node` is the mean of maps over all positions."""
    module = plan.submodule(node)
    if type(module) is nn.AdaptiveAvgPool2d:
        return module.output_size in (1, (1, 1))
    if node.op not in ("call_function", "call_method") or len(plan.shapes.get(str(node.args[0]), ())) != 3:
        return False
    size, rest = node.args[1:2], set(node.kwargs) - {"dim", "keepdim"}
    if _name(node) == "adaptive_avg_pool2d":
        return size in ((1,), ((1, 1),)) and not node.kwargs
    dims = node.kwargs.get("dim", *size)
    return _name(node) == "mean" and not rest and isinstance(dims, (tuple, list)) and {d % 4 for d in dims} == {2, 3}  # type: ignore[operator]


def is_concatenation(node: fx.Node) -> bool:
    """Whether `node` appends tensors' channels."""
    return node.op == "call_function" and _name(node) in _CONCATENATIONS


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if node.target is F.max_pool2d:  # torch's dispatcher over return_indices has another name
        return "max_pool2d"
    if node.target is operator.getitem:
        return "getitem"
    return "checked_images" if node.target is checked_images else getattr(node.target, "__name__", str(node.target))


def calls(module: fx.GraphModule, node: fx.Node, kind: type[nn.Module], name: str) -> bool:
    """Whether `node` calls a submodule of exactly `kind`, or the function or method `name`."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is kind
    return node.op in ("call_function", "call_method") and _name(node) == name


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads the value of `node`, if there is just one."""
    return next(iter(node.users)) if len(node.users) == 1 else None
