"""DenseNets: torchvision's by `accelerate`, and DenseNet-40-12 for CIFAR, in training and at inference.

DenseNet-121's least operations at inference, on 64x64 images, a million multiply-adds an image: 232 as its layers say;
157 as pyext computes it, 95 in the 1x1 convolutions of its blocks, 45 in the 3x3 ones by F(2x2, 3x3) (101 plainly), 6
in transitions that average first (25), 11 in stem and classifier.

Where the 22.3 GFLOP of a training step of DenseNet-121 at 64x64, batch 16, are (three times the forward pass's), and
the MiB that its blocks must keep for the backward pass: the buffer, and 128 channels a layer between its convolutions
(with memory "lean" the buffer alone). Plain torch keeps about 2 C + 256 channels of a layer that reads C. All three
products of the 3x3 convolutions are taken by F(2x2, 3x3) where maps are larger than 2x2: 4.2 of their 9.5 GFLOP remain.

    block (maps)    1x1 GFLOP  3x3 GFLOP  buffer MiB  between MiB
    1 (16x16)            2.72       5.44         4.0         12.0
    2 (8x8)              2.87       2.72         2.0          6.0
    3 (4x4)              2.94       1.36         1.0          3.0
    4 (2x2)              0.59       0.23        0.25          0.5
    stem, transitions    3.34

Transitions have 2.42 of the last line, and 0.60 as pyext trains them, pools first, one matrix product of maps with
images innermost.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict

import torch
from torch import Tensor, nn

from bench.case import Case
from bench.networks import Network, Setup, case_of
from pyext import models


class PlainDenseNet40(nn.Module):
    """DenseNet-40-12 as the paper's programs write it, with the names of `pyext.models.DenseNet`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        model = models.densenet40_12(classes)
        self.features, self.classifier = model.features, model.classifier
        for name, stage in list(self.features.named_children()):
            if "transition" in name:
                self.features.add_module(name, nn.Sequential(OrderedDict(stage.named_children())))

    def forward(self, x: Tensor) -> Tensor:
        for name, stage in self.features.named_children():
            x = self._block(stage, x) if "block" in name else stage(x)
        return self.classifier(x.mean((2, 3)))

    @staticmethod
    def _block(block: nn.Module, x: Tensor) -> Tensor:
        for layer in block.children():
            x = torch.cat([x, layer.conv1(torch.relu(layer.norm1(x)))], 1)
        return x


def _torchvision(classes: int) -> nn.Module:
    import torchvision

    return torchvision.models.densenet121(weights=None, num_classes=classes)


def _networks() -> dict[str, Network]:
    own = functools.partial(models.densenet40_12, 100)
    found = {"40-12": Network("densenet 40-12", 100, 32, functools.partial(PlainDenseNet40, 100), own, ("pyext",))}
    if importlib.util.find_spec("torchvision"):
        program = functools.partial(_torchvision, 1000)
        found["121"] = Network(
            "densenet 121, 64x64,", 1000, 64, program, None, ("accelerate", "accelerate channels_last")
        )
    return found


def cases(device: torch.device) -> list[Case]:
    """Training, then inference."""
    networks = _networks()
    found = [case_of(Setup(networks["40-12"], 64, True, device), memory=True)]
    found += [case_of(Setup(networks["40-12"], batch, False, device), "engines") for batch in (1, 64)]
    if "121" in networks:
        found.append(case_of(Setup(networks["121"], 16, True, device), "compile", 60, memory=True))
        found.append(case_of(Setup(networks["121"], 16, False, device), "compile engines", 60))
    return found


def test_densenet(speed, case, contender):
    speed(case, contender)
