"""Swaps the modules that pyext knows, inside any model, for fused ones that share their parameters and buffers.

Modules are recognised by structure (names, types and shapes of their submodules) and then by behaviour: a copy with
random weights must give the same outputs and running statistics as the fused module, in eval and in training mode.
The published HCGNet's own classes (arXiv 1908.09699) are among them; none of them is imported.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyext import _backend
from pyext.nn import (
    SMG,
    BNReLUConv2d,
    BNReLUConvSequential,
    DenseBlock,
    DenseLayer,
    GatedExcitation,
    HybridBlock,
    Transition,
)
from pyext.nn.bn_relu_conv2d import is_cell
from pyext.nn.stem_inference import stem_of

_FUSED = (BNReLUConvSequential, DenseBlock, GatedExcitation, HybridBlock, SMG, Transition)
_WHOLE = (SMG, Transition, DenseBlock)
"""Fused classes that stand for all that is below them; the others are filled with modules that may be fused too."""
_PREACTIVATIONS = ("conv1_1x1", "conv2_3x3", "conv_3x3", "conv_5x5")
_CONVOLUTIONS = (
    "global_context3x3",
    "global_context5x5",
    "fcall",
    "fc3x3",
    "fc5x5",
    "global_forget_context",
    "fc1",
    "fc2",
)
_NORMS = ("bn_attention", "bn_forget")
_REQUIRED = (*_PREACTIVATIONS, *_CONVOLUTIONS, *_NORMS)
_OPTIONAL = ("global_pool", "dropblock")

# A forward that holds its own module's state dictionary hooks could be given the wrong module after a swap.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def accelerate(model: nn.Module, inplace: bool = False) -> nn.Module:
    """`model` with every module that pyext recognises swapped for its fused form, which computes the same.

    Args:
        model: any module tree. Training flags, ``requires_grad``, devices, dtypes, and forward and backward hooks carry
            over; a module that stands in several places of the tree still does afterwards.
        inplace: swap inside `model` itself. Otherwise `model` stays as it is and the result is a new tree that shares
            every Parameter and buffer with it: training one trains the other (move to a device before, not after).

    Returns:
        The accelerated model: `model` itself with `inplace`, unless `model` is itself a recognised module. Its
        ``state_dict`` has the same keys in the same order. `pyext.explain` says what was swapped, what not, and why.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pyext.accelerate: expected a torch.nn.Module, got {type(model).__name__}")
    return _swap(model if inplace else _copy_sharing_tensors(model), _Survey(), {})


