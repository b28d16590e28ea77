"""Repair of Triton's interpreter (``TRITON_INTERPRET=1``), which runs kernels on CPU tensors for tests.

The interpreter turns a kernel's loop bound into an int with ``int(array)``; its arrays hold one element but are not
0-dimensional, and NumPy 2.4 refuses that. And it keeps bfloat16 as the bits of it, which its matrix product multiplies
as if they were integers.
"""

from __future__ import annotations

from typing import Any

import numpy
import triton.language as tl
from triton.runtime import interpreter


def _numpy_refuses() -> bool:
    try:
        int(numpy.zeros(1, dtype=numpy.int32))
    except TypeError:
        return True
    return False


def _repair() -> None:
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


def _repair_products() -> None:
    multiply = interpreter.InterpreterBuilder.create_dot

    def multiply_numbers(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        wide = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(builder, *wide, *others)

    interpreter.InterpreterBuilder.create_dot = multiply_numbers


if _numpy_refuses():
    _repair()
_repair_products()
