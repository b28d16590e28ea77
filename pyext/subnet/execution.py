"""Sub-networks' operations over kept channels, on the whole network's own weights.

A convolution runs as `pyext.ops.masked_conv2d`, together with the batch norm, activation and max-pool that follow it in
evaluation. Images of one batch may each have a sub-network of their own: tensors then hold, of each image, the channels
of its sub-network, and behind the last one of a smaller sub-network whatever it may be, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyext._backend import requested
from pyext._C import unchanged
from pyext.nn.changes import contents, versions
from pyext.nn.hooks import has_forward_hooks
from pyext.nn.masked import autocast, split_padding
from pyext.ops.hybrid_block import OPERATOR as HYBRID_BLOCK
from pyext.ops.masked_conv2d import (
    ACTIVATIONS,
    OPERATOR,
    PreparedChain,
    PreparedConv2d,
    masked_conv2d,
    masked_linear,
    pack_masked_conv2d,
    with_bias,
)
from pyext.subnet.blocks import KeptBlock, kept_block, run_whole
from pyext.subnet.graph import (
    LAYERS,
    NORMS,
    Block,
    Layer,
    Norm,
    Plan,
    calls,
    channel_padding,
    is_concatenation,
    is_mean,
    is_padding,
    is_reshape,
    only_user,
    position_padding,
)

DENSE_BATCH, DENSE_INPUTS = 8, 40
"""From so many images, and so many kept inputs in the mean of all multiply-adds, torch's own convolutions on folded
weights in channels_last are faster (bench/results/subnet_execution/cpu.md)."""


@dataclass(frozen=True)
class Step:
    """A node of the network, or a convolution with what follows it; `value` is the node whose value it gives.

    With `block` it is the whole module of that path (`Plan.blocks`), of which `node` is the first.
    """

    node: fx.Node
    value: fx.Node
    norm: fx.Node | None = None
    activation: str | None = None
    pool: int = 1
    block: str | None = None

    @property
    def source(self) -> str:
        """What the node reads first."""
        return str(self.node.args[0])


@dataclass(frozen=True)
class Program:
    """Steps in their order, some of them together, and by place the values that nothing reads afterwards."""

    steps: list[tuple[Step, ...]]
    unused: list[list[str]]

    @staticmethod
    def of(steps: list[tuple[Step, ...]]) -> Program:
        """The program of `steps`."""
        last = {source.name: i for i, (step, *_) in enumerate(steps) for source in step.node.all_input_nodes}
        unused: list[list[str]] = [[] for _ in steps]
        for name, i in last.items():
            unused[i].append(name)
        return Program(steps, unused)


class Looked(NamedTuple):
    """What the layers of a network hold, and what follows from it.

    To ask every layer anew takes a tenth of a small sub-network's time, to see that nothing has changed a hundredth.
    """

    dictionaries: tuple[dict[str, Any], ...]
    items: tuple[tuple[Any, ...], ...]
    tensors: list[Tensor] | None
    """Parameters and buffers; None where they do not tell whether their values change."""
    training: bool
    """Whether a batch norm takes the statistics of the batch."""
    tracked: bool
    """Whether every batch norm has running statistics."""

    @staticmethod
    def at(layers: Sequence[Layer]) -> Looked:
        """The layers as they are."""
        dictionaries = [d for m in layers for d in (m.__dict__, m._parameters, m._buffers)]
        held = [t for m in layers for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        versioned = not any(tensor.is_inference() for tensor in held)
        norms = [m for m in layers if isinstance(m, NORMS)]
        training, tracked = any(m.training for m in norms), all(m.running_mean is not None for m in norms)
        return Looked(tuple(dictionaries), contents(dictionaries), held if versioned else None, training, tracked)


class Recipe:
    """What running sub-networks of one plan takes, whatever their channels: steps, layers, and whether those changed.

    Attributes:
        stamp: another number whenever weights or statistics of the network have changed; None where that cannot be
            told, so that nothing made of them can be kept.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.modules: dict[str, Any] = {node.name: plan.submodule(node) for node in plan.module.graph.nodes}
        plain, fused = (_steps(plan, fuses, {}) for fuses in (False, True))
        self.programs = {
            "plain": Program.of([(step,) for step in plain]),
            "fused": Program.of([(step,) for step in fused]),
            "chained": Program.of(_chained(plan, fused)),
            "blocks": Program.of(_chained(plan, _steps(plan, True, plan.blocks))),
        }
        self.operations = {step.node.name: _operation(step.node, self.modules[step.node.name]) for step in plain}
        numbers: dict[bytes, int] = {}
        self.lists = {name: numbers.setdefault(ids.tobytes(), len(numbers)) for name, ids in plan.channels.items()}
        self._layers = [layer for _, layer in plan.layers()]
        self._looked: Looked | None = None
        self._runs_blocks: bool | None = None
        self._versions: list[tuple[int, int]] = []
        self._count = 0

    def look(self) -> Looked:
        """What the layers hold now."""
        if torch.compiler.is_compiling():
            return Looked.at(self._layers)
        if self._looked is None or not unchanged(self._looked.dictionaries, self._looked.items):
            self._looked, self._versions, self._runs_blocks = Looked.at(self._layers), [], None
        return self._looked

    def runs_blocks(self) -> bool:
        """Whether there are modules of HCGNet and `hybrid_block` computes what they do."""
        if self._runs_blocks is None:
            self._runs_blocks = bool(self.plan.blocks) and run_whole(self.plan.blocks.values())
        return self._runs_blocks

    def stamp(self) -> int | None:
        """See the class."""
        if torch.compiler.is_compiling():
            return None
        tensors = self.look().tensors
        if tensors is None:
            return None
        found = versions(tensors)
        if found != self._versions:
            self._versions, self._count = found, self._count + 1
        return self._count


