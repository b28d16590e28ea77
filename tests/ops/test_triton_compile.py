"""Triton kernels compile for GPUs that this machine lacks, within their registers.

The launchers run on CPU tensors with a driver that only names its GPU, so that each kernel is compiled as a launch
would: same blocks, same specialisation of strides and alignment. That needs Triton without its interpreter, hence a
process of its own: `python test_triton_compile.py sm_90` prints the resources of every compiled kernel as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# channels, height, width, dtype, layout: the widths of HCGNet from CIFAR to ImageNet's transitions, one of each kind.
SHAPES = {
    "sm_80": [
        (12, 32, 32, "float32", "nchw"),
        (36, 8, 8, "bfloat16", "nchw"),
        (128, 14, 14, "float16", "channels_last"),
        (430, 7, 7, "float32", "nchw"),
    ],
    "sm_90": [
        (12, 32, 32, "float32", "nchw"),
        (36, 8, 8, "bfloat16", "nchw"),
        (128, 14, 14, "float32", "channels_last"),
        (430, 7, 7, "bfloat16", "channels_last"),
    ],
    "sm_100": [(64, 28, 28, "bfloat16", "nchw")],
    "sm_120": [(64, 28, 28, "float32", "nchw")],
}
# peers, features, negatives, dtype of the banks.
MEMORY_SHAPES = [(4, 128, 4096, "float32"), (2, 64, 255, "bfloat16"), (4, 130, 255, "float16")]
MODULES = ("gated_excitation", "memory_contrast", "memory_update")
SHARED_LIMIT = 48 * 1024  # what every GPU grants without asking


def _resources(kernel) -> dict[str, int]:
    """Registers, stack (spills live there) and local memory from the cubin; shared memory from Triton."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {name.lower(): int(value) for name, value in fields.items()} | {"shared": kernel.metadata.shared}


def _record(capability: int) -> list[dict]:
    """Make every launch compile for `capability` instead; returns the list that the launches fill."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Named:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    rows, seen, run = [], set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            rows.append({"kernel": self.__name__, "warps": kernel.metadata.num_warps} | _resources(kernel))

    triton.runtime.driver.set_active(Named())
    JITFunction.run = compile_only
    return rows


def _launch_gated_excitation(channels: int, height: int, width: int, dtype: str, layout: str) -> None:
    import torch
    from inputs import make_inputs

    from pyext.triton_kernels import gated_excitation as kernels

    u, parameters, running = make_inputs(
        2, channels, height, width, forget=channels // 2, attention=channels, dtype=getattr(torch, dtype), layout=layout
    )
    kernels.forward(u, parameters, running, False, 1e-5, False)
    for statistics in (running, []):
        out, *saved = kernels.forward(u, parameters, statistics, not statistics, 1e-5, True)
        kernels.backward(out, u, parameters, statistics, *saved, not statistics, 1e-5)


def _launch_memory(peers: int, features: int, negatives: int, dtype: str) -> None:
    import torch
    from memory_inputs import TEMPERATURE, make_memory_inputs

    from pyext.triton_kernels import memory_contrast, memory_update

    shape = (peers, 3, features, 50, negatives)
    embeddings, banks, indices = make_memory_inputs(shape, torch.float32, getattr(torch, dtype))
    loss, *saved = memory_contrast.forward(embeddings, banks, indices, TEMPERATURE)
    memory_contrast.backward(loss, embeddings, banks, *saved, TEMPERATURE)
    memory_update.update(banks, embeddings, indices[:, 0], 0.5)


def _kernels() -> set[str]:
    """Every kernel of every module: a @triton.jit function whose name is public, helpers being private."""
    import importlib

    from triton.runtime.jit import JITFunction

    modules = [importlib.import_module("pyext.triton_kernels." + name) for name in MODULES]
    members = [item for module in modules for item in vars(module).items()]
    return {name for name, value in members if isinstance(value, JITFunction) and not name.startswith("_")}


def main(architecture: str) -> None:
    rows = _record(int(architecture.removeprefix("sm_")))
    launches = [(_launch_gated_excitation, shape) for shape in SHAPES[architecture]]
    launches += [(_launch_memory, shape) for shape in MEMORY_SHAPES]
    for launch, shape in launches:
        before = len(rows)
        launch(*shape)
        for row in rows[before:]:
            row["shape"] = shape
    print(json.dumps({"kernels": sorted(_kernels()), "rows": rows}))


@pytest.mark.parametrize("architecture", SHAPES)
def test_every_kernel_compiles_without_spills(architecture, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # An empty cache: a kernel compiled by an earlier version of Triton or of ptxas must not stand in.
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    process = subprocess.run(
        [sys.executable, __file__, architecture], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert {row["kernel"] for row in result["rows"]} == set(result["kernels"])
    for row in result["rows"]:
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT, row


def test_every_module_is_compiled():
    folder = Path(__file__).parents[2] / "triton_kernels"
    with_kernels = {path.stem for path in folder.glob("*.py") if "@triton.jit" in path.read_text()}
    assert with_kernels == set(MODULES)


if __name__ == "__main__":
    main(sys.argv[1])
