"""Which implementation of an operator runs: the registry of operators, the chooser, and its explanation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_requested = _checked(os.environ.get("PYEXT_BACKEND", "auto"), "PYEXT_BACKEND")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Ask every operator inside the `with` block for backend `name` (one of `BACKENDS`).

    The choice is process-wide, not per thread. A backend that cannot run raises `BackendError` with the reason.
    """
    global _requested
    previous, _requested = _requested, _checked(name, "pyext.backend")
    try:
        yield
    finally:
        _requested = previous


def requested() -> str:
    """The backend that `pyext.backend` or ``PYEXT_BACKEND`` asks for now."""
    return _requested


@dataclass(frozen=True)
class Operator:
    """An operator's backends, best first: each maps the arguments to the reason why it cannot run, or to None."""

    name: str
    cannot_run: Mapping[str, Callable[..., str | None]] = field(repr=False)
    differentiable: bool = True
    unwritten: tuple[str, ...] = ()
    """Backends that the operator does not have yet."""

    def choose(self, requested: str | None, *args: Any) -> str:
        """Name of the backend that runs for `args`; `requested` overrides `pyext.backend` and ``PYEXT_BACKEND``."""
        name = _requested if requested is None else _checked(requested, f"{self.name}: argument backend")
        if name == "auto":
            return next(candidate for candidate, why in self.cannot_run.items() if why(*args) is None)
        reason = self._reason(name, *args)
        if reason is not None:
            raise BackendError(f"{self.name}: backend {name!r} cannot run: {reason}")
        return name

    def has_kernel(self, *args: Any) -> bool:
        """Whether, as backends are asked for now, a kernel of this operator runs for `args`, and not the reference.

        For modules that can also run by the operators of their parts, which then obey what is asked for.
        """
        return self._asked_for(*args) not in (None, "reference")

    def runs(self, backend: str, *args: Any) -> bool:
        """Whether, as backends are asked for now, `backend` runs for `args`: for modules that are written for it."""
        return self._asked_for(*args) == backend

    def _asked_for(self, *args: Any) -> str | None:
        names = self.cannot_run if _requested == "auto" else [_requested]
        return next((name for name in names if self._reason(name, *args) is None), None)

    def _reason(self, name: str, *args: Any) -> str | None:
        return f"{self.name} has no {name} kernel yet" if name in self.unwritten else self.cannot_run[name](*args)

    def explain(self, *args: Any) -> str:
        """One line per backend, in order of preference: chosen, able, or why not."""
        chosen = self.choose("auto" if _requested == "auto" else _requested, *args)
        lines = [f"{self.name}: backend {chosen!r} ({'asked for' if _requested != 'auto' else 'auto'})"]
        for name in (*self.cannot_run, *self.unwritten):
            reason = self._reason(name, *args)
            state = "chosen" if name == chosen else "can run" if reason is None else f"cannot run: {reason}"
            lines.append(f"  {name:<10} {state}")
        return "\n".join(lines)


OPERATORS: dict[str, Operator] = {}


def operators_with(backend: str) -> list[str]:
    """Names of the operators that have a kernel for `backend`, sorted."""
    return sorted(name for name, operator in OPERATORS.items() if backend in operator.cannot_run)


def register(operator: Operator) -> Operator:
    """Make `operator` known to `pyext.explain` and to the tests that enumerate operators."""
    OPERATORS[operator.name] = operator
    return operator
