"""The clock: all contenders of a case in turn, round after round, in one process."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure: a case gets about `seconds`, within these rounds; one sample lasts at least `sample`."""

    seconds: float
    most_rounds: int
    least_rounds: int = 3
    sample: float = 0.01


FULL = Effort(seconds=12, most_rounds=41, least_rounds=5)
GPU = Effort(seconds=1.5, most_rounds=31, least_rounds=5)
QUICK = Effort(seconds=1.5, most_rounds=7)


def synchronise(device: torch.device) -> None:
    """Wait for all that was started on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(run: Run, device: torch.device, repeats: int = 1) -> float:
    """Mean duration of `repeats` calls, one after another."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def interleaved(runs: Mapping[str, Run], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Seconds per call of every one of `runs`, one sample per round, in another order every round.

    Disturbances from outside then meet all contenders alike, and nobody always comes after the same one: behind ONNX
    Runtime, HCGNet-A1 took 92 ms instead of 68. A sample starts when the previous contender's threads have
    come to rest: those of ONNX Runtime spin for a while after a call. Where a sample is more than one call, a call that
    is not timed goes first: it refills the caches from which the previous contender drove this one's data.
    """
    estimates = {name: _estimate(run, device) for name, run in runs.items()}
    repeats = {name: max(1, round(effort.sample / estimate)) for name, estimate in estimates.items()}
    round_seconds = sum(estimates[name] * (repeats[name] + (repeats[name] > 1)) for name in runs)
    rounds = min(effort.most_rounds, max(effort.least_rounds, int(effort.seconds / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with _no_garbage_collection():
        for index in range(rounds):
            for name in random.Random(index).sample(list(runs), len(runs)):
                _rest()
                if repeats[name] > 1:
                    runs[name]()
                samples[name].append(seconds_per_call(runs[name], device, repeats[name]))
    return samples


def quiet_median(run: Run, device: torch.device, seconds: float) -> float:
    """Median seconds per call of `run` alone, measured for about `seconds`."""
    return statistics.median(interleaved({"": run}, device, Effort(seconds, 101))[""])


def spread(samples: list[float]) -> float:
    """The interquartile range."""
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def _rest(nap: float = 0.002, patience: float = 0.5) -> None:
    """Sleep until the threads of this process use no processor, or `patience` seconds are over."""
    deadline = time.perf_counter() + patience
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(nap)
        if time.process_time() - used < nap / 10:
            return


def _estimate(run: Run, device: torch.device) -> float:
    run()
    return min(seconds_per_call(run, device) for _ in range(2))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