def _steps(plan: Plan, fused: bool, blocks: dict[str, Block]) -> list[Step]:
    """The nodes in their order; with `fused` convolutions and what follows them, each of `blocks` in one step."""
    found: list[Step] = []
    done: set[fx.Node] = set()
    nodes = {node.name: node for node in plan.module.graph.nodes}
    starts = {block.first: (nodes[block.last], path) for path, block in blocks.items()}
    for node in nodes.values():
        if node.op in ("placeholder", "output") or node in done:
            continue
        if node.name in starts:
            value, path = starts[node.name]
            found.append(Step(node, value, block=path))
            while node is not value:
                node = node.next
                done.add(node)
            continue
        step = _fused(plan, node) if fused and isinstance(plan.submodule(node), nn.Conv2d) else Step(node, node)
        found.append(step)
        while node is not step.value:
            node = next(iter(node.users))
            done.add(node)
    return found


def _fused(plan: Plan, conv: fx.Node) -> Step:
    """The convolution with the batch norm, activation and max-pool that follow it, each the only reader of the last."""
    value, norm, activation, pool = conv, None, None, 1
    user = only_user(value)
    if user is not None and isinstance(plan.submodule(user), NORMS):
        value = norm = user
        user = only_user(value)
    if user is not None and (found := _activation(plan, user)) is not None:
        value, activation = user, found
        user = only_user(value)
    if user is not None and _pools_pairs(plan, user):
        value, pool = user, 2
    return Step(conv, value, norm, activation, pool)


def _activation(plan: Plan, node: fx.Node) -> str | None:
    if _is_hooked(plan, node):
        return None
    for kind, names in ((nn.ReLU, ("relu", "relu_")), (nn.ReLU6, ("relu6",))):
        if any(calls(plan.module, node, kind, name) for name in names):
            return names[0]
    return None


def _pools_pairs(plan: Plan, node: fx.Node) -> bool:
    """Whether `node` is a max-pool of windows of 2x2, one beside the other, and nothing else."""
    module = plan.submodule(node)
    if _is_hooked(plan, node):
        return False
    if type(module) is nn.MaxPool2d:
        settings = (module.kernel_size, module.stride, module.padding, module.dilation)
        plain = not module.ceil_mode and not module.return_indices
        return plain and all(s in (n, (n, n)) for s, n in zip(settings, (2, 2, 0, 1), strict=True))
    return calls(plan.module, node, nn.MaxPool2d, "max_pool2d") and node.args[1:] == (2,) and not node.kwargs


def _is_hooked(plan: Plan, node: fx.Node) -> bool:
    module = plan.submodule(node)
    return module is not None and has_forward_hooks(module)


def _chained(plan: Plan, steps: list[Step]) -> list[tuple[Step, ...]]:
    """Steps of one chain together: convolutions, the mean over positions behind them and a linear layer on that, each
    the only reader of the one before; or modules of one dense block."""
    found: list[tuple[Step, ...]] = []
    kinds = {step.node: _kind(plan, step) for step in steps}
    for step in steps:
        last = found[-1][-1] if found else None
        if last is not None and _reads_alone(step, last) and kinds[step.node] in _FOLLOWS[kinds[last.node]]:
            found[-1] += (step,)
        else:
            found.append((step,))
            if kinds[step.node] == "flattening":  # of maps that may be larger than one number
                kinds[step.node] = None
    return found


