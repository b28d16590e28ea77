"""HCGNet's modules: gated multi-scale excitation, SMG, hybrid block, transition (arXiv 1908.09699, section 3).

State-dict names, shapes and order are those of the published checkpoints. The gates run as one fused operator; where
the submodules no longer say what the operator computes (a hook, a SyncBatchNorm, one frozen normalisation among four),
the same gates run submodule by submodule, and `GatedExcitation.unfused_reason` says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from pyext.nn.autocast import autocast_dtype
from pyext.nn.bn_relu_conv2d import BNReLUConv2d
from pyext.nn.drop_block import DropBlock2d
from pyext.nn.hooks import has_forward_hooks
from pyext.nn.hybrid_inference import layers_of, run_block
from pyext.nn.hybrid_training import train_block
from pyext.nn.lean import KeepsForBackward, checked_memory
from pyext.nn.memory_format import memory_format_of, to_convolution_format, to_torch_format
from pyext.ops.gated_excitation import gated_excitation

fx.wrap("to_torch_format")  # one node of a trace: torch.fx cannot look into a comparison of devices


def _check_map(owner: nn.Module, x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] * x.shape[3] == 0:
        raise ValueError(
            f"{type(owner).__name__}: input has shape {tuple(x.shape)}, expected (N, {channels}, H, W) "
            "with at least one position"
        )


_GATE_LEAVES = (
    ("conv_3x3.norm", nn.BatchNorm2d),
    ("conv_3x3.conv", nn.Conv2d),
    ("conv_5x5.norm", nn.BatchNorm2d),
    ("conv_5x5.conv", nn.Conv2d),
    ("global_context3x3", nn.Conv2d),
    ("global_context5x5", nn.Conv2d),
    ("fcall", nn.Conv2d),
    ("bn_attention", nn.BatchNorm1d),
    ("fc3x3", nn.Conv2d),
    ("fc5x5", nn.Conv2d),
    ("global_forget_context", nn.Conv2d),
    ("bn_forget", nn.BatchNorm1d),
    ("fc1", nn.Conv2d),
    ("fc2", nn.Conv2d),
)
"""The gates' submodules with the types that the operator stands for, in the order of `PARAMETERS` and `RUNNING`."""

_GATE_TYPES = tuple(kind for _, kind in _GATE_LEAVES)
_GATE_NORMS = tuple(i for i, (_, kind) in enumerate(_GATE_LEAVES) if kind is not nn.Conv2d)
_DILATION = {"conv_3x3": (1, 1), "conv_5x5": (2, 2)}
_BRANCH_CONVOLUTIONS = tuple(i for i, (name, _) in enumerate(_GATE_LEAVES) if name.endswith(".conv"))
_GATE_PARAMETERS = tuple(
    (i, name)
    for i in range(len(_GATE_LEAVES))
    for name in (("weight",) if i in _BRANCH_CONVOLUTIONS else ("weight", "bias"))
)
"""Leaf and name of every tensor of `PARAMETERS`."""

_GATE_RUNNING = tuple((i, name) for i in _GATE_NORMS for name in ("running_mean", "running_var"))
"""Leaf and name of every tensor of `RUNNING`."""


