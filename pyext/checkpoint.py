"""Checkpoints: atomic saving, safe loading of our own and published files, errors that say what is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "model_state", "weights", "params")
"""Keys under which training programs keep the weights, in the order in which they are looked for."""

PREFIXES = ("module.", "_orig_mod.")
"""What nn.DataParallel, DistributedDataParallel and torch.compile put before every name."""

_SAFETENSORS = ".safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model; the message names the file and what was found."""


def atomic_save(path: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> None:
    """Write `checkpoint` to `path` so that a crash leaves either the old file or the new one, never a part.

    The data goes to a temporary file in the same folder, to the disk, and only then to its name.

    Args:
        path: the file; its folder must exist.
        checkpoint: what ``torch.load(weights_only=True)`` can read: tensors, numbers, strings, lists, dictionaries.
            For a `path` that ends with ``.safetensors``, a state dict: names to tensors.

    Raises:
        OSError: the folder is missing, the disk is full or refuses.
        CheckpointError: safetensors is asked for and not installed.
        TypeError: something other than tensors for ``.safetensors``.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save {path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write(checkpoint, temporary, path.suffix == _SAFETENSORS)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _write(checkpoint: Mapping[str, Any], path: Path, as_safetensors: bool) -> None:
    if not as_safetensors:
        # By handle: given a name, torch writes it into the file, and equal checkpoints would differ.
        with path.open("wb") as file:
            torch.save(checkpoint, file)
        return
    others = [name for name, value in checkpoint.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(f"safetensors files hold tensors only, not {', '.join(map(str, others[:5]))}")
    # safetensors refuses views and tensors that share memory.
    _safetensors(path).save_file({k: v.detach().contiguous().clone() for k, v in checkpoint.items()}, path)


def _sync(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and commits renames by itself.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors(path: Path) -> Any:
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(f"{path} is a safetensors file and safetensors is not installed: pip install safetensors")
    import safetensors.torch

    return safetensors.torch


def load_checkpoint(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> Any:
    """What the checkpoint `path` holds. No code in the file is run (``weights_only=True``).

    Raises:
        CheckpointError: the file is missing, empty, truncated, or not a checkpoint, or holds objects other than
            tensors, numbers (NumPy's included), strings and containers of these.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: its writing was interrupted")
    if path.suffix == _SAFETENSORS:
        with _explained(path):
            return _safetensors(path).load_file(path, device=str(map_location))
    with _explained(path), torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(path, map_location=map_location, weights_only=True)


def _numpy_scalars() -> list[Any]:
    """What unpickling a NumPy number needs: published training programs store accuracies so."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype, *dtypes]


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects besides tensors, and loading them would run its code. Save the state "
                f"dict alone where the file was made. ({_first_line(error)})"
            ) from error
        raise CheckpointError(f"{path} is not a torch checkpoint ({_first_line(error)})") from error
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        state = "truncated or damaged" if _looks_like_checkpoint(path) else "not a torch checkpoint"
        raise CheckpointError(f"{path} is {state} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _looks_like_checkpoint(path: Path) -> bool:
    if path.suffix == _SAFETENSORS or zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")


def state_dict(checkpoint: Any, origin: str = "the checkpoint") -> dict[str, Tensor]:
    """The weights in `checkpoint`: out of their wrapper (`WRAPPERS`), names without wrappers' prefixes (`PREFIXES`).

    Raises:
        CheckpointError: no state dict is found; the message starts with `origin` and lists the keys that there are.
    """
    found = next((d for d in _candidates(checkpoint) if _is_state_dict(d)), None)
    if found is None:
        what = f"keys {', '.join(map(repr, list(checkpoint)[:8]))}" if isinstance(checkpoint, Mapping) else None
        raise CheckpointError(f"{origin} holds no state dict (found {what or type(checkpoint).__name__})")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return dict(found)


def _candidates(checkpoint: Any) -> Iterator[Any]:
    yield checkpoint
    if isinstance(checkpoint, Mapping):
        for name in WRAPPERS:
            if name in checkpoint:
                yield from _candidates(checkpoint[name])


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the weights of the checkpoint `path`, ours, published or safetensors, into `model`, and return `model`.

    Either everything fits, or `model` stays as it was.

    Raises:
        CheckpointError: as `load_checkpoint` and `state_dict`; or names or shapes that differ from the model's, listed.
    """
    weights = state_dict(load_checkpoint(path), str(path))
    expected = model.state_dict()
    problems = [
        *_listed("missing", [name for name in expected if name not in weights]),
        *_listed("unknown", [name for name in weights if name not in expected]),
        *_listed(
            "of another shape",
            [
                f"{name} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
                for name, tensor in weights.items()
                if name in expected and tensor.shape != expected[name].shape
            ],
        ),
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(weights)
    return model


def _listed(what: str, names: list[str], at_most: int = 3) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return [f"{len(names)} {what}: {', '.join(names[:at_most])}{more}"]