def explain_model(model: nn.Module) -> str:
    """What `accelerate` did or would do to `model`: a line per module that is, could be, or resembles a fused one."""
    return "\n".join(_explanation(model))


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _swap(module: nn.Module, survey: _Survey, done: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    if id(module) in done:
        return done[id(module)][1]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    verdict = survey.verdict(module)
    # The original is kept beside its replacement so that its id cannot be given to another module meanwhile.
    done[id(module)] = module, module
    if verdict.fused in _WHOLE:
        done[id(module)] = module, _fuse(module, verdict)
        return done[id(module)][1]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _swap(child, survey, done)
    if verdict.fused is not None:
        done[id(module)] = module, _refill(module, verdict.fused)
    return done[id(module)][1]


# --- recognition by structure -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verdict:
    """Which fused class a module can be swapped for, or why a module that looks like one cannot be."""

    fused: type[nn.Module] | None = None
    reason: str | None = None
    steps_dropblock: bool = False
    in_channels: int = 0
    out_channels: int = 0


class _Survey:
    """The verdicts on the modules of one tree, each reached once."""

    def __init__(self) -> None:
        self._verdicts: dict[int, _Verdict] = {}

    def verdict(self, module: nn.Module) -> _Verdict:
        if id(module) not in self._verdicts:
            self._verdicts[id(module)] = self._judge(module)
        return self._verdicts[id(module)]

    def _judge(self, module: nn.Module) -> _Verdict:
        if isinstance(module, torch.jit.ScriptModule):
            return _Verdict(reason="it is compiled by torch.jit")
        if isinstance(module, _FUSED):
            return _Verdict()
        if _resembles_dense_block(module):
            reason = _unlike_dense_block(module) or _not_swappable(module)
            return _Verdict(reason=reason) if reason else _try_out(module, DenseBlock)
        if isinstance(module, nn.Sequential):
            return self._judge_sequential(module)
        # Half of the names: a relative of the published modules, worth a reason; fewer: nothing to do with them.
        if sum(name in module._modules for name in _REQUIRED) < len(_REQUIRED) // 2:
            return _Verdict()
        reason = _unlike_published(module) or _not_swappable(module)
        return _Verdict(reason=reason) if reason else _try_out(module, SMG)

    def _judge_sequential(self, block: nn.Sequential) -> _Verdict:
        layers = [self.verdict(layer) for layer in block]
        if not layers or any(layer.fused is not SMG for layer in layers):
            has_cells = any(is_cell(list(block)[i : i + 3]) for i in range(len(block)))
            has_stem = any(stem_of(list(block)[i:]) for i in range(len(block)))
            serves = has_cells or has_stem or any(layer.fused is DenseBlock for layer in layers)
            plain = type(block).forward is nn.Sequential.forward and _not_swappable(block) is None
            return _Verdict(BNReLUConvSequential) if serves and plain else _Verdict()
        if any(a.out_channels != b.in_channels for a, b in itertools.pairwise(layers)):
            return _Verdict(reason="its modules do not follow one another in channels")
        if type(block).forward is not nn.Sequential.forward:
            return _Verdict(reason="its class has a forward of its own")
        reason = _not_swappable(block)
        return _Verdict(reason=reason) if reason else _Verdict(HybridBlock)


def _not_swappable(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if module._parameters or module._buffers:
        return f"it has tensors of its own: {', '.join([*module._parameters, *module._buffers])}"
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "it has state-dict hooks, which may hold on to the module"
    return None


def _unlike_published(module: Any) -> str | None:
    """The first difference in structure between `module` and a published SMG or Transition; None if there is none."""
    children = module._modules
    missing = [name for name in _REQUIRED if children.get(name) is None]
    if missing:
        return f"it has no submodule {', '.join(missing)}"
    unknown = [name for name in children if name not in _REQUIRED and name not in _OPTIONAL]
    if unknown:
        return f"it has unknown submodules: {', '.join(unknown)}"
    pool = children.get("global_pool")
    if pool is not None and (type(pool) is not nn.AdaptiveAvgPool2d or _has_call_hooks(pool)):
        return f"global_pool is a {type(pool).__name__} or has hooks, expected AdaptiveAvgPool2d without"
    for name in _PREACTIVATIONS:
        reason = _unlike_preactivation(children[name])
        if reason:
            return f"{name}: {reason}"
    return _wrong_leaf(module)


def _unlike_preactivation(module: Any) -> str | None:
    children = dict(module._modules)
    activation = children.pop("relu", None)
    if activation is not None and (type(activation) is not nn.ReLU or _has_call_hooks(activation)):
        return f"relu is a {type(activation).__name__} or has hooks, expected ReLU without"
    if set(children) != {"norm", "conv"}:
        return f"it has submodules {', '.join(module._modules)}, expected norm, relu, conv"
    for name, kind in (("norm", nn.BatchNorm2d), ("conv", nn.Conv2d)):
        if type(children[name]) is not kind:
            return f"{name} is a {type(children[name]).__name__}, expected {kind.__name__}"
    return _not_swappable(module)


_DENSE_CELLS = (("norm1", "relu1", "conv1"), ("norm2", "relu2", "conv2"))
_DENSE_LAYER = {name for cell in _DENSE_CELLS for name in cell}


def _resembles_dense_block(module: nn.Module) -> bool:
    layers = [{name for name, _ in layer.named_children()} for layer in module.children()]
    return bool(layers) and all(names >= _DENSE_LAYER for names in layers)


def _unlike_dense_block(block: Any) -> str | None:
    """The first difference in structure between `block` and torchvision's; None if there is none."""
    for name, layer in block._modules.items():
        if set(layer._modules) != _DENSE_LAYER:
            return f"{name} has submodules {', '.join(layer._modules)}, expected {', '.join(sorted(_DENSE_LAYER))}"
        for cell in _DENSE_CELLS:
            kinds = [type(layer._modules[part]) for part in cell]
            if kinds != [nn.BatchNorm2d, nn.ReLU, nn.Conv2d]:
                return f"{name}: {', '.join(cell)} are {', '.join(kind.__name__ for kind in kinds)}"
        if reason := _not_swappable(layer):
            return f"{name}: {reason}"
    return None


def _has_call_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _CALL_HOOKS)


def _wrong_leaf(module: Any) -> str | None:
    children = module._modules
    for names, kind in ((_CONVOLUTIONS, nn.Conv2d), (_NORMS, nn.BatchNorm1d)):
        for name in names:
            if type(children[name]) is not kind:
                return f"{name} is a {type(children[name]).__name__}, expected {kind.__name__}"
    for name, expected in _expected_geometry(module).items():
        convolution = module.get_submodule(name)
        if _geometry(convolution) != expected:
            return f"{name} is {convolution}, expected {expected}"
    return None


def _geometry(c: nn.Conv2d) -> tuple[object, ...]:
    sizes = (c.kernel_size, c.stride, c.padding, c.dilation)
    return c.in_channels, c.out_channels, *sizes, c.groups, c.padding_mode, c.bias is not None


def _expected_geometry(module: Any) -> dict[str, tuple[object, ...]]:
    """`_geometry` of every convolution, from the sizes that the modules are free to choose."""
    first, second = module.conv1_1x1.conv, module.conv2_3x3.conv
    c, width = second.out_channels, first.out_channels
    attention, forget = module.bn_attention.num_features, module.bn_forget.num_features

    def convolution(inputs, outputs, size, dilation=1, groups=1, stride=(1, 1), bias=False):
        pad = dilation * (size // 2)
        return inputs, outputs, (size,) * 2, stride, (pad,) * 2, (dilation,) * 2, groups, "zeros", bias

    return {
        "conv1_1x1.conv": convolution(module.conv1_1x1.norm.num_features, width, 1),
        "conv2_3x3.conv": convolution(
            module.conv2_3x3.norm.num_features, c, 3, groups=second.groups, stride=second.stride
        ),
        "conv_3x3.conv": convolution(c, c, 3, groups=c),
        "conv_5x5.conv": convolution(c, c, 3, dilation=2, groups=c),
        "global_context3x3": convolution(c, 1, 1, bias=True),
        "global_context5x5": convolution(c, 1, 1, bias=True),
        "global_forget_context": convolution(c, 1, 1, bias=True),
        "fcall": convolution(2 * c, attention, 1, bias=True),
        "fc3x3": convolution(attention, c, 1, bias=True),
        "fc5x5": convolution(attention, c, 1, bias=True),
        "fc1": convolution(c, forget, 1, bias=True),
        "fc2": convolution(forget, c, 1, bias=True),
    }


# --- recognition by behaviour -----------------------------------------------------------------------------------------


class _DropBlockProbe(nn.Module):
    """Stands in for a module's DropBlock: not random, but visible in the output, and counts the calls of ``step``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1


def _try_out(module: Any, kind: type[nn.Module]) -> _Verdict:
    """Whether `module` does what its fused form does; `kind`: DenseBlock, or SMG for that and Transition."""
    try:
        original = copy.deepcopy(module).cpu().double()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return _Verdict(reason=f"it cannot be copied and tried out: {error}")
    generator = torch.Generator().manual_seed(0)
    _prepare(original, generator)
    first = next(m for m in original.modules() if isinstance(m, nn.BatchNorm2d))
    if kind is SMG:
        first = original.conv1_1x1.norm
    # 3 images: with 2, batch normalisation would give nearly the same values whatever came before it.
    x = torch.randn((3, first.num_features, 5, 5), generator=generator, dtype=torch.float64)
    with _isolated():
        return _compare(original, x, _Verdict(kind) if kind is DenseBlock else _Verdict())


def _prepare(module: Any, generator: torch.Generator) -> None:
    """Drop hooks, silence DropBlock and draw weights and statistics, so that any difference in formulas shows."""
    for submodule in module.modules():
        for hooks in _CALL_HOOKS:
            setattr(submodule, hooks, None if hooks == "_is_full_backward_hook" else type(getattr(submodule, hooks))())
    if module._modules.get("dropblock") is not None:
        module.dropblock = _DropBlockProbe()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 4
            tensor.data = 1 + 0.1 * noise.abs() if name.endswith("running_var") else noise / fan_in**0.5


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Neither gradients, autocast, the random state nor a requested backend reach in or leak out."""
    quiet = torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[])
    with contextlib.ExitStack() as stack:
        for context in (*quiet, _backend.backend("reference")):
            stack.enter_context(context)
        yield


def _compare(original: Any, x: Tensor, verdict: _Verdict) -> _Verdict:
    for training in (False, True):
        original.train(training)
        twin = copy.deepcopy(original)
        try:
            torch.manual_seed(0)  # of dropout
            expected = original(x)
        except Exception as error:  # whatever a foreign forward raises is a reason to leave it alone
            return _Verdict(reason=f"its forward fails on a {tuple(x.shape)} input: {error}")
        if verdict.fused is None:
            verdict = _kind(original, x, expected)
        if verdict.fused is None:
            return verdict
        replacement = _fuse(twin, verdict)
        torch.manual_seed(0)
        if not (_agree(replacement(x), expected) and _same_state(replacement, original)):
            mode = "training" if training else "eval"
            return _Verdict(reason=f"its outputs differ from those of {verdict.fused.__name__} ({mode} mode)")
    return verdict


def _kind(original: Any, x: Tensor, output: object) -> _Verdict:
    """Which class `output` speaks for: an SMG concatenates to its input, a Transition does not."""
    if not isinstance(output, Tensor) or output.dim() != 4:
        return _Verdict(reason=f"its forward returns a {type(output).__name__}, expected one (N, C, H, W) tensor")
    inputs, channels = x.shape[1], original.conv2_3x3.conv.out_channels
    probe = original._modules.get("dropblock")
    if output.shape[1] == inputs + channels and original.conv2_3x3.conv.stride == (1, 1) and probe is None:
        return _Verdict(SMG, in_channels=inputs, out_channels=inputs + channels)
    if output.shape[1] == channels:
        return _Verdict(Transition, None, probe is not None and probe.steps > 0, inputs, channels)
    return _Verdict(reason=f"its output has {output.shape[1]} channels, expected {channels} or {inputs + channels}")


def _agree(a: object, b: Tensor) -> bool:
    # float64 against float64: formulas that differ do so by far more, rounding in another order by far less.
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-7, atol=1e-7)


