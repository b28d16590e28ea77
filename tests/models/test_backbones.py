"""Every network as a backbone: published sizes, stages, pooled features."""

import pytest
import torch
from torch import nn

from pyext import models

# Parameters at 10 classes: 0.46 M, 1.7 M (arXiv 1512.03385, table 6), 1.0 M (arXiv 1608.06993, table 2), 14.7 M.
PARAMETERS = {"resnet32": 464_154, "resnet110": 1_727_962, "densenet40_12": 1_019_722, "vgg16": 14_728_266}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    with torch.device("meta"):
        network = getattr(models, name)(num_classes=10)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [*PARAMETERS, "hcgnet_a1"])
def test_pooled_features_are_what_the_classifier_sees(name):
    network = getattr(models, name)(num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = network.forward_features(x)
        assert pooled.shape == (2, network.num_features)
        assert torch.equal(network.classifier(pooled), network(x))
        first = dict(network.features.named_children())[network.first_stage]
        assert isinstance(first, nn.Module)
    with pytest.raises(ValueError, match=rf"{type(network).__name__}: input has shape \(2, 4, 8, 8\), expected"):
        network(torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("name", PARAMETERS)
def test_first_stage_keeps_the_resolution_and_the_next_halves_it(name):
    network = getattr(models, name)(num_classes=7).eval()
    sizes = []
    maps = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for stage, module in network.features.named_children():
            maps = module(maps)
            sizes.append(maps.shape[2])
            if len(sizes) > 1 and sizes[-2] > sizes[-1]:
                break
            reached = stage
    assert reached == network.first_stage
    assert sizes[-2:] == [32, 16]


@pytest.mark.parametrize(("make", "message"), [(models.CIFARResNet, "expected 6n"), (models.DenseNet, "expected 3n")])
def test_wrong_depth(make, message):
    with pytest.raises(ValueError, match=message):
        make(12)
