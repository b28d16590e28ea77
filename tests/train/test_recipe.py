import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyext.nn import DropBlock2d
from pyext.train.networks import build
from pyext.train.randomness import Stream, generator, seed_all
from pyext.train.recipe import Recipe, mixup


def test_learning_rate_is_torchs_own_warm_restart_schedule_over_the_whole_recipe():
    recipe = Recipe()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2)
    for epoch in range(recipe.epochs):
        assert recipe.learning_rate_at(epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        schedule.step()
    restarts = [e for e in range(1, 1271) if recipe.learning_rate_at(e) == 0.1]
    assert restarts == [10, 30, 70, 150, 310, 630, 1270]


def test_repeat_at_starts_the_schedules_anew():
    recipe = Recipe(repeat_at=630)
    for epoch in (0, 3, 10, 629):
        assert recipe.learning_rate_at(630 + epoch) == Recipe().learning_rate_at(epoch)
    assert recipe.learning_rate_at(629) == Recipe().learning_rate_at(629)


@pytest.mark.parametrize(("epoch", "probability"), [(0, 0.0), (5, 0.05), (10, 0.0), (20, 0.05)])
def test_drop_block_probability_and_learning_rate_are_set_each_epoch(epoch, probability):
    network = build("tiny", 10)
    optimizer = Recipe().optimizer(network)
    rate = Recipe().start_epoch(epoch, network, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [rate]
    blocks = [m for m in network.modules() if isinstance(m, DropBlock2d)]
    assert blocks
    assert [m.drop_prob for m in blocks] == pytest.approx([probability] * len(blocks))


def test_drop_block_can_be_switched_off():
    network = build("tiny", 10)
    Recipe(drop_block=False).start_epoch(5, network, Recipe().optimizer(network))
    assert all(m.drop_prob == 0 for m in network.modules() if isinstance(m, DropBlock2d))


def test_imagenet_scales_the_learning_rate_with_the_batch():
    assert Recipe.for_imagenet(512).learning_rate == pytest.approx(0.2)


def test_optimizer_has_nesterov_momentum_unless_momentum_is_zero():
    network = torch.nn.Linear(2, 2)
    assert Recipe().optimizer(network).param_groups[0]["nesterov"]
    assert not Recipe(momentum=0).optimizer(network).param_groups[0]["nesterov"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_cross_entropy_with_blended_targets(smoothing):
    images, labels = torch.randn(7, 3, 4, 4, dtype=torch.float64), torch.arange(7) % 3
    mixed = mixup(images, labels, 1.0, 5, 1, 2, 0)
    others = (mixed.images - mixed.share * images) / (1 - mixed.share)
    distances = torch.cdist(others.flatten(1), images.flatten(1))
    order = distances.argmin(dim=1).tolist()
    assert distances.min(dim=1).values.max() < 1e-9
    assert sorted(order) == list(range(7))
    assert torch.equal(mixed.other_labels, labels[order])
    logits = torch.randn(7, 3)
    targets = mixed.share * F.one_hot(labels, 3) + (1 - mixed.share) * F.one_hot(labels[order], 3)
    expected = F.cross_entropy(logits, targets.float(), label_smoothing=smoothing)
    torch.testing.assert_close(mixed.loss(logits, smoothing), expected)


def test_mixup_depends_on_its_place_alone():
    images, labels = torch.randn(8, 3, 4, 4), torch.arange(8)
    first = mixup(images, labels, 1.0, 0, 3, 4, 0)
    torch.rand(5)
    again = mixup(images, labels, 1.0, 0, 3, 4, 0)
    assert torch.equal(first.images, again.images)
    others = [mixup(images, labels, 1.0, *place) for place in ((1, 3, 4, 0), (0, 4, 4, 0), (0, 3, 5, 0), (0, 3, 4, 1))]
    assert len({m.share for m in [first, *others]}) == 5


def test_mixup_zero_leaves_the_batch():
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    mixed = mixup(images, labels, 0, 0, 0, 0, 0)
    assert mixed.images is images
    logits = torch.randn(4, 4)
    assert torch.equal(mixed.loss(logits, 0.0), F.cross_entropy(logits, labels))


def test_seed_all_seeds_torch_numpy_and_python():
    import random

    def draw(*place):
        seed_all(0, Stream.STEP, *place)
        return torch.rand(1).item(), np.random.rand(), random.random()

    assert draw(1, 2) == draw(1, 2)
    assert all(a != b for a, b in zip(draw(1, 2), draw(2, 1), strict=True))
    assert generator(0, Stream.ORDER, 1).random() != generator(0, Stream.MIXUP, 1).random()