def _reads_alone(step: Step, last: Step) -> bool:
    if step.block is not None:  # a dense module appends its result to what it reads
        return step.source == last.value.name and set(last.value.users) == {step.node, step.value}
    return only_user(last.value) is step.node


_FOLLOWS: dict[str | None, tuple[str, ...]] = {
    "convolution": ("convolution", "mean"),
    "mean": ("flattening", "linear"),
    "flattening": ("linear",),
    "linear": (),
    "dense": ("dense",),
    None: (),
}
"""What may come next in a chain. A flattening is there behind a mean alone: as in the mean, a map is one number."""


def _kind(plan: Plan, step: Step) -> str | None:
    """What `step` is in a chain."""
    if step.block is not None:
        return "dense" if is_concatenation(step.value) else None
    layer = plan.submodule(step.node)
    if isinstance(layer, nn.Conv2d):
        return None if any(split_padding(layer)[0]) else "convolution"
    if isinstance(layer, nn.Linear):
        return "linear"
    if _is_hooked(plan, step.node):
        return None
    if is_mean(plan, step.node):
        return "mean"
    return "flattening" if flattens(plan, step.node) else None


def flattens(plan: Plan, node: fx.Node) -> bool:
    """Whether `node` makes features of maps."""
    return is_reshape(node) or isinstance(plan.submodule(node), nn.Flatten)


def _operation(node: fx.Node, module: nn.Module | None) -> Callable[[dict[str, Any]], Any]:
    """The node as a function of the values so far."""
    if module is not None and len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs:
        source = node.args[0].name
        return lambda values: module(values[source])

    def call(values: dict[str, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return call


@dataclass(frozen=True)
class Dense:
    """A convolution's kept weights, with batch norm, in channels_last: for torch's own convolution."""

    weight: Tensor
    bias: Tensor | None
    conv: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:
        """Without what follows the convolution."""
        conv = self.conv
        return F.conv2d(x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]


def _own_bytes(gathered: Any) -> int:
    """Of the tensors among its attributes that are no parameters."""
    tensors = [t for value in vars(gathered).values() for t in (value if isinstance(value, list) else [value])]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor) and not isinstance(t, nn.Parameter))


