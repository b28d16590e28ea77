"""Modules: parameters, state-dict names and torch's conventions around the operators of `pyext.ops`."""

from pyext.nn.bn_relu_conv2d import BNReLUConv2d, BNReLUConvSequential
from pyext.nn.densenet import DenseBlock, DenseLayer
from pyext.nn.distillation import EnsembleDistillation, MutualDistillation
from pyext.nn.drop_block import DropBlock2d, drop_block_probability, set_drop_block_epoch
from pyext.nn.hcgnet import SMG, GatedExcitation, HybridBlock, Transition
from pyext.nn.lean import set_memory
from pyext.nn.masked import MaskedConv2d, MaskedLinear
from pyext.nn.memory_contrast import MemoryContrast
from pyext.nn.peer_contrast import PeerContrast

__all__ = [
    "SMG",
    "BNReLUConv2d",
    "BNReLUConvSequential",
    "DenseBlock",
    "DenseLayer",
    "DropBlock2d",
    "EnsembleDistillation",
    "GatedExcitation",
    "HybridBlock",
    "MaskedConv2d",
    "MaskedLinear",
    "MemoryContrast",
    "MutualDistillation",
    "PeerContrast",
    "Transition",
    "drop_block_probability",
    "set_drop_block_epoch",
    "set_memory",
]
