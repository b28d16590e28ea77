"""Small networks of every coupling, with statistics that a trained network could have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from published_hcgnet import CifarNet
from torch import fx, nn

import pyext
from pyext import models
from pyext.models.densenet import DenseNet
from pyext.models.hcgnet import HCGNet
from pyext.models.resnet import CIFARResNet
from pyext.subnet import Atlas, fingerprint, plan

CLASSES = 6


class Mixed(nn.Module):
    """Every kind of layer once: grouped, depthwise with a multiplier, gates, sums, concatenation, padding, flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=True)
        self.depthwise = nn.Conv2d(12, 24, 3, stride=2, padding=2, dilation=2, groups=12)
        self.squeeze = nn.Conv2d(24, 6, 1)
        self.excite = nn.Conv2d(6, 24, 1)
        self.attend = nn.Conv2d(24, 1, 1)
        self.side = nn.Conv2d(8, 5, 1, stride=2, bias=False)
        self.last = nn.Conv2d(29, 7, 3, padding="same")
        self.hidden = nn.Linear(7 * 16, 10)
        self.classifier = nn.Linear(10, CLASSES, bias=False)

    def forward(self, x):
        x = F.relu6(self.norm(self.stem(x)))
        y = torch.sigmoid(self.depthwise(F.hardswish(self.grouped(x))))
        y = y * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        y = y * torch.sigmoid(self.attend(y)) + y.sum((2, 3), keepdim=True)
        z = torch.cat([y, self.side(x)], dim=1)
        z = F.max_pool2d(F.relu(self.last(z)), 2)
        z = z + F.pad(z[:, :, :, :], (0, 0, 0, 0, 0, 0)) * 0.5
        return self.classifier(F.relu(self.hidden(z.view(z.size(0), -1))))


def _resnet(block, **settings):
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES, **settings)


NETWORKS = {
    "mixed": (Mixed, 16),
    "vgg16": (lambda: models.vgg16(CLASSES), 32),
    "resnet8": (lambda: CIFARResNet(8, CLASSES), 16),
    "densenet10": (lambda: DenseNet(10, 4, CLASSES), 16),
    "resnet basic": (lambda: _resnet(torchvision.models.resnet.BasicBlock), 32),
    "resnet bottleneck": (lambda: _resnet(torchvision.models.resnet.Bottleneck), 32),
    "resnext": (lambda: _resnet(torchvision.models.resnet.Bottleneck, groups=16, width_per_group=8), 32),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=0.25), 32),
    "hcgnet": (lambda: HCGNet((4, 8), (2, 2), CLASSES), 12),
    "hcgnet imagenet": (lambda: pyext.accelerate(HCGNet((8, 4), (1, 2), CLASSES, stem="imagenet")), 32),
    "hcgnet published": (lambda: pyext.accelerate(CifarNet((4, 4), (1, 2), CLASSES)), 12),
    "densenet121": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=CLASSES), 32),
}


def network(name, seed=0):
    """The network in float64 and eval mode, with drawn batch-norm statistics, and the shape of its images."""
    torch.manual_seed(seed)
    build, size = NETWORKS[name]
    model = build().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.3)
    return model, (3, size, size)


def drawn_atlas(model, shape, seed=0):
    """An atlas of `model` with drawn importances: the right names, widths and fingerprint."""
    generator, traced = torch.Generator().manual_seed(seed), plan(model, shape)
    widths = {layer: len(traced.groups_of(layer)) for layer in traced.gates}
    sums = {k: torch.randint(0, 2**37, (CLASSES, width), generator=generator) for k, width in widths.items()}
    return Atlas(sums, torch.ones(CLASSES, dtype=torch.int64), fingerprint(model), shape, {})


class Zeroed(fx.Interpreter):
    """The whole network, channels outside `groups` zeroed after every operation: what a sub-network is."""

    def __init__(self, traced, groups):
        super().__init__(traced.module)
        self.traced, self.groups = traced, groups

    def run_node(self, n):
        value = super().run_node(n)
        if n.name not in self.traced.channels:
            return value
        mask = torch.from_numpy(self.groups[self.traced.channels[n.name]]).to(value)
        return value * mask.view(1, -1, *[1] * (value.dim() - 2))
