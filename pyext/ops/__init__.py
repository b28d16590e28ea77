"""The operators: each file holds one operator's contract (reference, shapes, gradient, choice of backend)."""

from pyext.ops.gated_excitation import gated_excitation

__all__ = ["gated_excitation"]
