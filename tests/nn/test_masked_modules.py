"""`MaskedConv2d` and `MaskedLinear`: torch's layers until channels are selected, then those on kept channels alone."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from exactness import doubled, inexact
from torch import nn

from pyext.nn import MaskedConv2d, MaskedLinear

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided, without bias": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "bias": False},
    "grouped": {"kernel_size": 3, "groups": 3, "dilation": 2, "padding": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_torchs_until_channels_are_selected(name):
    plain = nn.Conv2d(12, 9, **CONVOLUTIONS[name]).double()
    layer = MaskedConv2d(12, 9, **CONVOLUTIONS[name]).double()
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, 9, 10, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))
    kept_in, kept_out = [0, 3, 4, 7, 11], [1, 2, 8]
    layer.select(kept_in, kept_out)
    whole = torch.zeros_like(x)
    whole[:, kept_in] = x[:, kept_in]
    expected = plain(whole)[:, kept_out]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(layer(x[:, kept_in]), expected)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert torch.equal(layer.select()(x), plain(x))


def test_shares_parameters_and_trains_the_kept_part_alone():
    plain = nn.Conv2d(6, 8, 3, padding=1).double().eval()
    layer = MaskedConv2d.of(plain, activation="relu").select([0, 5], [2, 3, 4])
    assert layer.weight is plain.weight
    assert not layer.training
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    layer(x).sum().backward()
    small = F.relu(F.conv2d(x, plain.weight[2:5][:, [0, 5]], plain.bias[2:5], padding=1))
    (expected,) = torch.autograd.grad(small.sum(), plain.weight)
    close(plain.weight.grad, expected)
    assert not plain.weight.grad[:2].any()


def test_packed_weights_follow_the_layers():
    plain = nn.Conv2d(6, 8, 3).double()
    layer = MaskedConv2d.of(plain).select([1, 2], [0, 7])
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        plain.weight.mul_(2)
        close(layer(x) - plain.bias[[0, 7], None, None], 2 * (before - plain.bias[[0, 7], None, None]))
        layer.select([1, 3], [0, 7])
        close(layer(x), F.conv2d(x, plain.weight[[0, 7]][:, [1, 3]], plain.bias[[0, 7]]))
        other = copy.deepcopy(layer)
        other.weight.zero_()
        close(other(x), plain.bias[[0, 7], None, None].expand(1, 2, 3, 3))
        plain.weight = nn.Parameter(plain.weight * 3)
        layer.weight = plain.weight
        close(layer(x), F.conv2d(x, plain.weight[[0, 7]][:, [1, 3]], plain.bias[[0, 7]]))


def test_images_may_each_have_a_sub_network():
    layer = MaskedConv2d(6, 8, 3, padding=1).double().select([[0, 1, 2], [5]], [[4], [0, 1]])
    x, ids = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.tensor([1, 0, 0, 1])
    out = layer(x, ids)
    assert out.shape == (4, 2, 5, 5)
    for n, s in enumerate(ids.tolist()):
        inputs, outputs = ([0, 1, 2], [4]) if s == 0 else ([5], [0, 1])
        expected = F.conv2d(
            x[n : n + 1, : len(inputs)], layer.weight[outputs][:, inputs], layer.bias[outputs], padding=1
        )
        close(out[n : n + 1, : len(outputs)], expected)
    assert layer.select(outputs=[[0, 1], [2, 3]]).kept_inputs.shape == (2, 6)


def test_linear():
    plain = nn.Linear(7, 5).double()
    layer = MaskedLinear.of(plain, activation="relu")
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x).relu())
    layer.select([0, 2, 6], [1, 4])
    close(
        layer(x[..., [0, 2, 6]]),
        F.relu(F.linear(x[..., [0, 2, 6]], plain.weight[[1, 4]][:, [0, 2, 6]], plain.bias[[1, 4]])),
    )
    layer.select(inputs=[[0, 2], [1, 3]])
    ids = torch.tensor([[0, 1, 1], [1, 0, 0]])
    out = layer(x[..., :2], ids)
    for i in range(2):
        for j in range(3):
            kept = [[0, 2], [1, 3]][ids[i, j]]
            close(out[i, j], F.relu(F.linear(x[i, j, :2], plain.weight[:, kept], plain.bias)))


@pytest.mark.parametrize("layer", [MaskedConv2d(4, 6, 3, padding=1), MaskedLinear(4, 6)])
def test_autocast_computes_in_its_dtype(layer):
    layer.select([0, 2], [1, 2])
    if isinstance(layer, MaskedConv2d):
        x, plain = torch.randn(3, 2, 5, 5), functools.partial(F.conv2d, padding=1)
    else:
        x, plain = torch.randn(3, 2), F.linear
    kept = x, layer.weight[[1, 2]][:, [0, 2]], layer.bias[[1, 2]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, expected = layer(x), plain(*kept)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert not inexact({"out": out}, [([expected], [plain(*doubled(kept))])], {})


@pytest.mark.parametrize("kept", [[2, 1], [0, 4], [], [[0], []], torch.tensor([0.0]), torch.tensor([[0, -1], [-1, 0]])])
def test_wrong_lists_are_named(kept):
    with pytest.raises(ValueError, match="select: inputs, expected ascending channels from 0 to 3"):
        MaskedConv2d(4, 6, 3).select(kept)


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="lists of as many sub-networks"):
        MaskedLinear(4, 6).select([[0], [1]], [0])
    with pytest.raises(ValueError, match="padding_mode is 'circular'"):
        MaskedConv2d(4, 6, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        MaskedLinear(4, 6, activation="gelu")
    with pytest.raises(ValueError, match="x has 3 channels, expected 2"):
        MaskedConv2d(4, 6, 3).select([0, 1])(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="subnets is None"):
        MaskedConv2d(4, 6, 3).select([[0], [1]])(torch.randn(1, 1, 4, 4))
