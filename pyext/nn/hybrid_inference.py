"""When HCGNet modules run as the operator `hybrid_block`, and the tensors that they hand to it."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyext import _library
from pyext._C import unchanged
from pyext.nn.autocast import autocast_dtype
from pyext.nn.changes import contents
from pyext.nn.hooks import has_forward_hooks
from pyext.nn.memory_format import memory_format_of
from pyext.ops.hybrid_block import CONVOLUTIONS, OPERATOR, TENSORS, hybrid_block, pack_hybrid_block

_CELLS = ("conv1_1x1", "conv2_3x3")
_NORM = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")
_VERSION = operator.attrgetter("_version")


def multiplies_bfloat16() -> bool:
    """Whether the CPU kernel's products of bfloat16 numbers are faster than those of float32."""
    return _library.cpu_capability() == "avx512_bf16"


class _Cast:
    """A block's tensors for bfloat16 on the CPU: convolutions' weights as the kernel multiplies them, made once.

    The other tensors, few numbers each, are converted by the kernel where they must be: to see whether one of those 42
    per module has changed takes longer.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        starts = range(0, len(tensors), len(TENSORS))
        self._places = [start + index for start in starts for index in CONVOLUTIONS]
        self._weights = [tensors[place] for place in self._places]
        # Those have no version, so they may change unnoticed.
        self._known = not any(weight.is_inference() for weight in self._weights)
        self._state: list[Any] = []
        self._held: list[Tensor] = []
        self._made: list[Tensor] = []

    def tensors(self) -> list[Tensor]:
        """The operator's, in its order."""
        if not self._known or _library.is_traced():
            return self._tensors
        state = [multiplies_bfloat16(), *map(_VERSION, self._weights), *map(Tensor.data_ptr, self._weights)]
        if state != self._state:
            self._made = self._make()
            self._state = state
            self._held = [weight.detach() for weight in self._weights]  # no other weight comes to these addresses
        return self._made

    def _make(self) -> list[Tensor]:
        if multiplies_bfloat16():
            return pack_hybrid_block(self._tensors)
        made = list(self._tensors)
        for place, weight in zip(self._places, self._weights, strict=True):
            made[place] = weight.detach().float()
        return made


class _Seen(NamedTuple):
    """What the modules held when they were last looked through, and what followed from it."""

    dictionaries: tuple[dict[Any, Any], ...]
    items: tuple[tuple[Any, ...], ...]
    parts: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    tensors: list[Tensor]
    """The operator's, in its order."""
    eps: float
    cast: _Cast

    def holds(self) -> bool:
        return unchanged(self.dictionaries, self.items) and tuple(map(type, self.parts)) == self.kinds


_seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()


def run_block(owner: nn.Module, x: Tensor, *, stride: int = 1, dense: bool = True) -> Tensor | None:
    """What `owner`, a HybridBlock, SMG or (not `dense`) Transition, makes of x (N, C, H, W) before any DropBlock; None
    where it does not say what the operator computes: training, gradients, tracing, hooks, replaced submodules, modules
    of different widths. The memory format is kept.

    On the CPU a model in bfloat16, and one in float32 under ``torch.autocast("cpu", torch.bfloat16)``, multiply in
    bfloat16 where the processor has products for it (AVX-512 BF16), else in float32, which is more exact. Either way
    they keep their convolutions' weights as the kernel reads them, until a weight's version says that it changed: what
    is written through a weight's ``.data`` has no version and is not seen.

    Raises:
        ValueError, TypeError: as `hybrid_block`.
    """
    cast = autocast_dtype(x)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or cast not in (None, x.dtype, _cpu_cast(x)):
        return None
    seen = _seen.get(owner)
    # To look through the 22 submodules of each layer can take longer than to run it on one image.
    if seen is None or not seen.holds():
        seen = _look(owner, stride)
        if seen is None:
            _seen.pop(owner, None)
            return None
        _seen[owner] = seen
    if not OPERATOR.has_kernel(x, seen.tensors):
        return None
    tensors = seen.tensors
    if torch.bfloat16 in (cast, x.dtype) and OPERATOR.runs("cpu", x, tensors):
        tensors = seen.cast.tensors()
    result = hybrid_block(x, tensors, stride=stride, dense=dense, eps=seen.eps)
    if cast is not None and not dense:  # torch concatenates in the wider dtype
        result = result.to(cast)
    return result.contiguous(memory_format=memory_format_of(x))