@dataclass
class Compact:
    """Runs the sub-networks of `selections`, each the channel groups that it keeps, bool (groups,).

    Without gradients the kept weights are gathered once and used again until the network's change; `forget` drops them.
    `bytes` is what they take.
    """

    recipe: Recipe
    selections: Sequence[np.ndarray]
    bytes: int = 0
    _lists: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    _gathered: dict[tuple[str, type, int], Any] = field(default_factory=dict)
    _indices: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    _stamp: int | None = None
    _suits_dense: bool | None = None

    @property
    def plan(self) -> Plan:
        """The network's."""
        return self.recipe.plan

    @property
    def device(self) -> torch.device:
        """Where the network is now."""
        return next(self.plan.module.parameters()).device

    def forget(self) -> None:
        """Let go of gathered weights."""
        self._gathered.clear()
        self.bytes = 0

    def gathered(self, step: Step, kind: type, make: Callable[[Step], Any], selection: int = 0) -> Any:
        """What `make` makes of the weights of `step`, kept until they change."""
        key = step.node.name, kind, selection
        found = self._gathered.get(key)
        if found is None:
            self._gathered[key] = found = make(step)
            self.bytes += _own_bytes(found)
        return found

    def kept(self, name: str, selection: int = 0) -> np.ndarray:
        """The channels that a sub-network keeps of a node's value."""
        return np.flatnonzero(self.selections[selection][self.plan.channels[name]])

    def inputs(self, node: fx.Node) -> np.ndarray:
        """The channels that the first sub-network keeps of what `node` reads."""
        return self.kept(str(node.args[0]))

    def lists(self, name: str) -> Tensor:
        """Those of all sub-networks, int64 (sub-networks, most channels), -1 behind the last of a shorter list."""
        key = self.recipe.lists[name], self.device
        found = self._lists.get(key)
        if found is None:
            rows = [torch.from_numpy(self.kept(name, i)) for i in range(len(self.selections))]
            found = rows[0][None] if len(rows) == 1 else nn.utils.rnn.pad_sequence(rows, True, -1)
            self._lists[key] = found = found.to(self.device)
        return found

    def run(self, x: Tensor, subnets: Tensor | None = None) -> Tensor:
        """The logits of images x (N, C, H, W); `subnets` int64 (N,) gives each image's sub-network, if several."""
        recipe, looked = self.recipe, self.recipe.look()
        if subnets is not None and looked.training:
            raise ValueError("task: images of several sub-networks have no batch statistics in common: call eval()")
        fused = not looked.training and looked.tracked
        run = _Run(self, subnets, x, self._keeps())
        chains = fused and run.prepared and not run.dense
        whole = chains and recipe.runs_blocks() and HYBRID_BLOCK.has_kernel(x) and not torch.is_autocast_enabled("cpu")
        name = "blocks" if whole else "chained" if chains else "fused" if fused else "plain"
        program = recipe.programs[name]
        if run.dense:
            x = x.contiguous(memory_format=torch.channels_last)
        values: dict[str, Any] = {next(iter(self.plan.module.graph.nodes)).name: x}
        result: Any = x
        for steps, unused in zip(program.steps, program.unused, strict=True):
            result = run.steps(steps, values)
            for name in unused:
                del values[name]
            values[steps[-1].value.name] = result
        return result

    def _keeps(self) -> bool:
        """Whether constants made of weights can be kept; those of older weights are dropped."""
        if torch.is_grad_enabled():
            return False
        stamp = self.recipe.stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            self.forget()
        return stamp is not None

    def suits_dense(self) -> bool:
        """Whether torch's own convolutions are faster for a batch."""
        if self._suits_dense is None:
            products = weighted = 0
            plain = len(self.selections) == 1
            for node, layer in self.plan.layers():
                if isinstance(layer, nn.Conv2d):
                    inputs = len(self.inputs(node))
                    size = layer.kernel_size[0] * layer.kernel_size[1] * int(np.prod(self.plan.shapes[node.name][1:]))
                    products += inputs * len(self.kept(node.name)) * size
                    weighted += inputs * inputs * len(self.kept(node.name)) * size
                    plain = plain and layer.groups == 1
            self._suits_dense = plain and weighted >= DENSE_INPUTS * products
        return self._suits_dense

    def index(self, name: str, make: Callable[[int], np.ndarray]) -> Tensor:
        """`make(selection)` of all sub-networks, int64 (sub-networks, the longest), 0 behind shorter ones; kept."""
        key = name, self.device
        found = self._indices.get(key)
        if found is None:
            rows = [torch.from_numpy(make(i)) for i in range(len(self.selections))]
            self._indices[key] = found = nn.utils.rnn.pad_sequence(rows, True, 0).to(self.device)
        return found

    def places(self, node: fx.Node, selection: int = 0) -> np.ndarray:
        """Where each kept channel of the padding `node` comes from in its compact input; -1 is zero."""
        inputs = self.kept(str(node.args[0]), selection) + channel_padding(node)[0]
        outputs = self.kept(node.name, selection)
        found = np.searchsorted(inputs, outputs)
        found[found == len(inputs)] = 0
        return np.where(inputs[found] == outputs, found, -1)


