"""Progress on a terminal (a live bar, by rich) and elsewhere (a line every few seconds), and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

import torch

from pyext.train.errors import require


def clock(seconds: float) -> str:
    """`seconds` as H:MM:SS."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Reports the steps of a run: place, loss, images (or what `unit` says) per second and remaining time.

    `total` steps make the run, `done` of them before this process began. `show` is False on all ranks but one.
    """

    def __init__(
        self, total: int, done: int, batch_size: int, show: bool = True, interval: float = 10.0, *, unit: str = "images"
    ):
        self.total, self.done, self.batch_size, self.interval = total, done, batch_size, interval
        self.show, self.unit = show, unit
        self.moments: deque[float] = deque(maxlen=200)
        self.last_line = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if self.show and sys.stdout.isatty():
            rich = require("rich.progress", "the progress bar")
            columns = [rich.BarColumn(), rich.TaskProgressColumn(), rich.TextColumn("{task.description}")]
            self.bar = rich.Progress(*columns)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.total, completed=self.done)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, place: str, loss: float | None) -> None:
        """One more step is done; `loss` is None where it was not read back from the device."""
        self.done += 1
        now = time.monotonic()
        self.moments.append(now)
        if not self.show or len(self.moments) < 2:
            return
        rate = (len(self.moments) - 1) / max(now - self.moments[0], 1e-9)
        shown = "" if loss is None else f" loss {loss:.4f},"
        speed = f"{rate * self.batch_size:.0f} {self.unit}/s, {clock((self.total - self.done) / rate)} remaining"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=f"{place},{shown} {speed}")
        elif now - self.last_line >= self.interval and loss is not None:
            self.last_line = now
            self.line(f"{place},{shown} {speed}")

    def line(self, text: str) -> None:
        """Print `text` on a line of its own, above the bar where there is one."""
        if not self.show:
            return
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)


class PeakMemory:
    """The most memory in use since this object was made, above what was in use then, in bytes.

    On a CUDA device its allocator's count; on the CPU the process's resident set. Linux lets a process reset its peak;
    elsewhere the peak of the whole process counts, which can only be too high.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pass
        self.start = _resident("VmRSS")

    def read(self) -> int:
        """Bytes so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return max(0, _resident("VmHWM") - self.start)


def _resident(field: str) -> int:
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
