"""In which memory format a network's convolutions should see its maps."""

from __future__ import annotations

import torch
from torch import Tensor

_TRAINED_DTYPES = (torch.float32, torch.float64)


def is_channels_last(x: Tensor) -> bool:
    """Whether the (N, C, H, W) tensor `x` is dense with channels innermost, and not with rows innermost as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format_of(x: Tensor) -> torch.memory_format:
    """``channels_last`` or ``contiguous_format``: the one in which operators should allocate results for `x`."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def to_convolution_format(x: Tensor) -> Tensor:
    """The (N, C, H, W) tensor `x` in the memory format in which what follows is fastest: as it is where the operators
    train it, and else that of torch's convolutions."""
    return x if trains_on_the_cpu(x) else to_torch_format(x)


def to_torch_format(x: Tensor) -> Tensor:
    """The (N, C, H, W) tensor `x` in the memory format in which torch's convolutions are fastest.

    The one place that holds the rule: on the CPU oneDNN convolves float32, bfloat16 and float16 maps faster in
    channels_last at every batch size (HCGNet-A1, one thread, inference: 1.1 times at batch 1, 1.6 at 4, 1.7 at 64);
    float64 has no oneDNN kernel, and other devices keep the caller's choice.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def trains_on_the_cpu(x: Tensor) -> bool:
    """Whether the operators' training form is what x (N, C, H, W) should run by: its tasks are images, one at least
    for every thread, and oneDNN's own bfloat16 convolutions are faster than float32 arithmetic."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in _TRAINED_DTYPES
        and x.dim() == 4
        and x.shape[0] >= max(2, torch.get_num_threads())
        and not torch.is_autocast_enabled("cpu")
    )
