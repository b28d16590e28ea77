"""The operators: each file holds one operator's contract (reference, shapes, gradient, choice of backend)."""

from pyext.ops.bn_relu_conv2d import bn_relu_conv2d
from pyext.ops.convolution_stem import convolution_stem
from pyext.ops.dense_block import dense_block, pack_dense_block
from pyext.ops.gated_excitation import gated_excitation
from pyext.ops.hybrid_block import hybrid_block, pack_hybrid_block
from pyext.ops.masked_conv2d import masked_conv2d, masked_linear, pack_masked_conv2d
from pyext.ops.memory_contrast import memory_contrast
from pyext.ops.memory_update import memory_update
from pyext.ops.peer_contrast import PeerContrastTerms, peer_contrast
from pyext.ops.sample_negatives import sample_negatives

__all__ = [
    "PeerContrastTerms",
    "bn_relu_conv2d",
    "convolution_stem",
    "dense_block",
    "gated_excitation",
    "hybrid_block",
    "masked_conv2d",
    "masked_linear",
    "memory_contrast",
    "memory_update",
    "pack_dense_block",
    "pack_hybrid_block",
    "pack_masked_conv2d",
    "peer_contrast",
    "sample_negatives",
]
