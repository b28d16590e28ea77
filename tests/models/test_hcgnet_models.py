"""The networks: sizes, names, shapes, DropBlock, errors."""

import pytest
import torch

from pyext import models
from pyext import nn as pyext_nn

PARAMETERS = {"a1": 1_102_651, "a2": 3_133_679, "a3": 11_363_647, "b": 12_845_501, "c": 42_153_208}


def tiny(**changes):
    return models.HCGNet(**{"growth_rates": (8, 12), "num_layers": (2, 1), "num_classes": 5, **changes})


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    with torch.device("meta"):
        network = getattr(models, f"hcgnet_{name}")()
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "classes"), [("a1", 100), ("a2", 100), ("a3", 100), ("b", 1000), ("c", 1000)])
def test_classes(name, classes):
    with torch.device("meta"):
        build = getattr(models, f"hcgnet_{name}")
        assert build().classifier.out_features == classes
        assert build(num_classes=7).classifier.out_features == 7


@pytest.mark.parametrize(("stem", "size"), [("cifar", (9, 6)), ("imagenet", (33, 40))])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n", [0, 3])
def test_any_size_of_image_and_batch(stem, size, training, n):
    network = tiny(stem=stem).train(training)
    out = network(torch.randn(n, 3, *size))
    assert out.shape == (n, 5)
    assert out.isfinite().all()
    out.sum().backward()


def test_memory_format_of_the_images_changes_nothing():
    network = tiny().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), network(x), rtol=1e-12, atol=1e-12)


def test_drop_block_is_in_the_cifar_networks_and_adds_no_keys():
    kinds = {stem: [type(m) for m in tiny(stem=stem).modules()] for stem in ("cifar", "imagenet")}
    assert pyext_nn.DropBlock2d in kinds["cifar"]
    assert pyext_nn.DropBlock2d not in kinds["imagenet"]
    assert list(tiny(drop_block=False).state_dict()) == list(tiny(drop_block=True).state_dict())


def test_drop_block_follows_the_epoch_in_training_only():
    network = tiny()
    x = torch.randn(4, 3, 16, 16)
    assert pyext_nn.set_drop_block_epoch(network, 9) == pytest.approx(0.0975528)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))


def test_nan_in_one_image_stays_in_that_image():
    network = tiny().eval()
    x = torch.randn(3, 3, 8, 8)
    x[1, 0, 2, 2] = torch.nan
    bad = network(x).isnan().any(dim=1)
    assert bad.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": (2,)}, "2 growth rates for 1 hybrid blocks"),
        ({"growth_rates": (), "num_layers": ()}, "0 growth rates for 0 hybrid blocks"),
        ({"stem": "mnist"}, "unknown stem 'mnist', expected one of cifar, imagenet"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        tiny()(torch.randn(shape))
