"""The support matrix of the README: operator, backend, dtypes, what runs; generated from the operators themselves."""

from __future__ import annotations

import torch

from pyext._backend import OPERATORS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = ("operator", "backend", "runs on", "dtypes", "backward", "second derivative", "torch.compile, export")
_DEVICES = {"reference": "any", "cpu": "CPU", "cuda": "CUDA", "triton": "CUDA"}


def _refuses_dtype(operator: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend's own predicate names the dtype as the reason, on a tensor of the device that it runs on."""
    device = torch.device("cuda") if _DEVICES[backend] == "CUDA" else torch.device("cpu")

    class Described:
        """What a predicate looks at; no tensor, since there may be no such device here."""

    described = Described()
    described.device, described.dtype, described.requires_grad = device, dtype, False  # type: ignore[attr-defined]
    reason = OPERATORS[operator].cannot_run[backend](described)
    return reason is not None and "float64" in reason


def matrix() -> str:
    """The matrix as a Markdown table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for name, operator in sorted(OPERATORS.items()):
        for backend in operator.cannot_run:
            kept = [str(d).removeprefix("torch.") for d in DTYPES if not _refuses_dtype(name, backend, d)]
            once = "yes" if operator.differentiable else "no"
            twice = "no" if once == "no" else "yes" if backend == "reference" else "no, refused in words"
            row = (name, backend, _DEVICES[backend], ", ".join(kept), once, twice, "yes")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(matrix())