class _Run:
    """One run of a `Compact`: how its operations are computed."""

    def __init__(self, compact: Compact, subnets: Tensor | None, x: Tensor, keeps: bool):
        self.compact, self.recipe, self.subnets = compact, compact.recipe, subnets
        backend = OPERATOR.choose(None, x)
        self.prepared = keeps and backend == "cpu"
        self.dense = (
            self.prepared
            and requested() == "auto"
            and len(x) >= DENSE_BATCH
            and x.dtype == torch.float32
            and compact.suits_dense()
        )

    def steps(self, steps: tuple[Step, ...], values: dict[str, Any]) -> Any:
        """The value of the last of `steps`."""
        if steps[0].block is not None:
            return self._blocks(steps, values[steps[0].source])
        return self.value(steps[0], values) if len(steps) == 1 else self.chain(steps, values)

    def _blocks(self, steps: tuple[Step, ...], x: Tensor) -> Tensor | None:
        """Modules of one dense block, or a transition."""
        if self.subnets is None:
            return self._block(steps, x, 0)
        longest = self.compact.lists(steps[-1].value.name).shape[1]
        out: Tensor | None = None
        for selection in self.subnets.unique().tolist() or [0]:
            images = (self.subnets == selection).nonzero()[:, 0]
            own = x[images][:, : len(self.compact.kept(steps[0].source, selection))]
            y = self._block(steps, own, selection)
            out = x.new_zeros(len(x), longest, *y.shape[2:]) if out is None else out
            out[images, : y.shape[1]] = y
        return out

    def _block(self, steps: tuple[Step, ...], x: Tensor, selection: int) -> Tensor:
        def make(_: Step) -> KeptBlock:
            paths, dense = [str(step.block) for step in steps], is_concatenation(steps[-1].value)
            return kept_block(self.compact.plan, paths, self.compact.selections[selection], dense)

        return self.compact.gathered(steps[0], KeptBlock, make, selection)(x)

    def value(self, step: Step, values: dict[str, Any]) -> Any:
        """The value of `step`."""
        node = step.node
        layer = self.recipe.modules[node.name]
        if isinstance(layer, LAYERS):
            x = values[step.source]
            if isinstance(layer, nn.Conv2d):
                return self._convolve(step, layer, x)
            return self._linear(step, layer, x) if isinstance(layer, nn.Linear) else self._normalise(step, layer, x)
        if is_padding(node):
            places = self.compact.index(node.name, lambda i: self.compact.places(node, i) + 1)
            x = F.pad(values[step.source], position_padding(node))
            return self._select(torch.cat([x.new_zeros(len(x), 1, *x.shape[2:]), x], dim=1), places)
        if is_reshape(node):
            return torch.flatten(values[step.source], 1)
        result = self.recipe.operations[node.name](values)
        if self.subnets is not None and is_concatenation(node):
            return self._select(result, self.compact.index(node.name, lambda i: self._joined(node, i)))
        return result

    def chain(self, steps: tuple[Step, ...], values: dict[str, Any]) -> Tensor:
        """The value of the last of several steps that follow one another."""

        def make(_: Step) -> PreparedChain:
            links = [step for step in steps if not flattens(self.compact.plan, step.node)]
            return PreparedChain.of([self._link(step) for step in links])

        x = autocast(values[steps[0].source])
        result = self.compact.gathered(steps[0], PreparedChain, make)(x, self.subnets)
        whole = self.compact.plan.shapes[steps[-1].value.name]
        return result if len(whole) == result.dim() - 1 else result.flatten(1)

    def _joined(self, node: fx.Node, selection: int) -> np.ndarray:
        """Where the channels of a sub-network stand in a concatenation of tensors that have room for any's."""
        sources = [source.name for source in node.all_input_nodes]
        widths = [self.compact.lists(source).shape[1] for source in sources]
        starts = np.cumsum([0, *widths[:-1]])
        return np.concatenate(
            [start + np.arange(len(self.compact.kept(s, selection))) for s, start in zip(sources, starts, strict=True)]
        )

    def _select(self, x: Tensor, index: Tensor) -> Tensor:
        """Of each image the channels that `index` (sub-networks, channels) has for its sub-network."""
        if self.subnets is None:
            return x.index_select(1, index[0])
        own = index[self.subnets]
        return x.gather(1, own.view(*own.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    def _convolve(self, step: Step, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if self.dense:
            dense = self.compact.gathered(step, Dense, self._dense)
            return followed(dense(x), step)
        before, padding = split_padding(conv)
        if any(before):
            x = F.pad(x, before)
        x = autocast(x)
        if self.prepared:
            return self.compact.gathered(step, PreparedConv2d, self._prepared)(x, self.subnets)
        norm = None if step.norm is None else self.recipe.modules[step.norm.name]
        scale, shift = affine(norm, conv.weight.dtype)
        return masked_conv2d(
            x,
            conv.weight,
            conv.bias,
            inputs=self.compact.lists(step.source),
            outputs=self.compact.lists(step.node.name),
            subnets=self.subnets,
            scale=scale,
            shift=shift,
            activation=step.activation,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=padding,
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            pool=step.pool,
        )

    def _constants(self, step: Step) -> tuple[nn.Conv2d, Tensor | None, Tensor | None]:
        """The convolution of `step` and what scales and shifts its result."""
        conv = self.recipe.modules[step.node.name]
        scale, shift = affine(None if step.norm is None else self.recipe.modules[step.norm.name], conv.weight.dtype)
        if conv.bias is not None:
            shift = with_bias(conv.weight, conv.bias, scale, shift)
        return conv, scale, shift

    def _prepared(self, step: Step) -> PreparedConv2d:
        conv, scale, shift = self._constants(step)
        lists = {"inputs": self.compact.lists(step.source), "outputs": self.compact.lists(step.node.name)}
        numbers = [
            *conv.stride,
            *split_padding(conv)[1],
            *conv.dilation,
            conv.groups,
            ACTIVATIONS.index(step.activation),
        ]
        packed = pack_masked_conv2d(conv.weight, **lists, groups=conv.groups)
        return PreparedConv2d(conv.weight, scale, shift, **lists, numbers=numbers, packed=packed, pool=step.pool)

    def _link(self, step: Step) -> PreparedConv2d | None:
        """A step of a chain; None is the mean."""
        layer = self.recipe.modules[step.node.name]
        if isinstance(layer, nn.Conv2d):
            return self._prepared(step)
        if not isinstance(layer, nn.Linear):
            return None
        weight = layer.weight.detach()[:, :, None, None]
        inputs, outputs = self.compact.lists(step.source), self.compact.lists(step.node.name)
        packed = pack_masked_conv2d(weight, inputs=inputs, outputs=outputs)
        return PreparedConv2d(weight, None, layer.bias, inputs, outputs, [1, 1, 0, 0, 1, 1, 1, 0], packed)

    def _dense(self, step: Step) -> Dense:
        conv, scale, shift = self._constants(step)
        inputs, outputs = self.compact.lists(step.source)[0], self.compact.lists(step.node.name)[0]
        weight = conv.weight.detach().index_select(0, outputs).index_select(1, inputs)
        if scale is not None:
            weight = weight * scale[outputs, None, None, None]
        bias = None if shift is None else shift[outputs]
        return Dense(weight.contiguous(memory_format=torch.channels_last), bias, conv)

    def _linear(self, step: Step, layer: nn.Linear, x: Tensor) -> Tensor:
        inputs, outputs = self.compact.lists(step.source), self.compact.lists(step.node.name)
        if self.subnets is not None:
            return masked_linear(
                autocast(x), layer.weight, layer.bias, inputs=inputs, outputs=outputs, subnets=self.subnets
            )
        if self.prepared:
            return self.compact.gathered(step, KeptLinear, lambda _: KeptLinear.of(layer, inputs[0], outputs[0]))(x)
        return KeptLinear.of(layer, inputs[0], outputs[0])(x)

    def _normalise(self, step: Step, norm: Norm, x: Tensor) -> Tensor:
        lists = self.compact.lists(step.node.name)
        if self.subnets is None:
            return normalise(x, norm, lists[0])
        if norm.running_mean is None:
            raise ValueError(f"task: {step.node.target} has no running statistics to normalise images one by one")
        rows = lists.clamp(min=0)[self.subnets]
        scale, shift = (t[rows].view(*rows.shape, *[1] * (x.dim() - 2)) for t in affine(norm, x.dtype))  # type: ignore[index]
        return x * scale + shift


@dataclass(frozen=True)
class KeptLinear:
    """A linear layer's kept weights."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(layer: nn.Linear, inputs: Tensor, outputs: Tensor) -> KeptLinear:
        """Of the kept features; gradients reach the whole weight."""
        bias = None if layer.bias is None else layer.bias.index_select(0, outputs)
        return KeptLinear(layer.weight.index_select(0, outputs).index_select(1, inputs), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def followed(x: Tensor, step: Step) -> Tensor:
    """What `step` does behind a convolution with batch norm; x is overwritten."""
    if step.activation is not None:
        x = x.relu_() if step.activation == "relu" else F.relu6(x, inplace=True)
    return x if step.pool == 1 else F.max_pool2d(x, step.pool)


def affine(norm: Norm | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of a batch norm in evaluation, of `dtype`; None without one."""
    if norm is None:
        return None, None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale.to(dtype), shift.to(dtype)


def normalise(x: Tensor, norm: Norm, rows: Tensor) -> Tensor:
    """`norm` over its channels `rows`; in training their statistics alone are moved."""
    weight, bias, own_mean, own_variance = (
        None if t is None else t.index_select(0, rows)
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    if own_mean is None or own_variance is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    y = F.batch_norm(x, own_mean, own_variance, weight, bias, norm.training, momentum or 0.0, norm.eps)
    if norm.training:
        for whole, own in ((norm.running_mean, own_mean), (norm.running_var, own_variance)):
            assert whole is not None
            whole.index_copy_(0, rows, own)
    return y
