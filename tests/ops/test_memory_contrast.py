"""`memory_contrast` on the CPU: numbers, both orders of rows, memory, states, and what it says to wrong input."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from exactness import assert_as_exact
from memory_inputs import (
    SHAPES,
    TEMPERATURE,
    in_float64,
    loss_and_gradient,
    make_memory_inputs,
    plain_contrast,
)

import pyext
from pyext.ops import memory_contrast, memory_update
from pyext.ops.memory_contrast import reference

DTYPES = [
    pytest.param(torch.float64, torch.float64, id="float64"),
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, torch.float16, id="float16"),
    pytest.param(torch.float32, torch.bfloat16, id="float32-banks-bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-banks-float32"),
]
# Several tiles of a bank, several blocks of rows, several factors of a product of logarithms.
LARGE = {"several tiles": (3, 4, 96, 6000, 2500)}
SMALL = SHAPES["few"]
on_cpu = functools.partial(memory_contrast, backend="cpu")


def in_order(tiled: bool):
    """The CPU kernel with the order of rows that was asked for instead of the cheaper one."""

    def call(embeddings, banks, indices, temperature):
        return torch.ops.pyext.memory_contrast(embeddings, banks, indices, temperature, tiled)[0]

    return call


@pytest.mark.parametrize(("dtype", "bank_dtype"), DTYPES)
@pytest.mark.parametrize("tiled", [False, True], ids=["gathered", "tiled"])
@pytest.mark.parametrize("shape", (SHAPES | LARGE).values(), ids=SHAPES | LARGE)
def test_loss_and_gradient(shape, tiled, dtype, bank_dtype):
    case = make_memory_inputs(shape, dtype, bank_dtype)
    loss, gradient = loss_and_gradient(case, in_order(tiled))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    actual = {"loss": loss, "gradient": gradient}
    assert_as_exact(plain_contrast(case.indices), case.embeddings, [], case.banks, actual)


def test_orders_of_rows_agree():
    case = make_memory_inputs(LARGE["several tiles"], torch.float64)
    tiled, gathered = (loss_and_gradient(case, in_order(tiled)) for tiled in (True, False))
    for a, b in zip(tiled, gathered, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_tiles_are_really_sorted():
    """The order that is kept for backward: positives first, then tile after tile, nothing lost."""
    embeddings, banks, indices = make_memory_inputs(LARGE["several tiles"], torch.float32)
    rows = torch.ops.pyext.memory_contrast(embeddings, banks, indices, TEMPERATURE, True)[1].long()
    assert torch.equal(rows[:, 0], indices[:, 0])
    assert torch.equal(rows.sort(1)[0], indices.sort(1)[0])
    tile = rows[:, 1:] // 1024  # 512 KiB of rows of 96 float32, rounded down to a power of two
    assert (tile.diff(dim=1) >= 0).all()
    assert tile.max() > 1
    assert not torch.equal(rows, indices)


def test_banks_as_one_tensor_and_as_slices():
    embeddings, banks, indices = make_memory_inputs(SMALL, torch.float32)
    expected = on_cpu(embeddings, banks, indices)
    assert torch.equal(on_cpu(embeddings, torch.stack(banks), indices), expected)
    wide = torch.full((len(banks), 11, 12), float("nan"))
    wide[:, :, 2:9] = torch.stack(banks)
    assert torch.equal(on_cpu(embeddings, wide[:, :, 2:9], indices), expected)
    strided = embeddings.transpose(1, 2).contiguous().transpose(1, 2)
    every_second = indices.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(on_cpu(strided, banks, every_second), expected)


@pytest.mark.parametrize("shape", [SHAPES["whole vectors"], LARGE["several tiles"]], ids=str)
def test_results_do_not_depend_on_run_or_threads(shape):
    case = make_memory_inputs(shape, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (before, before, 1, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(case, on_cpu))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_loss_at_the_papers_size_is_better_than_plain_torch():
    case = make_memory_inputs((2, 4, 128, 50_000, 4096), torch.float32)
    truth = reference(*in_float64(case), TEMPERATURE)
    ours = (on_cpu(*case).double() - truth).abs() / truth
    plain = (reference(*case, TEMPERATURE).double() - truth).abs() / truth
    assert ours < 2e-7 < plain


MEMORY = """
import torch, pyext
from pathlib import Path
from pyext.ops import memory_contrast

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
def normal(*size):
    return torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=-1)
