"""The networks that `pyext train` knows, by their short names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from pyext import _backend, models
from pyext.train.errors import UserError


def _tiny(num_classes: int) -> nn.Module:
    """Three hybrid blocks of two modules each: learns the digits in a minute on two cores."""
    return models.HCGNet((12, 16, 24), (2, 2, 2), num_classes)


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "a1": lambda num_classes: models.hcgnet_a1(num_classes=num_classes),
    "a2": lambda num_classes: models.hcgnet_a2(num_classes=num_classes),
    "a3": lambda num_classes: models.hcgnet_a3(num_classes=num_classes),
    "b": lambda num_classes: models.hcgnet_b(num_classes=num_classes),
    "c": lambda num_classes: models.hcgnet_c(num_classes=num_classes),
    "resnet32": lambda num_classes: models.resnet32(num_classes=num_classes),
    "resnet110": lambda num_classes: models.resnet110(num_classes=num_classes),
    "vgg16": lambda num_classes: models.vgg16(num_classes=num_classes),
    "densenet40-12": lambda num_classes: models.densenet40_12(num_classes=num_classes),
    "tiny": _tiny,
}


def build(arch: str, num_classes: int) -> nn.Module:
    """A new network called `arch` (see `ARCHITECTURES`) with `num_classes` outputs."""
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown architecture {arch!r}: choose among {', '.join(ARCHITECTURES)}.", usage=True)
    return ARCHITECTURES[arch](num_classes)


def kernels(plain: bool) -> AbstractContextManager[None]:
    """Inside, networks run with pyext's kernels, or with plain torch operators alone if `plain`."""
    return _backend.backend("reference") if plain else nullcontext()
