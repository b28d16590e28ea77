"""VGG-16 (arXiv 1409.1556, configuration D) for images of 32x32: batch norm, one linear classifier."""

from __future__ import annotations

from torch import nn

from pyext.models.backbone import Backbone

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each block; a max-pool stands after each."""


class VGG(Backbone):
    """Five blocks of 3x3 convolutions with BN and ReLU, a max-pool after each, global average pool, classifier.

    The average pool acts on images above 32x32 alone, which the five max-pools do not take to one position. Images need
    32 pixels at least on each side.
    """

    first_stage = "block1"

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.features = nn.Sequential()
        in_channels = 3
        for i, (channels, convolutions) in enumerate(_BLOCKS, 1):
            block: list[nn.Module] = []
            for _ in range(convolutions):
                block += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
            self.features.add_module(f"block{i}", nn.Sequential(*block))
            self.features.add_module(f"pool{i}", nn.MaxPool2d(2))
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)


def vgg16(num_classes: int = 100) -> VGG:
    """VGG-16 with batch norm for images of 32x32: 14.7 M parameters at 10 classes."""
    return VGG(num_classes)