banks = [normal(50_000, 128) for _ in range(4)]
embeddings = normal(4, 64, 128).requires_grad_()
indices = torch.randint(0, 50_000, (64, 16_385), generator=generator)
memory_contrast(embeddings[:, :2], banks, indices[:2, :9]).backward()  # loads what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
before = status("VmRSS")
memory_contrast(embeddings, banks, indices).backward()
print(status("VmHWM") - before)
"""


def test_peak_memory_at_the_papers_largest_size():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout)
    scores = 12 * 64 * 16_385 * 4
    assert 0.95 * scores <= peak <= 64e6  # the kernel's counter of pages lags a little


def test_nan_embedding_gives_nan():
    embeddings, banks, indices = make_memory_inputs(SMALL, torch.float32)
    embeddings[1, 2, 3] = float("nan")
    for backend in ("cpu", "reference"):
        assert memory_contrast(embeddings, banks, indices, backend=backend).isnan()


def test_infinite_exponentials_give_nan_as_in_plain_torch():
    embeddings, banks, indices = make_memory_inputs(SMALL, torch.float32)
    for backend in ("cpu", "reference"):
        assert not memory_contrast(100 * embeddings, banks, indices, backend=backend).isfinite()


def test_changed_banks_are_refused_in_backward():
    embeddings, banks, indices = make_memory_inputs(SMALL, torch.float32)
    loss = on_cpu(embeddings.requires_grad_(), banks, indices)
    memory_update(banks, embeddings, indices[:, 0], backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_works_in_the_reference_and_is_refused_by_the_kernel():
    embeddings, banks, indices = make_memory_inputs(SMALL, torch.float64)
    embeddings.requires_grad_()
    for backend in ("reference", "cpu"):
        loss = memory_contrast(embeddings, banks, indices, backend=backend)
        (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        if backend == "reference":
            (second,) = torch.autograd.grad(gradient.square().sum(), embeddings)
            assert second.abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="can be differentiated once"):
                torch.autograd.grad(gradient.square().sum(), embeddings)


def test_compiles_without_graph_break_and_exports():
    embeddings, banks, indices = make_memory_inputs(SMALL, torch.float32)

    def step(x):
        return memory_contrast(torch.nn.functional.normalize(x, dim=-1), banks, indices).square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaf = embeddings.requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf), leaf)
    (actual,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    class Step(torch.nn.Module):
        def forward(self, x):
            return memory_contrast(x, banks, indices)

    program = torch.export.export(Step(), (embeddings.detach(),))
    assert "pyext.memory_contrast" in program.graph_module.code
    assert torch.equal(program.module()(embeddings), Step()(embeddings))


def replaced_bank(banks, bank):
    return [banks[0], bank, *banks[2:]]


def index_of(indices, value):
    return indices.clone().index_fill_(1, torch.tensor([2]), value)


WRONG = {
    "dimensions": (lambda v, m, i: (v[0], m, i), ValueError, r"embeddings has shape \(4, 7\), expected \(peers"),
    "integers": (lambda v, m, i: (v.int(), m, i), TypeError, "embeddings has dtype torch.int32"),
    "one peer": (lambda v, m, i: (v[:1], m[:1], i), ValueError, "one peer, expected at least two"),
    "too few banks": (lambda v, m, i: (v, m[:2], i), ValueError, "2 banks for 3 peers"),
    "rows of a bank": (
        lambda v, m, i: (v, replaced_bank(m, m[1][:5]), i),
        ValueError,
        r"banks\[1\] has shape \(5, 7\)",
    ),
    "features": (lambda v, m, i: (v[..., 1:], m, i), ValueError, r"banks\[0\] has shape \(11, 7\), expected \(rows, 6"),
    "bank's dtype": (
        lambda v, m, i: (v, replaced_bank(m, m[1].bfloat16()), i),
        TypeError,
        r"banks\[1\] has dtype torch.bfloat16",
    ),
    "float64 banks": (lambda v, m, i: (v, [b.double() for b in m], i), TypeError, "float64 goes with float64"),
    "bank's device": (lambda v, m, i: (v, replaced_bank(m, m[1].to("meta")), i), ValueError, r"banks\[1\] is on meta"),
    "gaps": (lambda v, m, i: (v, [b.t().contiguous().t() for b in m], i), ValueError, r"banks\[0\] has rows with gaps"),
    "no negatives": (lambda v, m, i: (v, m, i[:, :1]), ValueError, r"indices has shape \(4, 1\), expected"),
    "batch": (lambda v, m, i: (v, m, i[1:]), ValueError, r"indices has shape \(3, 6\), expected \(4, 1 \+ negatives\)"),
    "empty batch": (lambda v, m, i: (v[:, :0], m, i[:0]), ValueError, "at least one image"),
    "int32 indices": (lambda v, m, i: (v, m, i.int()), TypeError, "indices has dtype torch.int32, expected int64"),
    "row too large": (lambda v, m, i: (v, m, index_of(i, 11)), IndexError, "indices holds 11, expected .* 0 to 10"),
    "row far too large": (lambda v, m, i: (v, m, index_of(i, 2**32)), IndexError, f"indices holds {2**32}"),
    "negative row": (lambda v, m, i: (v, m, index_of(i, -1)), IndexError, "indices holds -1, expected"),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("spoil", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(spoil, error, message, backend):
    with pytest.raises(error, match=message):
        memory_contrast(*spoil(*make_memory_inputs(SMALL, torch.float32)), backend=backend)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_temperature_must_be_positive(backend, temperature):
    case = make_memory_inputs(SMALL, torch.float32)
    with pytest.raises(ValueError, match=f"temperature is {temperature}, expected more than 0"):
        memory_contrast(*case, temperature=temperature, backend=backend)


def test_temperature_whose_exponential_overflows_is_named():
    case = make_memory_inputs(SMALL, torch.float32)
    with pytest.raises(ValueError, match=r"temperature is 0.01, but exp\(1/temperature\) must be finite"):
        memory_contrast(*case, temperature=0.01)
    assert memory_contrast(*in_float64(case), temperature=0.01).isfinite()
    assert memory_contrast(*case, temperature=0.012).isfinite()


def test_backward_refuses_what_forward_did_not_return():
    embeddings, banks, indices = make_memory_inputs(SMALL, torch.float32)
    loss, rows, weights = torch.ops.pyext.memory_contrast(embeddings, banks, indices, 0.1, None)
    backward = functools.partial(torch.ops.pyext.memory_contrast_backward, loss, embeddings, banks)
    for wrong in (rows.clone().fill_(11), rows.clone().fill_(-1)):
        with pytest.raises(RuntimeError, match="rows hold a number that is no row"):
            backward(wrong, weights, 0.1)
    with pytest.raises(RuntimeError, match="rows or weights are not what the forward pass returned"):
        backward(rows, weights[1:], 0.1)


def test_backend_that_cannot_run_says_why():
    case = make_memory_inputs(SMALL, torch.float64)
    with pytest.raises(pyext.BackendError, match="backend 'cuda' cannot run: embeddings is on cpu"):
        memory_contrast(*case, backend="cuda")
    with pytest.raises(pyext.BackendError, match="float64 runs on the CPU"):
        memory_contrast(*case, backend="triton")
    assert "memory_contrast: backend 'cpu' (auto)" in pyext.explain(memory_contrast, case.embeddings)
