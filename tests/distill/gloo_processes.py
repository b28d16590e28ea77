"""Checks that run in several gloo processes of this machine."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(check: Callable[..., None], processes: int, folder: Path, *arguments: Any) -> None:
    """`check(rank, processes, *arguments)` in each of them; raises what the first of them to fail raised."""
    mp.spawn(_process, (processes, str(folder / "store"), check, arguments), nprocs=processes)


def _process(rank: int, processes: int, store: str, check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=datetime.timedelta(seconds=120)
    )
    check(rank, processes, *arguments)
    dist.barrier()
    # Not through Python's own end: the group's threads outlive destroy_process_group where DistributedDataParallel
    # has held it, and one that lets go of a tensor while Python ends aborts the process (torch 2.11).
    os._exit(0)
