"""Every CUDA and Triton kernel, found by enumeration, runs without a GPU and is compared with float64 truth.

A kernel is covered when the covering checks of an operator's tests run it: every instance of a CUDA template, and a
Triton kernel for every dtype. They are run here afresh, so a part of the tests proves as much as all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_host.library import CUDA_FILES, kernels_in, unverified
from cuda_host.probes import Probes
from triton.runtime.interpreter import InterpretedFunction

HERE = Path(__file__).parent
CUDA_KERNELS = [name for path in CUDA_FILES for name in kernels_in(path.read_text())]
TRITON_MODULES = [
    importlib.import_module(f"pyext.triton_kernels.{path.stem}")
    for path in sorted((HERE.parents[1] / "triton_kernels").glob("*.py"))
    if "@triton.jit" in path.read_text()
]


def modules_named(pattern: str) -> list[ModuleType]:
    return [importlib.import_module(path.stem) for path in sorted(HERE.glob(pattern))]


def test_every_cuda_kernel_is_checked(library, device):
    library.verified.clear()
    for module in modules_named("test_*_cuda_host.py"):
        module.run_covering_checks(library, device)
    assert unverified(library, CUDA_KERNELS) == []
    assert len(library.verified) >= len(set(CUDA_KERNELS)) >= 1


def test_a_kernel_without_checks_is_named(library, device):
    library.verified.clear()
    Probes(library, device, "broken").run("shared_without_race")  # runs, but is not compared with anything
    missing = unverified(library, [*CUDA_KERNELS, "shared_without_race", "never_compiled"])
    assert {"shared_without_race", "never_compiled: no instance"} <= set(missing)
    instances = library.compiled(CUDA_KERNELS)
    assert instances <= set(missing)
    assert "pyext::gated_excitation::gates_kernel<float>" in instances


def test_only_float64_verifies(library, device):
    library.verified.clear()
    probes = Probes(library, device, "broken")
    out = probes.run("shared_without_race")
    with pytest.raises(ValueError, match="float64 alone"):
        library.verify_launches([out])
    with pytest.raises(ValueError, match="float64 alone"):
        library.verify_launches([])
    library.verify_launches([out.double()])
    assert library.verified == {"shared_without_race"}
    library.forget_launches()
    library.verify_launches([out.double()])
    assert library.verified == {"shared_without_race"}


def test_kernels_are_found_in_sources():
    source = """
    // __global__ void not_this_one()
    template <typename T>
    __global__ void __launch_bounds__(kThreads, max(1, kBlocks)) first(T* x) {}
    static __global__ void second() {}
    __global__ __launch_bounds__(256) void third(int) {}
    """
    assert kernels_in(source) == ["first", "second", "third"]
    with pytest.raises(ValueError, match="whose name cannot be read"):
        kernels_in("__global__ auto fourth() -> void {}")


class TritonLaunches:
    """Kernels that the interpreter ran, and those of them whose results were then found as exact as torch's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._launched: set[str] = set()
        self.verified: set[str] = set()
        run = InterpretedFunction.run

        def run_and_note(kernel: InterpretedFunction, *args, **kwargs):
            result = run(kernel, *args, **kwargs)
            self._launched.add(kernel.fn.__qualname__)
            return result

        monkeypatch.setattr(InterpretedFunction, "run", run_and_note)

    def watch(self, module: ModuleType) -> None:
        """Takes the comparisons with float64 that `module` makes for verification of what ran before."""
        compare: Callable[..., None] = module.assert_as_exact

        def compare_and_verify(*args, **kwargs) -> None:
            compare(*args, **kwargs)
            self.verified |= self._launched
            self._launched.clear()

        self._monkeypatch.setattr(module, "assert_as_exact", compare_and_verify)


def triton_kernels() -> set[str]:
    """Public names are kernels, private ones their helpers."""
    found = (item for module in TRITON_MODULES for item in vars(module).items())
    return {name for name, value in found if isinstance(value, InterpretedFunction) and not name.startswith("_")}


def test_no_two_triton_kernels_have_one_name():
    """Launches are told apart by name, here and in the report of resources."""
    names = [
        name
        for module in TRITON_MODULES
        for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction) and value.fn.__module__ == module.__name__
    ]
    kernels = sorted(name for name in names if not name.startswith("_"))
    assert kernels == sorted(triton_kernels())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_triton_kernel_is_checked(monkeypatch, dtype):
    launches = TritonLaunches(monkeypatch)
    for module in modules_named("test_*_triton.py"):
        launches.watch(module)
        module.run_covering_checks(dtype)
    assert triton_kernels() - launches.verified == set()
    assert launches.verified


def test_a_triton_kernel_that_is_not_compared_is_not_verified(monkeypatch):
    launches = TritonLaunches(monkeypatch)
    (module,) = (m for m in modules_named("test_*_triton.py") if m.__name__ == "test_gated_excitation_triton")
    monkeypatch.setattr(module, "assert_as_exact", lambda *_: None)
    u, parameters, running = module.inputs(module.SMALL)
    module.kernels.forward(u, parameters, running, False, module.EPS, False)
    assert launches.verified == set()
    launches.watch(module)
    module.assert_as_exact()
    assert launches.verified == {"image_kernel"}
