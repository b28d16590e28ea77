"""Fused CPU, CUDA and Triton kernels for efficient vision networks, as drop-in torch modules.

import pyext
model = pyext.accelerate(model)      # swaps the modules it knows, sharing their parameters
print(pyext.explain(model))          # what was swapped, what not, and why
"""

from __future__ import annotations

from typing import Any

from pyext import _library  # noqa: F401  (registers the compiled operators)
from pyext._backend import OPERATORS, BackendError, backend

# isort: split
from pyext import distill, models, nn, ops, subnet
from pyext.accelerate import accelerate, explain_model

__version__ = "0.1.0"
__all__ = ["BackendError", "accelerate", "backend", "distill", "explain", "models", "nn", "ops", "subnet"]


def explain(subject: Any, *args: Any) -> str:
    """Say what runs and why.

    Args:
        subject: a model (what `accelerate` swapped or would swap), or an operator as a function of `pyext.ops` or by
            name (which backend runs for `args`, and why the others do not).
        args: an operator's arguments; the first, its input tensor, decides.

    Raises:
        ValueError: an operator that does not exist.
    """
    import torch

    if isinstance(subject, torch.nn.Module):
        return explain_model(subject)
    name = subject if isinstance(subject, str) else getattr(subject, "__name__", "")
    if name not in OPERATORS:
        raise ValueError(f"explain: no operator {name or subject}, expected a model or one of {', '.join(OPERATORS)}")
    if not args:
        raise ValueError(f"explain: operator {name} needs its input tensor to tell which backend runs")
    return OPERATORS[name].explain(*args)