class _Gates(nn.Module):
    """The gates' submodules, which every HCGNet module has, and the two ways to run them."""

    def _add_gates(self, channels: int, reduction_factor: int, forget_factor: int, **factory: Any) -> None:
        attention, forget = 2 * channels // reduction_factor, channels // forget_factor
        if min(attention, forget) < 1:
            raise ValueError(
                f"{type(self).__name__}: {channels} channels with reduction_factor {reduction_factor} and "
                f"forget_factor {forget_factor} leave {attention} and {forget} hidden values, expected at least 1"
            )
        self.reduction_factor = reduction_factor
        self.forget_factor = forget_factor
        self.conv_3x3 = BNReLUConv2d(channels, channels, 3, padding=1, groups=channels, **factory)
        self.conv_5x5 = BNReLUConv2d(channels, channels, 3, padding=2, dilation=2, groups=channels, **factory)
        self.global_context3x3 = nn.Conv2d(channels, 1, 1, **factory)
        self.global_context5x5 = nn.Conv2d(channels, 1, 1, **factory)
        self.fcall = nn.Conv2d(2 * channels, attention, 1, **factory)
        self.bn_attention = nn.BatchNorm1d(attention, **factory)
        self.fc3x3 = nn.Conv2d(attention, channels, 1, **factory)
        self.fc5x5 = nn.Conv2d(attention, channels, 1, **factory)
        self.global_forget_context = nn.Conv2d(channels, 1, 1, **factory)
        self.bn_forget = nn.BatchNorm1d(forget, **factory)
        self.fc1 = nn.Conv2d(channels, forget, 1, **factory)
        self.fc2 = nn.Conv2d(forget, channels, 1, **factory)

    def reset_parameters(self) -> None:
        """Draw every parameter anew as torch's Conv2d and BatchNorm do, and reset the running statistics."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
                module.reset_parameters()

    def unfused_reason(self) -> str | None:
        """Why the gates run submodule by submodule in the present state; None when they run as the fused operator."""
        return self._branches_reason() or self._leaves_reason(self._gate_leaves())

    def _branches_reason(self) -> str | None:
        for name in _DILATION:
            branch = self._modules[name]
            if type(branch) is not BNReLUConv2d or has_forward_hooks(branch):
                return f"{name} was replaced or has hooks"
        return None

    def _leaves_reason(self, leaves: tuple[Any, ...]) -> str | None:
        # One comprehension each: this runs with every call, and a loop of calls would take longer than small kernels.
        if tuple(map(type, leaves)) != _GATE_TYPES:
            name, leaf, kind = next(
                (name, leaf, kind)
                for (name, kind), leaf in zip(_GATE_LEAVES, leaves, strict=True)
                if type(leaf) is not kind
            )
            return f"{name} is a {type(leaf).__name__}, the operator computes {kind.__name__}"
        hooked = [
            i
            for i, m in enumerate(leaves)
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        ]
        if hooked:
            return f"{_GATE_LEAVES[hooked[0]][0]} has hooks"
        for index, (name, dilation) in zip(_BRANCH_CONVOLUTIONS, _DILATION.items(), strict=True):
            conv = leaves[index]
            spread = (conv.dilation, conv.padding, conv.stride, conv.padding_mode)
            if spread != (dilation, dilation, (1, 1), "zeros") or conv._parameters.get("bias") is not None:
                return f"{name}.conv has another dilation, padding or stride, or a bias"
        return self._norms_reason([leaves[i] for i in _GATE_NORMS])

    @staticmethod
    def _norms_reason(norms: list[Any]) -> str | None:
        first = norms[0]
        if first.momentum is None:
            return "the normalisations average cumulatively (momentum=None)"
        state = first.training, first.eps, first.momentum
        for norm in norms:
            if not norm.affine or not norm.track_running_stats or norm._buffers["running_mean"] is None:
                return "a normalisation has no affine parameters or keeps no running statistics"
            if (norm.training, norm.eps, norm.momentum) != state:
                return "the four normalisations differ in mode, eps or momentum"
        return None

    def _gate_leaves(self) -> tuple[Any, ...]:
        # Through the dictionaries: nn.Module.__getattr__ costs 40 us for the 34 tensors, and a list kept on the side
        # would go stale when a submodule is replaced.
        own: Any = self._modules
        branch3, branch5 = own["conv_3x3"]._modules, own["conv_5x5"]._modules
        return (
            branch3["norm"],
            branch3["conv"],
            branch5["norm"],
            branch5["conv"],
            own["global_context3x3"],
            own["global_context5x5"],
            own["fcall"],
            own["bn_attention"],
            own["fc3x3"],
            own["fc5x5"],
            own["global_forget_context"],
            own["bn_forget"],
            own["fc1"],
            own["fc2"],
        )

    def gate_tensors(self, leaves: tuple[Any, ...] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The gates' parameters and running statistics, in the order of the operator's `PARAMETERS` and `RUNNING`."""
        leaves = self._gate_leaves() if leaves is None else leaves
        # A replica of nn.DataParallel holds its parameters as plain attributes.
        tensors = [leaf._parameters or leaf.__dict__ for leaf in leaves]
        running = [leaves[i]._buffers[name] for i, name in _GATE_RUNNING]
        return [tensors[i][name] for i, name in _GATE_PARAMETERS], running

    def _excite(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """The gates applied to u (N, channels, H, W), by the operator where it computes the same."""
        leaves = None if self._branches_reason() else self._gate_leaves()
        if leaves is None or self._leaves_reason(leaves):
            result = self._compose(u)
            return result if out is None else out.copy_(result)
        parameters, running = self.gate_tensors(leaves)
        norm = leaves[0]
        result = gated_excitation(
            u, parameters, running, training=norm.training, momentum=norm.momentum, eps=norm.eps, out=out
        )
        if norm.training:
            torch._foreach_add_([leaves[i]._buffers["num_batches_tracked"] for i in _GATE_NORMS], 1)
        return result

    def _compose(self, u: Tensor) -> Tensor:
        forget = torch.tanh(self.bn_forget(self.fc1(context_pool(u, self.global_forget_context(u))).flatten(1)))
        forget = torch.sigmoid(self.fc2(forget[:, :, None, None]))
        branch3, branch5 = self.conv_3x3(u), self.conv_5x5(u)
        pooled3 = context_pool(branch3, self.global_context3x3(branch3))
        pooled5 = context_pool(branch5, self.global_context5x5(branch5))
        hidden = self.fcall(torch.cat([pooled3, pooled5], dim=1)).flatten(1)
        attention = torch.tanh(self.bn_attention(hidden))[:, :, None, None]
        excitation = branch_selection(pooled3, pooled5, self.fc3x3(attention), self.fc5x5(attention))
        return (u * forget + excitation).type_as(u)


@fx.wrap  # one node of a trace, as `branch_selection`: a reshape by the input's own sizes and a stack hide the channels
def context_pool(x: Tensor, context: Tensor) -> Tensor:
    """Mean of the positions of x (N, C, H, W), weighted by the softmax of `context` (N, 1, H, W): (N, C, 1, 1)."""
    position = context.flatten(1).softmax(dim=1).view(x.shape[0], 1, *x.shape[2:])
    return (x * position).sum(dim=(2, 3), keepdim=True)


@fx.wrap
def branch_selection(a: Tensor, b: Tensor, logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """The mean of a and b, each value weighted by the softmax of its two logits; all of one shape."""
    weights = torch.stack([logits_a, logits_b]).softmax(dim=0)
    return weights[0] * a + weights[1] * b


class GatedExcitation(_Gates):
    """Forget gate, multi-scale excitation and update gate: all of an SMG after its squeeze cell, as one operator.

    Args:
        channels: channels of the input and the output.
        reduction_factor: the update gate has ``2 * channels // reduction_factor`` hidden values.
        forget_factor: the forget gate has ``channels // forget_factor`` hidden values.

    Shape: (N, channels, H, W) to the same, float32, float64 (CPU), bfloat16 or float16; the memory format is kept.

    Raises:
        ValueError: an input of another shape; in training mode, one value per channel (torch's own message).

    Source: HCGNet, arXiv 1908.09699, section 3.
    """

    def __init__(
        self,
        channels: int,
        reduction_factor: int = 2,
        forget_factor: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self._add_gates(channels, reduction_factor, forget_factor, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_map(self, x, self.channels)
        return self._excite(x)

    def plain(self, x: Tensor) -> Tensor:
        """`forward`, submodule by submodule, as torch.fx can follow it."""
        return self._compose(x)

    def extra_repr(self) -> str:
        return f"{self.channels}, reduction_factor={self.reduction_factor}, forget_factor={self.forget_factor}"


class SMG(_Gates):
    """Squeeze, multi-scale excitation and gates, concatenated to the input.

    Args:
        in_channels: channels of the input.
        growth_rate: channels that are added to it.
        bn_size: the squeeze cell is ``bn_size * growth_rate`` channels wide.
        groups: groups of its 3x3 convolution.
        reduction_factor, forget_factor: as in `GatedExcitation`.

    Shape: (N, in_channels, H, W) to (N, in_channels + growth_rate, H, W).

    Raises:
        ValueError: an input of another shape; in training mode, one value per channel (torch's own message).

    Source: HCGNet, arXiv 1908.09699, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: float = 4,
        groups: int = 4,
        reduction_factor: int = 2,
        forget_factor: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = int(bn_size * growth_rate)
        self.in_channels = in_channels
        self.growth_rate = growth_rate
        self.conv1_1x1 = BNReLUConv2d(in_channels, width, 1, **factory)
        self.conv2_3x3 = BNReLUConv2d(width, growth_rate, 3, padding=1, groups=groups, **factory)
        self._add_gates(growth_rate, reduction_factor, forget_factor, **factory)

    def forward(self, x: Tensor) -> Tensor:
        _check_map(self, x, self.in_channels)
        result = run_block(self, x)
        if result is not None:
            return result
        u = self.squeeze(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or u.dtype != x.dtype:
            return torch.cat([x, self._excite(u)], dim=1)
        result = _empty_map(x, self.in_channels + self.growth_rate)
        result[:, : self.in_channels] = x
        self._excite(u, out=result[:, self.in_channels :])
        return result

    def plain(self, x: Tensor) -> Tensor:
        """`forward`, submodule by submodule, as torch.fx can follow it."""
        return torch.cat([x, self._compose(self.squeeze(x))], dim=1)

    def squeeze(self, x: Tensor) -> Tensor:
        """The squeeze cell: (N, in_channels, H, W) to (N, growth_rate, H, W)."""
        return self.conv2_3x3(self.conv1_1x1(x))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, growth_rate={self.growth_rate}, reduction_factor={self.reduction_factor}, "
            f"forget_factor={self.forget_factor}"
        )


def _empty_map(x: Tensor, channels: int) -> Tensor:
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


class HybridBlock(KeepsForBackward, nn.Sequential):
    """Densely connected SMG modules ``SMG1`` to ``SMG<num_layers>``, each reading all channels before it.

    Args:
        num_layers: number of SMG modules.
        in_channels: channels of the input.
        bn_size: squeeze width over growth rate, as in `SMG`.
        growth_rate: channels that each module adds.
        memory: what is kept for the backward pass, ``"fast"`` or ``"lean"`` (`pyext.nn.set_memory`).

    Shape: (N, in_channels, H, W) to (N, in_channels + num_layers * growth_rate, H, W), in the input's memory
    format where the whole block runs as the operator `hybrid_block` at inference or by
    `pyext.nn.hybrid_training.train_block` (NCHW is faster), else in that of
    `pyext.nn.memory_format.to_convolution_format`: channels_last on the CPU.

    In training the result is also what the backward pass reads: torch refuses that after a change in place. Elsewhere
    without gradients one buffer holds the block and each module writes its slice. Source: arXiv 1908.09699.
    """

    layer_type = SMG

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        bn_size: float,
        growth_rate: int,
        *,
        memory: str = "fast",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.memory = checked_memory(memory, "HybridBlock")
        for i in range(num_layers):
            layer = SMG(in_channels + growth_rate * i, growth_rate, bn_size, device=device, dtype=dtype)
            self.add_module(f"SMG{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        first: Any = next(iter(self._modules.values()), None)
        if type(first) is SMG:
            _check_map(first, x, first.in_channels)
        trains = torch.is_grad_enabled()
        result = train_block(layers_of(self), x, self.memory) if trains else run_block(self, x)
        if result is not None:
            return result
        x = to_convolution_format(x)
        return self._fill(x) if self._writes_slices(x) else super().forward(x)

    def plain(self, x: Tensor) -> Tensor:
        """`forward`, module by module, as torch.fx can follow it."""
        return super().forward(to_torch_format(x))

    def _writes_slices(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if autocast_dtype(x) not in (None, x.dtype):
            return False
        return all(type(layer) is SMG and not has_forward_hooks(layer) for layer in self)

    def _fill(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        buffer = _empty_map(x, x.shape[1] + sum(layer.growth_rate for layer in layers))
        channels = x.shape[1]
        buffer[:, :channels] = x
        for layer in layers:
            seen, channels = buffer[:, :channels], channels + layer.growth_rate
            _check_map(layer, seen, layer.in_channels)
            layer._excite(layer.squeeze(seen), out=buffer[:, channels - layer.growth_rate : channels])
        return buffer


class Transition(_Gates):
    """Squeeze cell with a stride, then the gates, then DropBlock if asked for; nothing is concatenated.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the 3x3 convolution.
        reduction_factor, forget_factor: as in `GatedExcitation`.
        drop_block: end with a `DropBlock2d`, whose probability `set_drop_block_epoch` schedules.

    Shape: (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: an input of another shape; in training mode, one value per channel (torch's own message).

    Source: HCGNet, arXiv 1908.09699, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 2,
        reduction_factor: int = 4,
        forget_factor: int = 4,
        drop_block: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = in_channels - (in_channels - out_channels) // 2
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.conv1_1x1 = BNReLUConv2d(in_channels, width, 1, **factory)
        self.conv2_3x3 = BNReLUConv2d(width, out_channels, 3, stride=stride, padding=1, **factory)
        self._add_gates(out_channels, reduction_factor, forget_factor, **factory)
        self.dropblock: Any = DropBlock2d() if drop_block else None
        # The published networks' DropBlock takes its probability from a counter whenever the module runs.
        self.steps_dropblock = False

    def forward(self, x: Tensor) -> Tensor:
        _check_map(self, x, self.in_channels)
        if self.steps_dropblock:
            self.dropblock.step()
        result = run_block(self, x, stride=self.conv2_3x3.conv.stride[0], dense=False)
        if result is None:
            result = self._excite(self.conv2_3x3(self.conv1_1x1(to_convolution_format(x))))
        return result if self.dropblock is None else self.dropblock(result)

    def plain(self, x: Tensor) -> Tensor:
        """`forward` in eval mode, submodule by submodule, as torch.fx can follow it: no step of the DropBlock."""
        result = self._compose(self.conv2_3x3(self.conv1_1x1(x)))
        return result if self.dropblock is None else self.dropblock(result)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, reduction_factor={self.reduction_factor}, "
            f"forget_factor={self.forget_factor}"
        )
