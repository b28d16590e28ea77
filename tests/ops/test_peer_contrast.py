"""`peer_contrast` on the CPU: numbers, ranges of rows, memory, degenerate batches, and what it says to wrong input."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from described import peer_contrast as described
from exactness import assert_as_exact

import pyext
from pyext.ops import PeerContrastTerms, peer_contrast
from pyext.ops.peer_contrast import reference

# peers, batch, features: one block and several, whole vectors and not, more peers than 128 rows have room for.
SHAPES = [(1, 7, 3), (2, 128, 128), (3, 77, 33), (4, 150, 20), (9, 21, 5)]
on_cpu = functools.partial(peer_contrast, backend="cpu")


def terms_and_gradient(call, embeddings, labels, **options):
    """The terms as one tensor, and the gradient of their sum with unequal weights."""
    leaf = embeddings.detach().requires_grad_()
    terms = torch.stack(call(leaf, labels, **options))
    (gradient,) = torch.autograd.grad(terms @ torch.tensor([0.7, 1.1, 1.3, 0.9], dtype=terms.dtype), leaf)
    return terms.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.005], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_terms_and_gradient(shape, temperature, dtype):
    case = described.make_case(shape, dtype)
    options = {"labels": case.options["labels"], "temperature": temperature}
    terms, gradient = terms_and_gradient(on_cpu, case.main, **options)
    assert terms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert_as_exact(
        lambda v, *_: terms_and_gradient(reference, v, **options),
        case.main,
        [],
        [],
        {"terms": terms, "gradient": gradient},
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ranges_of_rows_add_up_to_the_whole(backend):
    """What ranks with gathered embeddings do: terms and gradients add up over the ranges."""
    case = described.make_case((3, 77, 33), torch.float64)
    call = functools.partial(peer_contrast, backend=backend)
    labels = case.options["labels"]
    whole = terms_and_gradient(call, case.main, labels)
    parts = [terms_and_gradient(call, case.main, labels, rows=rows) for rows in [(0, 19), (19, 19), (19, 64), (64, 77)]]
    for expected, *found in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(found), expected, rtol=1e-12, atol=1e-12)


def test_results_do_not_depend_on_run_or_threads():
    case = described.make_case((4, 150, 20), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (before, before, 1, 3):
            torch.set_num_threads(threads)
            results.append(terms_and_gradient(on_cpu, case.main, case.options["labels"]))
    finally:
        torch.set_num_threads(before)
    for terms, gradient in results[1:]:
        assert torch.equal(terms, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
class TestDegenerate:
    def test_one_peer_has_only_its_own_contrast(self, backend):
        case = described.make_case((1, 20, 8), torch.float32)
        terms = peer_contrast(case.main, case.options["labels"], backend=backend)
        assert terms.vcl > 0
        assert terms[1:] == (0, 0, 0)

    def test_rows_without_positives_contribute_nothing(self, backend):
        case = described.make_case((2, 6, 8), torch.float64)
        v, labels = case.main, torch.tensor([5, 5, 5, 1, 2, 3])
        counted = []
        for i in range(2):
            x = v[i] @ v[i].t() / 0.1
            for b in range(3):
                others, positives = [c for c in range(6) if c != b], [c for c in range(3) if c != b]
                counted.append(x[b, others].logsumexp(0) - x[b, positives].mean())
        torch.testing.assert_close(peer_contrast(v, labels, backend=backend).vcl, torch.stack(counted).sum() / 3)

    def test_no_row_has_a_positive(self, backend):
        case = described.make_case((2, 6, 8), torch.float64)
        terms, gradient = terms_and_gradient(
            functools.partial(peer_contrast, backend=backend), case.main, torch.arange(6)
        )
        assert terms[0] == terms[1] == 0
        assert terms[2] > 0
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("batch", [0, 1])
    def test_no_image_and_one_image(self, backend, batch):
        v = torch.ones(3, batch, 4)
        terms, gradient = terms_and_gradient(
            functools.partial(peer_contrast, backend=backend), v, torch.zeros(batch, dtype=torch.int64)
        )
        assert not terms.any()
        # A softmax over one column is 1 up to rounding; its weight is soft_temperature / temperature, for two others.
        assert gradient.abs().sum() <= 60 * 8 * torch.finfo(torch.float32).eps

    def test_nan_embedding_gives_nan(self, backend):
        case = described.make_case((2, 20, 8), torch.float32)
        case.main[1, 3, 2] = float("nan")
        assert torch.stack(peer_contrast(case.main, case.options["labels"], backend=backend)).isnan()[1:].all()


def test_list_and_strided_embeddings():
    case = described.make_case((3, 20, 8), torch.float32)
    labels = case.options["labels"]
    expected = on_cpu(case.main, labels)
    assert on_cpu(list(case.main), labels) == expected
    assert on_cpu(case.main.transpose(1, 2).contiguous().transpose(1, 2), labels.repeat_interleave(2)[::2]) == expected
    assert isinstance(expected, PeerContrastTerms)


MEMORY = """
import torch
from pathlib import Path
from pyext.ops import peer_contrast

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

