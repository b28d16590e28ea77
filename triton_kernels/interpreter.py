"""Repairs of Triton's interpreter (``TRITON_INTERPRET=1``), which runs kernels on CPU tensors for tests.

The interpreter turns a kernel's loop bound into an int with ``int(array)``; its arrays hold one element but are not
0-dimensional, and NumPy 2.4 refuses that. It keeps bfloat16 as integers of the same bits, and multiplies those in
``tl.dot``: here they become float32 first, which is exact.
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


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(numpy.uint32) << 16
    return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)


def _repair_dot() -> None:
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def create_dot_of_floats(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, _widened(a), _widened(b), *rest)

    builder.create_dot = create_dot_of_floats


_repair_dot()
if _numpy_refuses():
    _repair()