def _look(owner: Any, stride: int) -> _Seen | None:
    """Everything that tells whether the operator computes what `owner` does; None where it does not."""
    layers = layers_of(owner)
    if not are_block(layers, stride, training=False):
        return None
    # Of the owner, its submodules alone: with a reference to itself it would never be collected.
    nested = [layer for layer in layers if layer is not owner]
    parts = (*nested, *(part for layer in layers for part in _parts(layer)))
    dictionaries = (owner._modules, *(held for part in parts for held in dictionaries_of(part)))
    items = contents(dictionaries)
    tensors = [tensor for layer in layers for tensor in tensors_of(layer)]
    eps = layers[0]._modules["bn_forget"].eps
    return _Seen(dictionaries, items, parts, tuple(map(type, parts)), tensors, eps, _Cast(tensors))


def layers_of(owner: Any) -> list[Any]:
    """The layers of a block; none where one of them is more or other than the block put there."""
    if not isinstance(owner, nn.Sequential):
        return [owner]
    layers: list[Any] = list(owner._modules.values())
    return layers if all(type(layer) is owner.layer_type and not has_forward_hooks(layer) for layer in layers) else []


def _parts(layer: Any) -> Iterator[nn.Module]:
    """The submodules that the operator stands for."""
    for name, child in layer._modules.items():
        if name != "dropblock" and child is not None:
            yield from child.modules()


def dictionaries_of(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """What makes up a module: its attributes, and the parameters, buffers, submodules and hooks among them."""
    yield module.__dict__
    yield from (value for value in module.__dict__.values() if isinstance(value, dict))


def _cpu_cast(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast may cast maps like x, for the operator to give the same."""
    return torch.bfloat16 if x.device.type == "cpu" and x.dtype == torch.float32 else None


def are_block(layers: Sequence[Any], stride: int, training: bool) -> bool:
    """Whether all `layers`, at least one, say what a block computes, with all normalisations in one mode and alike in
    width and constants."""
    if not layers or not all(_computes_the_operator(layer, stride, training) for layer in layers):
        return False
    first = _form(layers[0], training)
    return all(_form(layer, training) == first for layer in layers)


def _computes_the_operator(layer: Any, stride: int, training: bool) -> bool:
    if layer.unfused_reason() is not None:
        return False
    gate = layer._modules["bn_forget"]  # the gates' four normalisations are alike
    eps, momentum = gate.eps, gate.momentum
    if gate.training is not training:
        return False
    for name, taps, pitch in (("conv1_1x1", 1, 1), ("conv2_3x3", 3, stride)):
        cell = layer._modules[name]
        norm, conv = cell._modules["norm"], cell._modules["conv"]
        if type(norm) is not nn.BatchNorm2d or type(conv) is not nn.Conv2d:
            return False
        if (
            has_forward_hooks(cell)
            or has_forward_hooks(norm)
            or has_forward_hooks(conv)
            or norm.training is not training
            or norm.eps != eps
            or (training and norm.momentum != momentum)
            or not norm.affine
        ):
            return False
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
        if geometry != ((taps, taps), (pitch, pitch), (taps // 2, taps // 2), (1, 1), "zeros"):
            return False
        if norm._buffers["running_mean"] is None or conv._parameters.get("bias") is not None:
            return False
    return layer._modules["conv1_1x1"]._modules["conv"].groups == 1


def _form(layer: Any, training: bool) -> tuple[Any, ...]:
    """What the modules of a block have in common: widths, and the constants of their normalisations."""
    own = layer._modules
    first, second, gate = own["conv1_1x1"]._modules["conv"], own["conv2_3x3"]._modules["conv"], own["bn_forget"]
    widths = first.out_channels, second.out_channels, second.groups, own["fcall"].out_channels, own["fc1"].out_channels
    return *widths, gate.eps, gate.momentum if training else None


def tensors_of(layer: Any) -> Iterator[Tensor]:
    """One module's tensors in the order of `pyext.ops.hybrid_block.TENSORS`."""
    # Through the dictionaries, for speed; a replica of nn.DataParallel holds its parameters as plain attributes.
    for name in _CELLS:
        cell = layer._modules[name]._modules
        norm, conv = cell["norm"], cell["conv"]
        parameters = norm._parameters or norm.__dict__
        yield from (parameters[kind] for kind in _NORM)
        yield from (norm._buffers[kind] for kind in _STATISTICS)
        yield (conv._parameters or conv.__dict__)["weight"]
    parameters, running = layer.gate_tensors()
    yield from parameters
    yield from running
