"""DropBlock with the schedule of HCGNet's CIFAR training (arXiv 1810.12890; arXiv 1908.09699, section 4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drop_block_probability(epoch: float, period: int = 10, maximum: float = 0.1) -> float:
    """Drop probability at `epoch` (fractions count): ``maximum - maximum/2 (1 + cos(pi t/T))``.

    `t` is the time since the last restart and `T` the length of the current cycle: `period`, then 2 `period`, 4 ...
    The probability rises from 0 to `maximum` within each cycle, against the cosine of the learning rate.

    Raises:
        ValueError: negative `epoch`, `period` below 1, `maximum` outside [0, 1].
    """
    if epoch < 0 or period < 1 or not 0 <= maximum <= 1:
        raise ValueError(
            f"drop_block_probability: epoch {epoch}, period {period}, maximum {maximum}; "
            "expected epoch >= 0, period >= 1 and maximum in [0, 1]"
        )
    elapsed, cycle = epoch, period
    while elapsed >= cycle:
        elapsed, cycle = elapsed - cycle, 2 * cycle
    return maximum - maximum / 2 * (1 + math.cos(math.pi * elapsed / cycle))


class DropBlock2d(nn.Module):
    """Zeroes square blocks of positions, the same for all channels of an image, and rescales what is left.

    Each position starts a block with probability ``drop_prob / block_size**2``; the output is scaled by the number of
    positions over the number kept. Identity in eval mode and at ``drop_prob`` 0. Holds no parameters and no buffers;
    set `drop_prob` directly or with `set_drop_block_epoch`.

    Shape: (N, C, H, W) to the same. Source: DropBlock, arXiv 1810.12890; scheduled as in HCGNet, arXiv 1908.09699.

    Raises:
        ValueError: `drop_prob` outside [0, 1], `block_size` below 1, an input that is not 4-dimensional.
    """

    def __init__(self, drop_prob: float = 0.0, block_size: int = 2) -> None:
        super().__init__()
        if not 0 <= drop_prob <= 1 or block_size < 1:
            raise ValueError(f"DropBlock2d: drop_prob {drop_prob}, block_size {block_size}; expected [0, 1] and >= 1")
        self.drop_prob = drop_prob
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"DropBlock2d: input has shape {tuple(x.shape)}, expected (N, C, H, W)")
        if not self.training or self.drop_prob == 0:
            return x
        kept = self._kept_positions(x)
        # A batch of which nothing is kept is zero, not 0 * inf.
        scale = kept.numel() / kept.sum().clamp(min=1)
        return x * (kept * scale).to(x.dtype)

    def _kept_positions(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        starts = (torch.rand((n, 1, h, w), device=x.device) < self.drop_prob / self.block_size**2).float()
        # Padding on both sides by half a block centres an odd block and gives an even one a row and column too many.
        blocks = F.max_pool2d(starts, self.block_size, stride=1, padding=self.block_size // 2)
        return 1 - blocks[:, :, :h, :w]

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}, block_size={self.block_size}"


def set_drop_block_epoch(model: nn.Module, epoch: float, period: int = 10, maximum: float = 0.1) -> float:
    """Give every `DropBlock2d` in `model` the scheduled probability of `epoch`, and return that probability.

    Call it at the start of each epoch (or each step, with a fractional epoch). Arguments as in
    `drop_block_probability`.
    """
    probability = drop_block_probability(epoch, period, maximum)
    for module in model.modules():
        if isinstance(module, DropBlock2d):
            module.drop_prob = probability
    return probability
