"""Peers of any backbone: what they share, that each is an ordinary network, and errors."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

from pyext import models
from pyext.distill import peers

NETWORKS = {
    "hcgnet": (partial(models.HCGNet, (8, 12), (1, 1), 5), "HybridBlock1"),
    "hcgnet_imagenet": (partial(models.HCGNet, (8, 12), (1, 1), 5, stem="imagenet"), "pool0"),
    "resnet": (partial(models.CIFARResNet, 8, 5), "layer1"),
    "densenet": (partial(models.DenseNet, 10, 4, 5), "denseblock1"),
    "vgg": (partial(models.VGG, 5), "block1"),
    "sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        ),
        "0",
    ),
}


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [True, False])
def test_each_peer_is_an_ordinary_network_with_the_same_outputs(name, share):
    make, stage = NETWORKS[name]
    group = peers(make, 3, stage if share else None).eval()
    with torch.no_grad():
        outputs = group(images())
        for i in range(3):
            network = group.deploy(i)
            assert type(network) is type(make())
            assert list(network.state_dict()) == list(make().state_dict())
            assert torch.equal(network(images()), outputs.logits[i])
            classifier = network[-1] if isinstance(network, nn.Sequential) else network.classifier
            assert torch.equal(classifier(outputs.features[i]), outputs.logits[i])
    assert group.num_features == outputs.features[0].shape[1]
    assert not torch.equal(outputs.logits[0], outputs.logits[1])


def test_sharing_may_end_within_a_stem():
    """Which each peer alone runs as one operator, and the group then module by module: equal but for rounding."""
    group = peers(NETWORKS["hcgnet_imagenet"][0], 3, "norm0").double().eval()
    with torch.no_grad():
        outputs = group(images().double())
        for i in range(3):
            torch.testing.assert_close(outputs.logits[i], group.deploy(i)(images().double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_peers_one_by_one(name):
    """Running statistics too: the shared stages run once, so they see the batch once."""
    make, stage = NETWORKS[name]
    group = peers(make, 2, stage).double().train()
    alone = copy.deepcopy(group)
    sum(x.square().sum() for x in group(images().double()).logits).backward()
    for i in range(2):
        alone.deploy(i)(images().double()).square().sum().backward()
    for (key, found), expected in zip(group.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=key)
    counts = [b for k, b in group.named_buffers() if k.endswith("num_batches_tracked")]
    assert all(count == 1 for count in counts)


def test_shared_stages_are_the_same_parameters_and_the_rest_are_not():
    make = partial(models.CIFARResNet, 8, 5)
    one, group = make(), peers(make, 4, "layer1")
    shared = sum(p.numel() for i in (0, 1, 3) for p in one.features[i].parameters())
    total = sum(p.numel() for p in one.parameters())
    assert sum(p.numel() for p in group.parameters()) == shared + 4 * (total - shared)
    assert sum(p.numel() for p in peers(make, 4).parameters()) == 4 * total
    group.deploy(2).features.conv1.weight.data.fill_(7)
    assert (group.deploy(0).features.conv1.weight == 7).all()


def test_copies_and_checkpoints_keep_the_sharing():
    make = partial(models.CIFARResNet, 8, 5)
    group = peers(make, 3, "layer1")
    other = copy.deepcopy(group)
    assert other.deploy(0).features.layer1 is other.deploy(2).features.layer1
    assert other.deploy(0).features.layer1 is not group.deploy(0).features.layer1
    file = io.BytesIO()
    torch.save(group.state_dict(), file)
    file.seek(0)
    fresh = peers(make, 3, "layer1")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for found, expected in zip(fresh.eval()(images()).logits, group.eval()(images()).logits, strict=True):
        assert torch.equal(found, expected)


def test_everything_but_the_classifier_can_be_shared():
    group = peers(partial(models.HCGNet, (4,), (1,), 5), 2, "norm5")
    outputs = group(images())
    assert torch.equal(*outputs.features)
    assert not torch.equal(*outputs.logits)
    sum(x.sum() for x in outputs.logits).backward()


def test_wrong_arguments():
    make = partial(models.CIFARResNet, 8, 5)
    with pytest.raises(ValueError, match="share_until is 'layer9', expected None or one of conv1, bn1, relu, layer1"):
        peers(make, 2, "layer9")
    with pytest.raises(ValueError, match="num_peers is 0"):
        peers(make, 0)
    with pytest.raises(ValueError, match=r"makes a Linear, expected a pyext\.models\.Backbone"):
        peers(lambda: nn.Linear(2, 2), 2)
    network = make()
    with pytest.raises(ValueError, match="the same network twice"):
        peers(lambda: network, 2)
    with pytest.raises(IndexError, match="there is no peer 2, expected 0 to 1"):
        peers(make, 2).deploy(2)
