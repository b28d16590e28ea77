"""`memory_update`: rows move as plain torch moves them, twice where they occur twice, and wrong input is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact
from memory_inputs import make_memory_inputs, plain_update

from pyext.ops import memory_update

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INDICES = {"apart": [3, 0, 5], "all the same": [4, 4, 4], "first and last": [2, 6, 2]}


def case_of(dtype, features=37):
    return make_memory_inputs((3, 3, features, 9, 4), dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("features", [1, 37, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_move(index, dtype, features, backend):
    case, rows = case_of(dtype, features), torch.tensor(index)
    moved = [bank.clone() for bank in case.banks]
    memory_update(moved, case.embeddings, rows, momentum=0.3, backend=backend)
    named = {f"banks[{i}]": bank for i, bank in enumerate(moved)}
    assert_as_exact(plain_update(rows, 0.3), case.embeddings, [], case.banks, named)
    untouched = [r for r in range(9) if r not in index]
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(moved, case.banks, strict=True))


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_reference_is_the_definition_one_image_after_another(index):
    case = case_of(torch.float64)
    expected = [bank.clone() for bank in case.banks]
    for bank, embedding in zip(expected, case.embeddings, strict=True):
        for row, v in zip(index, embedding, strict=True):
            bank[row] = F.normalize(0.3 * bank[row] + 0.7 * v, dim=0)
    moved = plain_update(torch.tensor(index), 0.3)(case.embeddings, [], case.banks)
    for actual, definition in zip(moved, expected, strict=True):
        torch.testing.assert_close(actual, definition, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_runs_are_bit_equal(backend):
    case = case_of(torch.float32)
    results = [torch.stack(case.banks) for _ in range(3)]
    for banks in results:
        memory_update(banks, case.embeddings, torch.tensor([1, 1, 1]), backend=backend)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_row_of_zeros_stays_finite(backend):
    case = case_of(torch.float32)
    banks = [torch.zeros_like(b) for b in case.banks]
    memory_update(banks, torch.zeros_like(case.embeddings), torch.tensor([0, 1, 2]), backend=backend)
    assert all((bank == 0).all() for bank in banks)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_empty_batch_moves_nothing(backend):
    case = case_of(torch.float32)
    before = torch.stack(case.banks)
    memory_update(case.banks, case.embeddings[:, :0], torch.empty(0, dtype=torch.int64), backend=backend)
    assert torch.equal(torch.stack(case.banks), before)


WRONG = {
    "index's shape": (lambda m, v, i: (m, v, i[:2]), ValueError, r"index has shape \(2,\), expected \(3,\)"),
    "index's dtype": (lambda m, v, i: (m, v, i.int()), TypeError, "index has dtype torch.int32"),
    "row too large": (lambda m, v, i: (m, v, i + 8), IndexError, "index holds 10, expected rows of the banks, 0 to 8"),
    "negative row": (lambda m, v, i: (m, v, i - 1), IndexError, "index holds -1"),
    "too few banks": (lambda m, v, i: (m[1:], v, i), ValueError, "2 banks for 3 peers"),
    "float64 banks": (lambda m, v, i: ([b.double() for b in m], v, i), TypeError, "float64 goes with float64"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("spoil", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(spoil, error, message, backend):
    case = case_of(torch.float32)
    before = torch.stack(case.banks)
    with pytest.raises(error, match=message):
        memory_update(*spoil(case.banks, case.embeddings, torch.arange(3)), backend=backend)
    assert torch.equal(torch.stack(case.banks), before)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_is_checked(momentum):
    case = case_of(torch.float32)
    with pytest.raises(ValueError, match=f"momentum is {momentum}, expected 0 to 1"):
        memory_update(case.banks, case.embeddings, torch.arange(3), momentum=momentum)
