"""Residual networks for images of 32x32 (arXiv 1512.03385, section 4.2), shortcuts without parameters (option A)."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from pyext.models.backbone import Backbone


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN and a shortcut that subsamples and pads with zero channels where shapes change."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.added:
            before = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(out + x)


class CIFARResNet(Backbone):
    """6n + 2 layers: a 3x3 convolution, three stages of n basic blocks with 16, 32, 64 channels, linear classifier.

    Names within `features` are torchvision's: conv1, bn1, layer1.0.conv1, ... The weights start as in the paper (He's
    normal initialisation by fan-out).

    Args:
        depth: 6n + 2, such as 20, 32, 44, 56, 110.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: another depth.
    """

    first_stage = "layer1"

    def __init__(self, depth: int, num_classes: int = 100) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CIFARResNet: depth is {depth}, expected 6n + 2 such as 20, 32 or 110")
        stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.features = nn.Sequential(OrderedDict(conv1=stem, bn1=nn.BatchNorm2d(16), relu=nn.ReLU()))
        in_channels = 16
        for stage, channels in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(in_channels, channels, stride=2 if i == 0 and stage > 1 else 1))
                in_channels = channels
            self.features.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.classifier = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet32(num_classes: int = 100) -> CIFARResNet:
    """ResNet-32 for images of 32x32: 0.46 M parameters at 10 classes."""
    return CIFARResNet(32, num_classes)


def resnet110(num_classes: int = 100) -> CIFARResNet:
    """ResNet-110 for images of 32x32: 1.7 M parameters at 10 classes."""
    return CIFARResNet(110, num_classes)
