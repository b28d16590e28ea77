"""What modules and tensors hold, remembered to see later whether any of it has changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def contents(dictionaries: Iterable[dict[Any, Any]]) -> tuple[tuple[Any, ...], ...]:
    """Keys and values of each, with which `pyext._C.unchanged` compares them."""
    return tuple(tuple(itertools.chain.from_iterable(held.items())) for held in dictionaries)


def versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Of each its version, which a write in place changes, and its address. Tensors of inference mode have none."""
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]
