"""DropBlock: schedule, mask, scale, and what it must not do."""

import copy
import math
import pickle

import pytest
import torch

from pyext.nn import DropBlock2d, Transition, drop_block_probability, set_drop_block_epoch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("start", "length"), [(0, 10), (10, 20), (30, 40), (70, 80)])
def test_probability_rises_within_each_cycle(start, length):
    for t in (0, 1, length / 4, length / 2, length - 1):
        expected = 0.1 - 0.05 * (1 + math.cos(math.pi * t / length))
        assert drop_block_probability(start + t) == pytest.approx(expected, abs=1e-15)


def test_other_period_and_maximum():
    assert drop_block_probability(3 + 3, period=3, maximum=0.4) == pytest.approx(0.2)


@pytest.mark.parametrize("arguments", [(-1,), (0, 0), (0, 10, 1.5)])
def test_schedule_refuses(arguments):
    with pytest.raises(ValueError, match="expected epoch >= 0, period >= 1 and maximum in"):
        drop_block_probability(*arguments)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_are_squares_shared_by_all_channels(size):
    block = DropBlock2d(0.3, size)
    out = block(torch.ones(64, 3, 12, 11))
    assert out.shape == (64, 3, 12, 11)
    kept = out != 0
    assert (kept == kept[:, :1]).all()
    dropped = ~kept[:, 0]
    assert 0.05 < dropped.float().mean() < 0.5
    inside = torch.nn.functional.pad(dropped.float(), [size] * 4, value=1.0)
    # Every dropped position lies in some dropped square (what is outside the map counts as dropped).
    squares = -torch.nn.functional.max_pool2d(-inside[:, None], size, stride=1)
    covered = torch.nn.functional.max_pool2d(squares, size, stride=1)[:, 0]
    margin = (covered.shape[1] - 12) // 2
    assert (covered[:, margin : margin + 12, margin : margin + 11][dropped] == 1).all()


def test_mean_is_kept():
    out = DropBlock2d(0.2)(torch.ones(16, 1, 16, 16))
    assert out.mean() == pytest.approx(1, abs=1e-6)
    assert out.unique().numel() == 2


def test_identity_in_eval_and_at_zero():
    x = torch.randn(2, 3, 4, 4)
    assert DropBlock2d(0.5).eval()(x) is x
    assert DropBlock2d(0.0)(x) is x


def test_nothing_kept_is_zero_and_not_nan():
    assert torch.equal(DropBlock2d(1.0, 1)(torch.ones(2, 3, 2, 2)), torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_memory_format_and_gradient(dtype):
    x = (1 + torch.rand(2, 3, 8, 8, dtype=dtype)).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = DropBlock2d(0.3)(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    assert (out == 0).any()


def test_no_state_copies_and_pickles():
    block = DropBlock2d(0.25, 3)
    assert not block.state_dict()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert (other.drop_prob, other.block_size) == (0.25, 3)
    assert repr(block) == "DropBlock2d(drop_prob=0.25, block_size=3)"


def test_epochs_reach_every_drop_block():
    model = torch.nn.Sequential(Transition(16, 8, drop_block=True), torch.nn.Sequential(DropBlock2d()))
    assert set_drop_block_epoch(model, 5) == pytest.approx(0.05)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropBlock2d)] == [pytest.approx(0.05)] * 2


def test_a_new_probability_each_epoch_keeps_the_graph_whole():
    model = Transition(16, 8, drop_block=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for epoch in range(12):
        set_drop_block_epoch(model, epoch)
        assert compiled(torch.randn(2, 16, 6, 6)).isfinite().all()


@pytest.mark.parametrize("arguments", [(-0.1,), (1.1,), (0.1, 0)])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="DropBlock2d: drop_prob"):
        DropBlock2d(*arguments)


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
        DropBlock2d(0.1)(torch.ones(3, 4, 4))
