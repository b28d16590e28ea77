"""Convolution and linear layer of which any part of the channels can run: what sub-networks of one set of weights need.

Source: DRNet (arXiv 1911.08691), masked execution of a reconstructed network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyext._library import is_traced
from pyext.nn.autocast import autocast_dtype
from pyext.ops.masked_conv2d import (
    ACTIVATIONS,
    activate,
    checked_activation,
    is_list,
    masked_conv2d,
    masked_linear,
    pack_masked_conv2d,
)

Channels = Tensor | Sequence[int] | Sequence[Sequence[int]] | None
_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


class _Selected:
    """Kept channels of a layer: lists of one or several sub-networks."""

    kept_inputs: Tensor | None
    kept_outputs: Tensor | None

    def _choose(self: Any, inputs: Channels, outputs: Channels, sizes: tuple[int, int]) -> None:
        found = [
            _as_lists(name, given, size, self.weight.device)
            for name, given, size in zip(("inputs", "outputs"), (inputs, outputs), sizes, strict=True)
        ]
        counts = {len(kept) for kept in found if kept is not None and kept.dim() == 2}
        if len(counts) > 1 or (counts and any(kept is not None and kept.dim() == 1 for kept in found)):
            raise ValueError("select: inputs and outputs, expected lists of as many sub-networks")
        if counts:  # a layer that keeps all on one side does so in every sub-network
            found = [
                torch.arange(size, device=self.weight.device).expand(*counts, -1) if kept is None else kept
                for kept, size in zip(found, sizes, strict=True)
            ]
        self.kept_inputs, self.kept_outputs = found


def _as_lists(name: str, given: Channels, size: int, device: torch.device) -> Tensor | None:
    if given is None:
        return None
    if isinstance(given, Tensor):
        kept = given.to(device)
    elif len(given) and not isinstance(given[0], int):
        rows = [torch.as_tensor(row, dtype=torch.int64) for row in given]
        kept = nn.utils.rnn.pad_sequence(rows, True, -1).to(device)
    else:
        kept = torch.as_tensor(given, dtype=torch.int64, device=device)
    lists = kept[None] if kept.dim() == 1 else kept
    if kept.dtype != torch.int64 or lists.dim() != 2 or 0 in lists.shape or not is_list(lists, size):
        raise ValueError(f"select: {name}, expected ascending channels from 0 to {size - 1}, at least one in each list")
    return kept


def autocast(x: Tensor) -> Tensor:
    """x in the dtype in which torch's own convolutions and linear layers compute now."""
    dtype = autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _converted(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Under autocast all in its dtype, as torch's own layers."""
    if autocast_dtype(x) is None or x.dtype == torch.float64:
        return x, list(tensors)
    own = autocast(x)
    return own, [None if tensor is None else tensor.to(own.dtype) for tensor in tensors]


class MaskedConv2d(_Selected, nn.Conv2d):
    """`torch.nn.Conv2d` over kept channels: input and output hold those alone, the weight is the whole layer's.

    Until `select` is called it is `torch.nn.Conv2d`, with the same arguments, parameters and state dict. Padding is
    with zeros.

    Args:
        activation: None, ``"relu"`` or ``"relu6"``, applied to the result.

    Attributes:
        kept_inputs, kept_outputs: int64 (channels,) or (sub-networks, channels), None for all; not in the state dict.

    Shape: (N, kept inputs, H, W) to (N, kept outputs, H', W'), as `pyext.ops.masked_conv2d` has them.

    Raises:
        ValueError: another padding mode; from `forward` what `pyext.ops.masked_conv2d` raises.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"MaskedConv2d: padding_mode is {self.padding_mode!r}, expected 'zeros'")
        self.activation = checked_activation(activation)
        self.register_buffer("kept_inputs", None, persistent=False)
        self.register_buffer("kept_outputs", None, persistent=False)
        self._pack: tuple[tuple[Any, ...], Tensor] | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d, activation: str | None = None) -> MaskedConv2d:
        """The same layer as `conv`, on its very parameters."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        own = (*(getattr(conv, name) for name in names), conv.bias is not None, conv.padding_mode)
        with torch.device("meta"):
            layer = cls(*own, activation=activation)
        return _sharing(layer, conv)

    def select(self, inputs: Channels = None, outputs: Channels = None) -> MaskedConv2d:
        """Keep these channels, ascending; None: all. Or a list for each of several sub-networks. Returns itself."""
        self._choose(inputs, outputs, (self.in_channels, self.out_channels))
        self._pack = None
        return self

    def forward(self, x: Tensor, subnets: Tensor | None = None) -> Tensor:
        """`subnets`: int64 (N,), each image's sub-network, where several are selected."""
        if self.kept_inputs is None and self.kept_outputs is None:
            return activate(super().forward(x), ACTIVATIONS.index(self.activation))
        x, (weight, bias) = _converted(x, self.weight, self.bias)
        before, padding = split_padding(self)
        if any(before):
            x = F.pad(x, before)
        return masked_conv2d(
            x,
            weight,  # type: ignore[arg-type]
            bias,
            inputs=self.kept_inputs,
            outputs=self.kept_outputs,
            subnets=subnets,
            activation=self.activation,
            stride=self.stride,  # type: ignore[arg-type]
            padding=padding,
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            packed=self._packed(weight),  # type: ignore[arg-type]
        )

    def _packed(self, weight: Tensor) -> Tensor | None:
        """Kept weights as the CPU kernel reads them, made once for inference; None where they may change unnoticed."""
        if torch.is_grad_enabled() or is_traced() or weight.device.type != "cpu" or weight.is_inference():
            return None
        state = (weight._version, weight.data_ptr(), weight.dtype)
        if self._pack is None or self._pack[0] != state:
            kept = {"inputs": self.kept_inputs, "outputs": self.kept_outputs}
            self._pack = state, pack_masked_conv2d(weight, **kept, groups=self.groups)
        return self._pack[1]


def split_padding(conv: nn.Conv2d) -> tuple[list[int], tuple[int, int]]:
    """A convolution's padding: more zeros that `torch.nn.functional.pad` is to add, and those on both sides of rows and
    columns."""
    if not isinstance(conv.padding, str):
        return [], conv.padding  # type: ignore[return-value]
    total = [0, 0]
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [0, total[1] % 2, 0, total[0] % 2], (total[0] // 2, total[1] // 2)


class MaskedLinear(_Selected, nn.Linear):
    """`torch.nn.Linear` over kept features: input and output hold those alone, the weight is the whole layer's.

    Until `select` is called it is `torch.nn.Linear`, with the same arguments, parameters and state dict. `activation`,
    attributes and errors as `MaskedConv2d`.

    Shape: (..., kept inputs) to (..., kept outputs).
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = checked_activation(activation)
        self.register_buffer("kept_inputs", None, persistent=False)
        self.register_buffer("kept_outputs", None, persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear, activation: str | None = None) -> MaskedLinear:
        """The same layer as `linear`, on its very parameters."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, activation=activation)
        return _sharing(layer, linear)

    def select(self, inputs: Channels = None, outputs: Channels = None) -> MaskedLinear:
        """As `MaskedConv2d.select`."""
        self._choose(inputs, outputs, (self.in_features, self.out_features))
        return self

    def forward(self, x: Tensor, subnets: Tensor | None = None) -> Tensor:
        """`subnets`: int64, x's shape without its last dimension, where several are selected."""
        if subnets is None and (self.kept_inputs is None or self.kept_inputs.dim() == 1):
            return self._alone(x)
        x, (weight, bias) = _converted(x, self.weight, self.bias)
        out = masked_linear(
            x.reshape(-1, x.shape[-1]),
            weight,  # type: ignore[arg-type]
            bias,
            inputs=self.kept_inputs,
            outputs=self.kept_outputs,
            subnets=None if subnets is None else subnets.reshape(-1),
            activation=self.activation,
        )
        return out.view(*x.shape[:-1], out.shape[1])

    def _alone(self, x: Tensor) -> Tensor:
        """One sub-network: torch's own product with the kept weights."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.kept_outputs is not None:
            weight = weight.index_select(0, self.kept_outputs)
            bias = None if bias is None else bias.index_select(0, self.kept_outputs)
        if self.kept_inputs is not None:
            weight = weight.index_select(1, self.kept_inputs)
        return activate(F.linear(x, weight, bias), ACTIVATIONS.index(self.activation))


def _sharing(layer: Any, original: _Layer) -> Any:
    """`layer` on the parameters of `original`, in its mode."""
    layer.weight, layer.bias = original.weight, original.bias
    return layer.train(original.training)