torch.set_num_threads(2)
v = torch.nn.functional.normalize(torch.randn(4, 2048, 128), dim=-1).requires_grad_()
labels = torch.arange(2048) % 100
sum(peer_contrast(v[:, :64], labels[:64])).backward()  # loads what is loaded once
v.grad = None
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
before = status("VmRSS")
sum(peer_contrast(v, labels)).backward()
print(status("VmHWM") - before)
"""


def test_peak_memory():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 4 * 2048 * 128 * 4 <= int(result.stdout) <= 32e6  # at least the gradient


def test_double_backward_is_refused_by_the_kernel():
    case = described.make_case((2, 9, 4), torch.float64)
    leaf = case.main.requires_grad_()
    (gradient,) = torch.autograd.grad(sum(on_cpu(leaf, case.options["labels"])), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(gradient.square().sum(), leaf)


def test_compiles_without_graph_break():
    case = described.make_case((2, 20, 8), torch.float32)
    leaf = case.main.requires_grad_()

    def step(x):
        return sum(peer_contrast(torch.nn.functional.normalize(x, dim=-1), case.options["labels"]))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(step(leaf), leaf)
    (actual,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


WRONG = {
    "dimensions": (lambda v, y: (v[0], y), {}, ValueError, r"embeddings has shape \(6, 3\), expected \(peers"),
    "no peer": (lambda v, y: (v[:0], y), {}, ValueError, r"embeddings has shape \(0, 6, 3\)"),
    "no feature": (lambda v, y: (v[..., :0], y), {}, ValueError, r"\(2, 6, 0\), expected at least one feature"),
    "empty list": (lambda v, y: ([], y), {}, ValueError, "embeddings is an empty list"),
    "integers": (lambda v, y: (v.int(), y), {}, TypeError, "embeddings has dtype torch.int32"),
    "unequal batches": (lambda v, y: ([v[0], v[1][:5]], y), {}, ValueError, r"embeddings\[1\] has shape \(5, 3\)"),
    "unequal dtypes": (lambda v, y: ([v[0], v[1].double()], y), {}, TypeError, r"embeddings\[1\] is torch.float64"),
    "labels' dtype": (lambda v, y: (v, y.int()), {}, TypeError, "labels has dtype torch.int32, expected int64"),
    "labels' shape": (lambda v, y: (v, y[1:]), {}, ValueError, r"labels has shape \(5,\), expected \(6,\)"),
    "labels' device": (lambda v, y: (v, y.to("meta")), {}, ValueError, "labels is on meta"),
    "temperature": (lambda v, y: (v, y), {"temperature": 0.0}, ValueError, "temperature is 0.0, expected more than 0"),
    "NaN": (lambda v, y: (v, y), {"temperature": float("nan")}, ValueError, "temperature is nan, expected"),
    "soft": (lambda v, y: (v, y), {"soft_temperature": -1.0}, ValueError, "soft_temperature is -1.0, expected"),
    "rows": (lambda v, y: (v, y), {"rows": (2, 7)}, ValueError, r"rows is \(2, 7\), expected 0 <= start"),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("spoil", "options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(spoil, options, error, message, backend):
    case = described.make_case((2, 6, 3), torch.float32)
    with pytest.raises(error, match=message):
        peer_contrast(*spoil(case.main, case.options["labels"]), **options, backend=backend)


def test_backend_that_cannot_run_says_why():
    case = described.make_case((2, 6, 3), torch.float32)
    with pytest.raises(pyext.BackendError, match="no triton kernel yet"):
        peer_contrast(case.main, case.options["labels"], backend="triton")
    assert "peer_contrast: backend 'cpu' (auto)" in pyext.explain(peer_contrast, case.main)
