"""What a benchmark compares, and the gate that every output passes before its speed is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.roofs import Work


@dataclass(frozen=True)
class Runner:
    """One contender, ready to be timed.

    `run` is what the clock sees. `results` restores the initial state, calls `run` once and gives all that it produced
    by name, so it says the same before and after any number of runs. `release` lets go of what a run leaves behind and
    the next one makes anew: gradients.
    """

    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contender:
    """A way to do a case's work; `ours` tells the library from its peers."""

    name: str
    build: Callable[[], Runner]
    ours: bool = False


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison.

    `truth` builds plain torch in float64; `plain` names the contenders whose error is the yardstick. `distances` says,
    by result, how far (of its norm) a peer may be from the truth where that is not the usual. `dtype`: what the
    arithmetic is rounded to. A case with `needs_seconds` is left out when less time than that is left. `memory`:
    peak memory is compared too.
    """

    name: str
    contenders: Sequence[Contender]
    truth: Callable[[], Runner]
    work: Callable[[], Work]
    plain: Sequence[str] = ("eager",)
    distances: Mapping[str, float] = field(default_factory=dict)
    needs_seconds: float = 0
    dtype: torch.dtype = torch.float32
    memory: bool = False

    def contender(self, name: str) -> Contender:
        return next(c for c in self.contenders if c.name == name)


_DISTANCE = 4.0
"""Times the square root of the precision: how far, of the truth's norm, a peer may be."""


class WrongOutput(AssertionError):
    """A contender's output is further from the float64 truth than the gate allows: its speed means nothing."""


class Gate:
    """Holds a case's float64 truth, and passes the outputs that are close enough to it.

    Ours: at most twice as far as plain torch, plus four ulps. Peers: within a distance that tells that they did the
    same work; their rounding is their own affair (torch's batch normalisation in channels_last puts a gradient 3e-4 of
    its norm away, hundreds of times as far as in NCHW). Plain torch is a peer in this too: a case whose yardstick is
    broken (other weights, another input) measures nothing.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.truth = _in_float64(case.truth().results())
        self.plain_errors = dict.fromkeys(self.truth, 0.0)
        for name in case.plain:
            plain = case.contender(name)
            results = plain.build().results()
            self.check(plain, results)
            for key, value in results.items():
                self.plain_errors[key] = max(self.plain_errors[key], self._error(key, value))

    def check(self, contender: Contender, results: dict[str, Tensor]) -> None:
        """Raise `WrongOutput` unless every one of `results` is close enough to the truth."""
        who = f"{self.case.name}, {contender.name}"
        if set(results) != set(self.truth):
            raise WrongOutput(f"{who}: gave {sorted(results)}, expected {sorted(self.truth)}")
        for name, value in results.items():
            if value.shape != self.truth[name].shape:
                shapes = tuple(value.shape), tuple(self.truth[name].shape)
                raise WrongOutput("{}: {} has shape {}, expected {}".format(who, name, *shapes))
            error, allowed = self._error(name, value), self._allowed(contender, name, value)
            if not error <= allowed:  # also where the error is NaN
                raise WrongOutput(f"{who}: {name} is {error:.3g} from the float64 truth, {allowed:.3g} is allowed")

    def _allowed(self, contender: Contender, name: str, value: Tensor) -> float:
        precision = max(torch.finfo(dtype).eps for dtype in (value.dtype, self.case.dtype))
        norm = self.truth[name].norm().item()
        if contender.ours:
            return 2 * self.plain_errors[name] + 4 * precision * norm
        return self.case.distances.get(name, _DISTANCE * precision**0.5) * norm

    def _error(self, name: str, value: Tensor) -> float:
        return (value.detach().cpu().double() - self.truth[name]).norm().item()


def _in_float64(results: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(value.dtype != torch.float64 for value in results.values()):
        raise TypeError("the truth must be computed in float64")
    return {name: value.detach().cpu().clone() for name, value in results.items()}
