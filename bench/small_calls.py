"""Small calls that reach every kernel, for compute-sanitizer: `python -m bench.small_calls [--only OPERATOR]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from bench.samples import SAMPLES, Call
from pyext._backend import operators_with

BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def run_all(device: torch.device, names: Sequence[str], backends: Sequence[str]) -> int:
    """Run every sample shape of the operators `names`, forward and backward; returns the number of calls."""
    calls = 0
    for name in names:
        for index, shape in enumerate(SAMPLES[name].odd.values()):
            layout = SAMPLES[name].layouts[index % 2]
            dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
            drawn = SAMPLES[name].draw(shape, dtype, dtype, layout, 0)
            for backend in backends:
                calls += _run(name, drawn.to(device), backend)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls


def _run(name: str, call: Call, backend: str) -> int:
    """Inference, then forward and backward with running and with the batch's statistics."""
    with torch.no_grad():
        SAMPLES[name].run(call, False, backend=backend)
    if not SAMPLES[name].differentiable:
        return 1
    leaves = [leaf.requires_grad_() for leaf in call.leaves.values()]
    for training in (False, True):
        out = SAMPLES[name].run(call, training, backend=backend)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.small_calls", description=__doc__)
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--device", default="cuda", type=torch.device)
    options = parser.parse_args()
    names = [name for name in operators_with("cuda") if options.only in name]
    if not names:
        parser.error(f"no operator has {options.only!r} in its name: {', '.join(operators_with('cuda'))}")
    calls = run_all(options.device, names, BACKENDS[options.device.type])
    print(f"{calls} calls of {', '.join(names)} on {options.device}")


if __name__ == "__main__":
    main()
