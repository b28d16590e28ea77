"""Loading of the compiled extensions, and what is known about them."""

from __future__ import annotations

import importlib.util
import os

import torch

MINIMUM_TORCH = (2, 11)


def _torch_release() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


if _torch_release() < MINIMUM_TORCH:
    raise ImportError(
        f"pyext needs torch {'.'.join(map(str, MINIMUM_TORCH))} or newer and found torch {torch.__version__}: "
        "upgrade with `pip install --upgrade torch`."
    )

if importlib.util.find_spec("pyext._C") is None:
    raise ImportError(
        "pyext._C is not built: run `pip install --no-build-isolation .` in the project's folder "
        "(inside it, Python finds the sources before the installed package unless it was installed with -e)."
    )

from pyext import _C  # noqa: E402  (the two checks above give the reason when this cannot work)

cuda_error: str | None = None
"""Why `pyext._cuda` is not loaded; None when it is."""

if importlib.util.find_spec("pyext._cuda") is None:
    cuda_error = "pyext._cuda was not built: " + _C.build_info()["cuda"]
elif not torch.backends.cuda.is_built():
    cuda_error = f"torch {torch.__version__} is a CPU build, and pyext._cuda needs its CUDA libraries"
else:
    try:
        import pyext._cuda  # noqa: F401
    except ImportError as error:
        cuda_error = f"pyext._cuda does not load: {error}"


def cpu_capability() -> str:
    """The instruction set that the CPU kernels run with: ``baseline``, ``avx2``, ``avx512`` or ``avx512_bf16``.

    Only kernels with products of bfloat16 numbers are compiled for the last one; it runs the others' ``avx512``.
    """
    return _C.cpu_capability()


def cpu_capabilities() -> list[str]:
    """Every instruction set that this build holds kernels for and this machine can run, worst first."""
    return _C.cpu_capabilities()


def build_info() -> dict[str, str]:
    """Facts fixed when the extension was compiled: torch, compiler, CUDA toolkit or why there is none."""
    return _C.build_info()


def triton_error(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`; None when one can (a GPU, or the CPU by Triton's interpreter)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton needs a CUDA device, not {device} (or, to test it, TRITON_INTERPRET=1)"


def is_traced() -> bool:
    """Whether something other than plain eager execution looks at the operators that run."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )
