"""How much dense blocks keep of a forward pass for its backward pass."""

from __future__ import annotations

from torch import nn

MEMORY = ("fast", "lean")


class KeepsForBackward:
    """A block of which `memory` says what is kept for its backward pass."""

    memory = "fast"


def checked_memory(memory: str, who: str) -> str:
    """`memory`, or ValueError in the name of `who` where it is not one of `MEMORY`."""
    if memory not in MEMORY:
        raise ValueError(f"{who}: memory is {memory!r}, expected one of {', '.join(MEMORY)}")
    return memory


def set_memory(model: nn.Module, memory: str) -> nn.Module:
    """Choose what every HybridBlock and DenseBlock of `model` keeps where it trains as a whole; returns `model`.

    Args:
        model: any module tree, also one that `pyext.accelerate` returned.
        memory: ``"fast"``: the block's buffer and the maps inside its layers; ``"lean"``: the buffer alone, from which
            the backward pass computes the others again. Outputs and gradients are the same, bit for bit.

    Raises:
        ValueError: another word.
    """
    checked_memory(memory, "set_memory")
    for module in model.modules():
        if isinstance(module, KeepsForBackward):
            module.memory = memory
    return model
