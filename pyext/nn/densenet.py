"""DenseNet's layers and blocks (arXiv 1608.06993), with torchvision's names and state dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyext.nn.bn_relu_conv2d import computes_the_operator
from pyext.nn.dense_inference import forget, infer_dense_block, remembered
from pyext.nn.dense_training import TrainedBlock, train_dense_block
from pyext.nn.hooks import has_forward_hooks
from pyext.nn.lean import KeepsForBackward, checked_memory
from pyext.nn.memory_format import memory_format_of, to_torch_format, trains_on_the_cpu
from pyext.nn.row_stages import RowStage
from pyext.ops.bn_relu_conv2d import OPERATOR

fx.wrap("to_torch_format")  # one node of a trace: torch.fx cannot look into a comparison of devices

_CELLS = (("norm1", "relu1", "conv1"), ("norm2", "relu2", "conv2"))


class DenseLayer(nn.Module):
    """BN, ReLU and a 3x3 convolution to `growth_rate` channels; with `bn_size`, before them BN, ReLU and a 1x1
    convolution to ``bn_size * growth_rate`` (the bottleneck).

    Args:
        in_channels: channels of all that was computed before in the block.
        growth_rate: channels that the layer adds.
        bn_size: width of the bottleneck over the growth rate; 0 for none.
        drop_rate: probability of dropout on the result.

    Shape: (N, in_channels, H, W), or a list of tensors whose channels add up to that, to (N, growth_rate, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if bn_size:
            self._add_cell(_CELLS[0], in_channels, bn_size * growth_rate, 1, factory)
            self._add_cell(_CELLS[1], bn_size * growth_rate, growth_rate, 3, factory)
        else:
            self._add_cell(_CELLS[0], in_channels, growth_rate, 3, factory)
        self.drop_rate = float(drop_rate)

    def _add_cell(
        self, names: tuple[str, str, str], channels: int, out_channels: int, taps: int, factory: dict[str, Any]
    ) -> None:
        norm, relu, conv = names
        self.add_module(norm, nn.BatchNorm2d(channels, **factory))
        self.add_module(relu, nn.ReLU(inplace=True))
        self.add_module(conv, nn.Conv2d(channels, out_channels, taps, padding=taps // 2, bias=False, **factory))

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        out = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        for names in _CELLS:
            for name in names:
                if name in self._modules:
                    out = getattr(self, name)(out)
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate > 0 else out

    def cells(self) -> list[tuple[Any, Any]] | None:
        """Its (BatchNorm2d, Conv2d) pairs; None where the operators do not compute what its submodules say."""
        if self.drop_rate > 0 or has_forward_hooks(self):
            return None
        own: Any = self._modules
        found = [(own[norm], own[conv]) for norm, _, conv in _CELLS if norm in own]
        activations = [own[relu] for _, relu, _ in _CELLS if relu in own]
        if len(activations) != len(found) or any(type(a) is not nn.ReLU or has_forward_hooks(a) for a in activations):
            return None
        same = all(computes_the_operator(*cell) and cell[1].stride == (1, 1) for cell in found)
        return found if same and all(conv.groups == 1 for _, conv in found) else None

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}" if self.drop_rate else ""


class DenseBlock(KeepsForBackward, RowStage, nn.Module):
    """`num_layers` dense layers, each reading all channels before it; on the CPU trained as a whole and, in evaluation
    without gradients, run as one operator, `dense_block`. Elsewhere torch runs it layer by layer.

    Args:
        num_layers: number of layers; they are named ``denselayer1`` and on.
        in_channels: channels of the input.
        growth_rate, bn_size, drop_rate: as in `DenseLayer`.
        memory: what is kept for the backward pass, ``"fast"`` or ``"lean"`` (`pyext.nn.set_memory`).

    Shape: (N, in_channels, H, W) to (N, in_channels + num_layers * growth_rate, H, W).

    Source: DenseNet, arXiv 1608.06993.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        *,
        memory: str = "fast",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.memory = checked_memory(memory, "DenseBlock")
        for i in range(num_layers):
            channels = in_channels + i * growth_rate
            layer = DenseLayer(channels, growth_rate, bn_size, drop_rate, device=device, dtype=dtype)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if (rows := self.train_rows(x)) is not None:
                return rows.contiguous(memory_format=memory_format_of(x))
        elif (whole := infer_dense_block(self, x)) is not None:
            return whole
        features = [to_torch_format(x)]
        for layer in self._modules.values():
            assert layer is not None
            features.append(layer(features))
        return torch.cat(features, 1)

    def train_rows(self, x: Tensor) -> Tensor | None:
        if not (trains_on_the_cpu(x) and OPERATOR.runs("cpu", x)):
            return None
        block = remembered(self, self._trained)
        return train_dense_block(block, x, self.memory) if block is not None and block.reads(x) else None

    def train(self, mode: bool = True) -> DenseBlock:
        """`torch.nn.Module.train`, which also drops what is kept for inference."""
        forget(self)
        return super().train(mode)

    def layer_cells(self) -> list[list[tuple[Any, Any]]] | None:
        """The (BatchNorm2d, Conv2d) pairs of each layer; None where the operators do not compute what layers say."""
        found: list[list[tuple[Any, Any]]] = []
        for layer in self._modules.values():
            cells = layer.cells() if type(layer) is DenseLayer else None
            if not cells:
                return None
            channels = found[0][0][0].num_features + sum(c[-1][1].out_channels for c in found) if found else None
            if not _follow(cells, channels):
                return None
            found.append(cells)
        return found or None

    def _trained(self) -> TrainedBlock | None:
        """What trains as a whole: all layers, in training mode and with one momentum."""
        cells = self.layer_cells()
        if cells is None:
            return None
        norms = [norm for layer in cells for norm, _ in layer]
        alike = all(norm.training and norm.momentum == norms[0].momentum for norm in norms)
        return TrainedBlock.of(cells) if alike else None


def _follow(cells: Sequence[tuple[Any, Any]], channels: int | None) -> bool:
    """Whether the cells take `channels` channels, any for None, one after the other."""
    for norm, conv in cells:
        if norm.num_features != (channels or norm.num_features) or conv.in_channels != norm.num_features:
            return False
        channels = conv.out_channels
    return True
