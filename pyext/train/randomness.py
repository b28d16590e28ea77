"""Random numbers as functions of their place in the run, never of what was drawn before.

Every draw is keyed by (seed, stream, epoch, step or sample index, rank). A resumed run therefore repeats an
uninterrupted one exactly, whatever the number of data-loading workers, and a checkpoint needs no generator states.
"""

from __future__ import annotations

import enum
import random

import numpy as np
import torch


class Stream(enum.IntEnum):
    """What a random number is for; streams with the same seed are independent."""

    WEIGHTS = 0
    ORDER = 1
    AUGMENTATION = 2
    STEP = 3
    MIXUP = 4
    VALIDATION = 5


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """A NumPy generator for `stream` at `place`, such as (epoch, step, rank)."""
    return np.random.default_rng([seed, stream, *place])


def seed_all(seed: int, stream: Stream, *place: int) -> None:
    """Seed the global generators of torch (all devices), NumPy and Python for `stream` at `place`."""
    words = np.random.SeedSequence([seed, stream, *place]).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    random.seed(int(words[1]))
