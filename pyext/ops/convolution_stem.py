"""The stem of a network for large images at inference: 3x3 convolutions, each with batch norm and ReLU, and a max-pool.

Source: HCGNet, arXiv 1908.09699, section 4; F(2x2, 3x3): arXiv 1509.09308. For every layer, all normalisations by their
running statistics:

    x <- relu(BN(conv3x3(x)))           padding 1; the stride of the first is free, the others' is 1

and then max over windows of 3x3, padding 1, stride 2. On the CPU an image goes through all layers a few rows at a time,
so that no map between them is a tensor, and all layers but the first take 16 products for four results.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyext import _backend
from pyext._operator import DTYPES, check_dtype, check_place, no_cpu_inference, no_reference

_OPS = torch.ops.pyext

TENSORS = ("conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
"""State-dict names of one layer's tensors, in the order in which every layer passes them."""


def tensor_shapes(channels: Sequence[int]) -> list[tuple[int, ...]]:
    """Shape of every tensor of a stem whose image and maps have `channels` channels."""
    shapes: list[tuple[int, ...]] = []
    for inputs, outputs in itertools.pairwise(channels):
        shapes += [(outputs, inputs, 3, 3), *[(outputs,)] * 4]
    return shapes


def reference(x: Tensor, tensors: Sequence[Tensor], stride: int, eps: float = 1e-5) -> Tensor:
    """The operator's definition in plain torch; differentiable. Shapes as in `convolution_stem`."""
    own = [tensor.to(x.dtype) for tensor in tensors]
    for layer in range(0, len(own), len(TENSORS)):
        kernel, weight, bias, mean, var = own[layer : layer + len(TENSORS)]
        x = F.conv2d(x, kernel, stride=1 if layer else stride, padding=1)
        x = F.relu(F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))
    return F.max_pool2d(x, 3, 2, 1)


def validate(x: Tensor, tensors: Sequence[Tensor], stride: int, eps: float) -> None:
    """Raise TypeError (dtype) or ValueError (all else) naming the argument that is wrong and what was expected."""
    if not tensors or len(tensors) % len(TENSORS):
        raise ValueError(f"convolution_stem: {len(tensors)} tensors, expected {len(TENSORS)} for each layer")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"convolution_stem: x has shape {tuple(x.shape)}, expected (N, C, H, W), all but N at least 1")
    if x.dtype not in DTYPES:
        raise TypeError(f"convolution_stem: x has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
    if stride not in (1, 2):
        raise ValueError(f"convolution_stem: stride is {stride}, expected 1 or 2")
    if not eps >= 0:
        raise ValueError(f"convolution_stem: eps is {eps}, expected at least 0")
    channels = [x.shape[1], *(max(1, *weight.shape[:1]) for weight in tensors[:: len(TENSORS)])]
    for index, (tensor, shape) in enumerate(zip(tensors, tensor_shapes(channels), strict=True)):
        what = f"convolution_stem: tensors[{index}], {TENSORS[index % len(TENSORS)]} of layer {index // len(TENSORS)},"
        check_place(what, tensor, shape, x)
        check_dtype(what, tensor, x)


OPERATOR = _backend.register(
    _backend.Operator(
        "convolution_stem",
        {"cpu": no_cpu_inference, "reference": no_reference},
        differentiable=False,
        unwritten=("cuda", "triton"),
    )
)


def convolution_stem(
    x: Tensor, tensors: Sequence[Tensor], *, stride: int = 2, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """A stem at inference (running statistics everywhere).

    Args:
        x: (N, C, H, W), any strides, any N; float32, bfloat16, float16, or float64.
        tensors: for every layer its weight, parameters and running statistics in the order of `TENSORS`, in x's
            dtype or float32 (float64 for float64). A layer reads as many channels as the one before it gives.
        stride: 1 or 2, of the first layer.
        eps: of all normalisations.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Returns:
        (N, channels of the last layer, ceil(H / (2 * stride)), ceil(W / (2 * stride))) in x's dtype; of the CPU kernel
        NCHW.

    Raises:
        ValueError: wrong number of tensors, shapes, device, stride or eps.
        TypeError: wrong dtype.
        BackendError: the backend asked for cannot run; the kernel does not where gradients are asked for.

    Source: HCGNet, arXiv 1908.09699, section 4.
    """
    name = OPERATOR.choose(backend, x, tensors)
    validate(x, tensors, stride, eps)
    if name == "reference":
        return reference(x, tensors, stride, eps)
    return _OPS.convolution_stem(x, [tensor.detach() for tensor in tensors], stride, eps)


def _fake(x, tensors, stride, eps):
    height, width = (((n - 1) // stride) // 2 + 1 for n in x.shape[2:])
    return x.new_empty((x.shape[0], len(tensors[-1]), height, width))


torch.library.register_fake("pyext::convolution_stem")(_fake)
