"""Networks of the papers, and the backbones that they are shown on."""

from pyext.models.backbone import Backbone
from pyext.models.densenet import DenseNet, densenet40_12
from pyext.models.hcgnet import HCGNet, hcgnet_a1, hcgnet_a2, hcgnet_a3, hcgnet_b, hcgnet_c
from pyext.models.resnet import CIFARResNet, resnet32, resnet110
from pyext.models.vgg import VGG, vgg16

__all__ = [
    "VGG",
    "Backbone",
    "CIFARResNet",
    "DenseNet",
    "HCGNet",
    "densenet40_12",
    "hcgnet_a1",
    "hcgnet_a2",
    "hcgnet_a3",
    "hcgnet_b",
    "hcgnet_c",
    "resnet32",
    "resnet110",
    "vgg16",
]
