"""What the operators of `pyext.ops` share: dtypes, why a backend cannot run, running statistics, and registration."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyext import _library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- why a backend cannot run -----------------------------------------------------------------------------------------


def no_cpu(argument: str, tensor: Tensor) -> str | None:
    """Why no CPU kernel can run for the operator's `argument`; None when one can."""
    return None if tensor.device.type == "cpu" else f"{argument} is on {tensor.device}, this backend runs on the CPU"


def no_cuda(argument: str, tensor: Tensor) -> str | None:
    """Why no CUDA kernel can run for the operator's `argument`; None when one can."""
    if tensor.device.type != "cuda":
        return f"{argument} is on {tensor.device}, this backend runs on CUDA devices"
    return _no_device_dtype(tensor) or _library.cuda_error


def no_triton(argument: str, tensor: Tensor) -> str | None:
    """Why no Triton kernel can run for the operator's `argument`; None when one can."""
    if reason := _no_device_dtype(tensor):
        return reason
    error = _library.triton_error(tensor.device)
    return None if error is None else f"{argument} is on {tensor.device}: {error}"


def _no_device_dtype(tensor: Tensor) -> str | None:
    return "float64 runs on the CPU and in the reference only" if tensor.dtype == torch.float64 else None


def no_reference(*_: object) -> str | None:
    """Plain torch runs anywhere."""
    return None


MEASURED = ("cpu", "cuda", "triton", "reference")
"""Backends, best first, of an operator whose kernels beat plain torch."""

UNMEASURED_ON_GPUS = ("cpu", "reference", "cuda", "triton")
"""Those of one whose kernels for GPUs have not been timed against plain torch: auto may not be slower than it."""


def backends(argument: str, order: Sequence[str] = MEASURED) -> dict[str, Callable[..., str | None]]:
    """All backends in `order`, best first, of an operator whose first argument, called `argument`, decides."""

    def judged(why: Callable[[str, Tensor], str | None]) -> Callable[..., str | None]:
        return lambda tensor, *_: why(argument, tensor)

    found = {"cpu": judged(no_cpu), "cuda": judged(no_cuda), "triton": judged(no_triton), "reference": no_reference}
    return {name: found[name] for name in order}


# --- operators for inference, which read a module's tensors ----------------------------------------------------------


def no_inference(x: Tensor, tensors: Sequence[Tensor] = (), *_: object) -> str | None:
    """Why a kernel without gradients cannot run; None when it can."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
        return "gradients are asked for, and the kernel is for inference: call it under torch.no_grad()"
    return None


def no_cpu_inference(x: Tensor, tensors: Sequence[Tensor] = (), *_: object) -> str | None:
    """Why no CPU kernel without gradients can run; None when one can."""
    return no_inference(x, tensors) or no_cpu("x", x)


def check_place(what: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """ValueError where `tensor`, named by `what`, is not of `shape` or not on x's device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != x.device:
        raise ValueError(f"{what} is on {tensor.device}, expected x's device {x.device}")


def check_dtype(what: str, tensor: Tensor, x: Tensor) -> None:
    """TypeError where `tensor`, named by `what`, has neither x's dtype nor float32 beside a narrower one."""
    if tensor.dtype != x.dtype and (tensor.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{what} has dtype {tensor.dtype}, expected x's {x.dtype} or float32")


# --- running statistics -----------------------------------------------------------------------------------------------


def move_running(running: Sequence[Tensor], batch: Sequence[Tensor], momentum: float) -> None:
    """Move each running statistic, in place, towards that of the batch, as torch's batch normalisation does."""
    with torch.no_grad():
        if all(old.dtype == value.dtype for old, value in zip(running, batch, strict=True)):
            torch._foreach_lerp_(list(running), list(batch), momentum)
            return
        for old, value in zip(running, batch, strict=True):
            # In the value's dtype: a variance beyond float16's range still moves a running one that stays inside it.
            old.copy_(old.to(value.dtype).lerp_(value, momentum))


# --- registration -----------------------------------------------------------------------------------------------------


def register_differentiable(
    name: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    variants: Sequence[str] = ("", "_triton"),
) -> None:
    """Register shapes and gradient of ``pyext::{name}`` and ``pyext::{name}_backward``, in each variant.

    Args:
        fake, fake_backward: shape functions of the two operators.
        setup_context: as of `torch.library.register_autograd`.
        backward: the gradient's formula, of the backward operator, the context and the gradients of the results.
        variants: endings of both names, "" for the kernels of the dispatcher's devices.
    """
    for variant in variants:
        forward_name, backward_name = f"{name}{variant}", f"{name}_backward{variant}"
        torch.library.register_fake(f"pyext::{forward_name}")(fake)
        torch.library.register_fake(f"pyext::{backward_name}")(fake_backward)
        gradient = functools.partial(backward, getattr(torch.ops.pyext, backward_name))
        torch.library.register_autograd(f"pyext::{forward_name}", gradient, setup_context=setup_context)
        torch.library.register_autograd(f"pyext::{backward_name}", functools.partial(_refuse_second_derivative, name))


def _refuse_second_derivative(name: str, *_: object) -> None:
    raise RuntimeError(
        f"{name}: its kernels can be differentiated once; ask for pyext.backend('reference') where second derivatives "
        "are needed"
    )


def triton_kernels(name: str) -> ModuleType:
    """The module of Triton kernels of an operator, imported when one first runs: triton may not be installed."""
    return importlib.import_module(f"pyext.triton_kernels.{name}")


def register_triton(name: str, launch: Callable[..., Any]) -> None:
    """Register what runs ``pyext::{name}``: on a GPU, and by Triton's interpreter on the CPU."""
    for device in ("CPU", "CUDA"):
        torch.library.impl(f"pyext::{name}", device)(launch)