def _same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules hold equal tensors under equal names, and have stepped their DropBlock as often."""
    ours, theirs = a.state_dict(), b.state_dict()
    steps = [getattr(module._modules.get("dropblock"), "steps", 0) for module in (a, b)]
    same = list(ours) == list(theirs) and all(_agree(ours[name], theirs[name]) for name in ours)
    return same and steps[0] == steps[1]


# --- replacement ------------------------------------------------------------------------------------------------------


def _fuse(module: Any, verdict: _Verdict) -> Any:
    assert verdict.fused is not None
    if verdict.fused is DenseBlock:
        return _fuse_dense_block(module)
    fused = _like(module, verdict.fused)
    c = module.conv2_3x3.conv.out_channels
    fused.in_channels = verdict.in_channels
    fused.reduction_factor = 2 * c // module.bn_attention.num_features
    fused.forget_factor = c // module.bn_forget.num_features
    for name, child in module._modules.items():
        if name in _PREACTIVATIONS:
            fused.add_module(name, _fuse_preactivation(child))
        elif name != "global_pool":
            fused.add_module(name, child)
    if verdict.fused is SMG:
        fused.growth_rate = c
    else:
        fused.out_channels = c
        fused.steps_dropblock = verdict.steps_dropblock
        fused.dropblock = module._modules.get("dropblock")
    return fused


def _fuse_preactivation(module: Any) -> BNReLUConv2d:
    fused = _like(module, BNReLUConv2d)
    for name, child in module._modules.items():
        if name != "relu":
            fused.add_module(name, child)
    return fused


def _fuse_dense_block(block: nn.Module) -> DenseBlock:
    fused = _like(block, DenseBlock)
    for name, layer in block._modules.items():
        assert layer is not None
        layer_fused = _refill(layer, DenseLayer)
        layer_fused.drop_rate = float(getattr(layer, "drop_rate", 0.0))
        fused.add_module(name, layer_fused)
    return fused


def _refill(module: nn.Module, kind: type[nn.Module]) -> Any:
    """A module of class `kind` with the submodules of `module`."""
    fused = _like(module, kind)
    for name, child in module._modules.items():
        fused.add_module(name, child)
    return fused


def _like(module: nn.Module, kind: type[Any]) -> Any:
    """An empty module of class `kind` with the plain attributes, training flag and hooks of `module`."""
    fused: Any = object.__new__(kind)
    nn.Module.__init__(fused)
    for name, value in module.__dict__.items():
        if name in _CALL_HOOKS or name not in fused.__dict__:
            fused.__dict__[name] = value
    fused.training = module.training
    fused.replaces = f"{type(module).__module__}.{type(module).__qualname__}"
    return fused


# --- explanation ------------------------------------------------------------------------------------------------------


def _explanation(model: nn.Module) -> Iterator[str]:
    survey = _Survey()
    lines: list[str] = []
    rest: Counter[str] = Counter()
    _describe(model, "", survey, lines, rest, set())
    yield f"{type(model).__name__}:"
    yield from lines or ["  no module that pyext has a fused form for"]
    if rest:
        yield "  no fused form: " + ", ".join(f"{count} {name}" for name, count in sorted(rest.items()))


def _describe(
    module: nn.Module, path: str, survey: _Survey, lines: list[str], rest: Counter[str], seen: set[int]
) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    verdict = survey.verdict(module)
    state = _state(module, verdict)
    if state is not None:
        lines.append(f"  {path or '(the model)'}: {state}")
    elif not module._modules:
        rest[type(module).__name__] += 1
    leaves = (GatedExcitation, *_WHOLE, torch.jit.ScriptModule)
    if verdict.fused in _WHOLE or isinstance(module, leaves):
        return
    for name, child in module._modules.items():
        if child is not None:
            _describe(child, f"{path}.{name}" if path else name, survey, lines, rest, seen)


def _state(module: Any, verdict: _Verdict) -> str | None:
    name = type(module).__name__
    if isinstance(module, _FUSED):
        origin = getattr(module, "replaces", None)
        swapped = f"swapped, was {origin}" if origin else "fused"
        reason = module.unfused_reason() if isinstance(module, (GatedExcitation, SMG, Transition)) else None
        return f"{name}, {swapped}" + (f"; runs submodule by submodule: {reason}" if reason else "")
    if verdict.fused is not None:
        return f"{name}, would be swapped for pyext.nn.{verdict.fused.__name__}"
    if verdict.reason is not None:
        return f"{name}, not swapped: {verdict.reason}"
    return None
