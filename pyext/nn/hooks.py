"""Whether a module does more than its `forward` says."""

from __future__ import annotations

from typing import Any


def has_forward_hooks(module: Any) -> bool:
    """Whether calling `module` runs more than its `forward`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
