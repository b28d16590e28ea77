"""Whole HCGNets: inference and training steps, by pyext's models and by `accelerate` on a plain torch program."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from bench.case import Case
from bench.networks import Network, Setup, case_of
from bench.peers import from_tests
from pyext import models

TRAINING_BATCH = 64


def _published(program: str, growth_rates: tuple[int, ...], num_layers: tuple[int, ...], classes: int) -> nn.Module:
    return getattr(from_tests("published_hcgnet.py"), program)(growth_rates, num_layers, classes)


def _network(
    name: str,
    program: str,
    growth_rates: tuple[int, ...],
    num_layers: tuple[int, ...],
    own: Callable[[int], nn.Module],
) -> Network:
    classes, size = (100, 32) if program == "CifarNet" else (1000, 224)
    published = functools.partial(_published, program, growth_rates, num_layers, classes)
    return Network(f"hcgnet {name}", classes, size, published, functools.partial(own, classes))


NETWORKS = {
    "A1": _network("A1", "CifarNet", (12, 24, 36), (8, 8, 8), models.hcgnet_a1),
    "A2": _network("A2", "CifarNet", (24, 36, 64), (8, 8, 8), models.hcgnet_a2),
    "A3": _network("A3", "CifarNet", (36, 48, 80), (12, 12, 12), models.hcgnet_a3),
    "B": _network("B", "ImageNetNet", (32, 48, 64, 96), (3, 6, 12, 8), models.hcgnet_b),
}


def _case(
    name: str,
    batch: int,
    training: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    peers: str = "",
    needs_seconds: float = 0,
    memory: bool = False,
) -> Case:
    return case_of(Setup(NETWORKS[name], batch, training, device, dtype), peers, needs_seconds, memory)


def cases(device: torch.device) -> list[Case]:
    """A1 to A3 and B; those that take long, where there is time."""
    return _gpu_cases(device) if device.type == "cuda" else _cpu_cases(device)


def _cpu_cases(device: torch.device) -> list[Case]:
    return [
        _case("A1", 1, False, device, peers="compile engines"),
        _case("A1", 64, False, device, peers="compile engines"),
        # Without torch.compile: what torch 2.11's inductor makes of this backward pass reads a buffer it has not made.
        _case("A1", TRAINING_BATCH, True, device, memory=True),
        _case("B", 1, False, device, peers="engines"),
        _case("A2", 1, False, device, peers="engines"),
        _case("A2", 64, False, device, peers="engines"),
        _case("A3", 1, False, device),
        _case("B", 8, False, device, peers="engines"),
        _case("A1", 64, False, device, torch.bfloat16, peers="compile cast engines", needs_seconds=120),
        _case("A3", 64, False, device),
        _case("A2", TRAINING_BATCH, True, device, needs_seconds=120, memory=True),
        _case("A3", TRAINING_BATCH, True, device, needs_seconds=400),
    ]


def _gpu_cases(device: torch.device) -> list[Case]:
    """In float32 and in mixed precision; those that torch.compile takes part in last, since it compiles for long."""
    mixed = torch.bfloat16
    modes = [(dtype, training) for dtype in (torch.float32, mixed) for training in (False, True)]
    sizes = {"A1": 128, "B": 64, "A2": 128, "A3": 128}
    found = [
        _case(name, batch, training, device, dtype, needs_seconds=15)
        for name, batch in sizes.items()
        for dtype, training in modes
        if (name, dtype) != ("A1", mixed)
    ]
    found.append(_case("A1", TRAINING_BATCH, True, device, memory=True))
    found += [_case("A1", 128, training, device, mixed, "compile", 90) for training in (False, True)]
    return [*found, _case("A1", 1, False, device, peers="compile", needs_seconds=90)]


def test_hcgnet(speed, case, contender):
    speed(case, contender)
