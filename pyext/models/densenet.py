"""DenseNet (arXiv 1608.06993) for images of 32x32 in its plain form: no bottlenecks, no compression."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pyext.models.backbone import Backbone
from pyext.nn.bn_relu_conv2d import BNReLUConvSequential
from pyext.nn.densenet import DenseBlock


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
        self.features = BNReLUConvSequential(OrderedDict(conv0=nn.Conv2d(3, channels, 3, padding=1, bias=False)))
        for stage in (1, 2, 3):
            layers = (depth - 4) // 3
            self.features.add_module(f"denseblock{stage}", DenseBlock(layers, channels, growth_rate, bn_size=0))
            channels += layers * growth_rate
            if stage < 3:
                self.features.add_module(f"transition{stage}", _transition(channels))
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features.add_module("relu5", nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


def _transition(channels: int) -> BNReLUConvSequential:
    convolution = nn.Conv2d(channels, channels, 1, bias=False)
    return BNReLUConvSequential(
        OrderedDict(norm=nn.BatchNorm2d(channels), relu=nn.ReLU(), conv=convolution, pool=nn.AvgPool2d(2))
    )


def densenet40_12(num_classes: int = 100) -> DenseNet:
    """DenseNet-40 with growth rate 12 for images of 32x32: 1.0 M parameters at 10 classes."""
    return DenseNet(40, 12, num_classes)
