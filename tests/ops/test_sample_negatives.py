"""The sampler of negatives: other classes alone, all of their rows, equally often, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from pyext.ops import sample_negatives

LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 4, 1, 0, 4])  # class 3 is empty


def test_rows_of_other_classes_equally_often():
    index = torch.arange(len(LABELS))
    drawn = sample_negatives(LABELS, index, 20_000, generator=0)
    assert drawn.shape == (10, 20_000)
    assert (LABELS[drawn] != LABELS.unsqueeze(1)).all()
    for row, negatives in enumerate(drawn):
        others = (LABELS[row] != LABELS).nonzero().flatten()
        counts = torch.bincount(negatives, minlength=10)[others].double()
        expected = 20_000 / len(others)
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < 40  # at most 8 degrees of freedom: exceeded once in 300,000 draws; the seed is fixed


def test_relaxed_draws_any_row():
    drawn = sample_negatives(LABELS, torch.tensor([0]), 5000, relaxed=True, generator=1)
    assert sorted(drawn.unique().tolist()) == list(range(10))


def test_the_same_seed_gives_the_same_rows():
    index = torch.tensor([1, 5, 6])
    first, again = (sample_negatives(LABELS, index, 50, generator=7) for _ in range(2))
    assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(sample_negatives(LABELS, index, 50, generator=generator), first)
    assert not torch.equal(sample_negatives(LABELS, index, 50, generator=generator), first)


def test_more_negatives_than_rows_of_other_classes():
    drawn = sample_negatives(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 3]), 9, generator=0)
    assert (drawn[0] == 3).all()
    assert (drawn[1] < 3).all()


WRONG = {
    "one class": (lambda: (torch.zeros(4).long(), torch.tensor([0]), 2), ValueError, "all 4 rows are of class 0"),
    "negative label": (lambda: (LABELS - 1, torch.tensor([0]), 2), ValueError, "labels holds -1"),
    "labels' dtype": (lambda: (LABELS.float(), torch.tensor([0]), 2), TypeError, "labels has dtype torch.float32"),
    "labels' shape": (lambda: (LABELS[:, None], torch.tensor([0]), 2), ValueError, r"labels has shape \(10, 1\)"),
    "no negatives": (lambda: (LABELS, torch.tensor([0]), 0), ValueError, "num_negatives is 0"),
    "row too large": (lambda: (LABELS, torch.tensor([10]), 2), IndexError, "expected 0 to 9"),
    "negative row": (lambda: (LABELS, torch.tensor([-1]), 2), IndexError, "expected 0 to 9"),
    "index's shape": (lambda: (LABELS, torch.tensor([[1]]), 2), ValueError, r"index is \(1, 1\)"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        sample_negatives(*arguments())
