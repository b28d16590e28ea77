"""DenseNet (arXiv 1608.06993) for images of 32x32 in its plain form: no bottlenecks, no compression."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyext.models.backbone import Backbone


class _DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(F.relu(self.norm1(x)))], dim=1)


class DenseNet(Backbone):
    """Three dense blocks with transitions (BN, ReLU, 1x1 convolution, 2x2 average pool) between them.

    Names within `features` are torchvision's: conv0, denseblock1.denselayer1.norm1, transition1.conv, norm5.

    Args:
        depth: 3n + 4, n layers in each block.
        growth_rate: channels that a layer adds.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: another depth.
    """

    first_stage = "denseblock1"

    def __init__(self, depth: int = 40, growth_rate: int = 12, num_classes: int = 100) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f"DenseNet: depth is {depth}, expected 3n + 4 such as 40 or 100")
        channels = 16
        self.features = nn.Sequential(OrderedDict(conv0=nn.Conv2d(3, channels, 3, padding=1, bias=False)))
        for stage in (1, 2, 3):
            block = nn.Sequential()
            for i in range((depth - 4) // 3):
                block.add_module(f"denselayer{i + 1}", _DenseLayer(channels, growth_rate))
                channels += growth_rate
            self.features.add_module(f"denseblock{stage}", block)
            if stage < 3:
                self.features.add_module(f"transition{stage}", _transition(channels))
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features.add_module("relu5", nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


def _transition(channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(
        OrderedDict(norm=nn.BatchNorm2d(channels), relu=nn.ReLU(), conv=convolution, pool=nn.AvgPool2d(2))
    )


def densenet40_12(num_classes: int = 100) -> DenseNet:
    """DenseNet-40 with growth rate 12 for images of 32x32: 1.0 M parameters at 10 classes."""
    return DenseNet(40, 12, num_classes)
