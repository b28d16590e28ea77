"""The networks of HCGNet (arXiv 1908.09699, section 4): A1 to A3 for CIFAR, B and C for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyext.models.backbone import Backbone
from pyext.nn import HybridBlock, Transition
from pyext.nn.memory_format import to_convolution_format
from pyext.nn.stem_inference import StemSequential

fx.wrap("to_convolution_format")  # one node of a trace: torch.fx cannot look into a comparison of devices


class HCGNet(Backbone):
    """Stem, hybrid blocks with transitions between them, BN, ReLU, global average pool, linear classifier.

    Args:
        growth_rates: growth rate of each hybrid block.
        num_layers: number of SMG modules of each hybrid block.
        num_classes: outputs of the classifier.
        stem: ``"cifar"``: one 3x3 convolution to twice the first growth rate, and DropBlock after each transition
            (probability 0 until `pyext.nn.set_drop_block_epoch`); ``"imagenet"``: three 3x3 convolutions and a
            max-pool, a quarter of the resolution.
        in_channels: channels of the images.
        bn_size: squeeze width over growth rate.
        theta: a transition keeps ``int(theta * channels)`` channels.
        drop_block: whether the transitions end with DropBlock; by default as the stem says.

    Shape: (N, in_channels, H, W) to (N, num_classes). State-dict names and order are those of the published
    checkpoints. The published ImageNet networks define a dropout that they do not apply; it has no counterpart here.

    Raises:
        ValueError: `growth_rates` and `num_layers` of different lengths or empty, an unknown `stem`, images of another
            shape.
    """

    def __init__(
        self,
        growth_rates: Sequence[int],
        num_layers: Sequence[int],
        num_classes: int,
        stem: str = "cifar",
        in_channels: int = 3,
        bn_size: float = 4,
        theta: float = 0.5,
        drop_block: bool | None = None,
    ) -> None:
        super().__init__()
        if len(growth_rates) != len(num_layers) or not growth_rates:
            raise ValueError(
                f"HCGNet: {len(growth_rates)} growth rates for {len(num_layers)} hybrid blocks, expected as many, "
                "at least one"
            )
        if stem not in _STEMS:
            raise ValueError(f"HCGNet: unknown stem {stem!r}, expected one of {', '.join(_STEMS)}")
        add_stem, block_name, transition_name, by_default = _STEMS[stem]
        self.in_channels = in_channels
        self.first_stage = f"{block_name}1"
        self.features = StemSequential()
        channels = add_stem(self.features, in_channels, growth_rates[0])
        for i, (growth, layers) in enumerate(zip(growth_rates, num_layers, strict=True), 1):
            self.features.add_module(f"{block_name}{i}", HybridBlock(layers, channels, bn_size, growth))
            channels += growth * layers
            if i < len(growth_rates):
                transition = Transition(
                    channels, int(channels * theta), drop_block=by_default if drop_block is None else drop_block
                )
                self.features.add_module(f"{transition_name}{i}", transition)
                channels = transition.out_channels
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def prepare(self, x: Tensor) -> Tensor:
        x = super().prepare(x)
        # Without gradients stem and blocks run whole, and they do in NCHW.
        return to_convolution_format(x) if torch.is_grad_enabled() else x

    def pool(self, maps: Tensor) -> Tensor:
        return super().pool(F.relu(maps, inplace=True))


def _add_cifar_stem(features: nn.Sequential, in_channels: int, growth_rate: int) -> int:
    features.add_module("conv0", nn.Conv2d(in_channels, 2 * growth_rate, 3, padding=1, bias=False))
    return 2 * growth_rate


def _add_imagenet_stem(features: nn.Sequential, in_channels: int, _: int) -> int:
    for i, (channels, stride) in enumerate(((32, 2), (32, 1), (64, 1))):
        features.add_module(f"conv{i}", nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False))
        features.add_module(f"norm{i}", nn.BatchNorm2d(channels))
        features.add_module(f"relu{i}", nn.ReLU(inplace=True))
        in_channels = channels
    features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
    return in_channels


_STEMS = {
    "cifar": (_add_cifar_stem, "HybridBlock", "Transition", True),
    "imagenet": (_add_imagenet_stem, "hybridblock", "transition", False),
}


def hcgnet_a1(num_classes: int = 100) -> HCGNet:
    """HCGNet-A1 for images of 32x32: 1.1 M parameters, 0.16 G multiply-adds."""
    return HCGNet((12, 24, 36), (8, 8, 8), num_classes)


def hcgnet_a2(num_classes: int = 100) -> HCGNet:
    """HCGNet-A2 for images of 32x32: 3.1 M parameters, 0.50 G multiply-adds."""
    return HCGNet((24, 36, 64), (8, 8, 8), num_classes)


def hcgnet_a3(num_classes: int = 100) -> HCGNet:
    """HCGNet-A3 for images of 32x32: 11.4 M parameters, 1.99 G multiply-adds."""
    return HCGNet((36, 48, 80), (12, 12, 12), num_classes)


def hcgnet_b(num_classes: int = 1000) -> HCGNet:
    """HCGNet-B for images of 224x224: 12.8 M parameters, 2.0 G multiply-adds."""
    return HCGNet((32, 48, 64, 96), (3, 6, 12, 8), num_classes, stem="imagenet")


def hcgnet_c(num_classes: int = 1000) -> HCGNet:
    """HCGNet-C for images of 224x224: 42.2 M parameters, 7.0 G multiply-adds."""
    return HCGNet((48, 56, 72, 112), (6, 12, 18, 14), num_classes, stem="imagenet")
