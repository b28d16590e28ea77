"""The error that a user can act on, and the optional packages that training needs."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something outside the program is wrong: the message is one sentence that says what, where and what to do.

    `pyext.cli` prints it without a traceback. `usage` tells a wrong command (exit status 2) from a failed run (1).
    """

    def __init__(self, message: str, usage: bool = False):
        super().__init__(" ".join(message.split()))
        self.usage = usage


def require(module: str, purpose: str) -> ModuleType:
    """Import the optional package `module`, or say in one sentence that `purpose` needs it and how to get it.

    A package that is installed but does not load (torchvision beside another torch raises RuntimeError) is told apart
    from one that is missing, because installing it again would not help.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise UserError(f"{purpose} needs {module}, which is installed but lacks {error.name}.") from error
        raise UserError(
            f"{purpose} needs {module.split('.')[0]}: install it with `pip install pyext-kernels[train]`."
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"{purpose} needs {module}, which is installed but does not load beside this torch ({error}): install the "
            "release that belongs to it with `pip install pyext-kernels[train]`."
        ) from error
