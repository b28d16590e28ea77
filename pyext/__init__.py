"""Fused CPU, CUDA and Triton kernels for efficient vision networks, as drop-in torch modules."""

from pyext import _library  # noqa: F401  (registers the compiled operators)
from pyext._backend import backend

__all__ = ["backend"]
