"""`pyext demo`: the same training with plain torch and with pyext's kernels, compared.

Each training is a `pyext train` process of its own, so that neither inherits the other's memory. Both start from the
same weights and see the same batches. "Plain torch" is the same network with the gates composed of torch operators
(backend ``reference``), in the memory format in which torch's own convolutions are faster.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyext.train.data import EpochBatches, checked, load_data, loader
from pyext.train.errors import UserError, require
from pyext.train.networks import build, kernels
from pyext.train.randomness import Stream, seed_all
from pyext.train.recipe import Recipe, mixup

IMAGE_SIZE, BATCH_SIZE, LEARNING_RATE = 16, 64, 0.02
"""A learning rate below the paper's, since ten epochs of 22 steps leave no time to recover from 0.1."""

_RUNS = {"plain torch": ("plain", ["--plain"]), "pyext": ("pyext", [])}


@dataclass(frozen=True)
class Run:
    """What one training left: the loss of every step, and its summary."""

    losses: list[float]
    summary: dict[str, Any]


def run(output: Path, epochs: int = 10) -> None:
    """Train both, print the comparison and write ``demo.png`` into `output`."""
    console = require("rich.console", "the demo").Console()
    require("matplotlib", "the demo")
    runs = {}
    for title, (folder, options) in _RUNS.items():
        console.rule(f"training with {title}")
        runs[title] = _train(output / folder, epochs, options)
    console.rule("the loss of every step, averaged over ten")
    console.print(chart([smooth(r.losses) for r in runs.values()], marks="ox"), highlight=False, markup=False)
    console.print("o plain torch   x pyext   * both", style="dim")
    plot = _plot(output / "demo.png", runs)
    steps = 10
    difference = float64_difference(steps)
    console.rule("summary")
    console.print(_table(runs))
    for line in _remarks(runs, steps, difference):
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    console.print(f"- plot: {plot}, logs and weights beside it", highlight=False, soft_wrap=True)


def _train(folder: Path, epochs: int, options: Sequence[str]) -> Run:
    """One training as a process of its own, its progress shown as it comes."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pyext", "train", "hcgnet", "--arch", "tiny", "--data", "digits"]
    command += ["--image-size", str(IMAGE_SIZE), "--batch-size", str(BATCH_SIZE), "--lr", str(LEARNING_RATE)]
    command += ["--epochs", str(epochs), "--log-every", "1", "--device", "cpu", "--output", str(folder), *options]
    status = subprocess.run(command).returncode
    if status:
        raise UserError(f"the training in {folder} ended with status {status}: its own message is above.")
    rows = (folder / "steps.csv").read_text().splitlines()[1:]
    return Run([float(row.split(",")[2]) for row in rows], json.loads((folder / "summary.json").read_text()))


def float64_difference(steps: int) -> float:
    """Largest difference between the losses of `steps` training steps in float64, with and without the kernels."""
    plain, own = (float64_losses(steps, plain) for plain in (True, False))
    return max(abs(a - b) for a, b in zip(plain, own, strict=True))


def float64_losses(steps: int, plain: bool) -> list[float]:
    """The losses of the first `steps` (at most an epoch) of the demo's training, in float64."""
    data = load_data("digits", None, IMAGE_SIZE)
    recipe = Recipe(batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    seed_all(0, Stream.WEIGHTS)
    network = build("tiny", len(data.classes)).double()
    optimizer = recipe.optimizer(network)
    batches = checked(loader(data.train, EpochBatches(len(data.train), BATCH_SIZE, 0), 0, pin_memory=False))
    losses = []
    with kernels(plain):
        for step, (images, labels) in zip(range(steps), batches, strict=False):
            images = data.preprocessing.normalise(images).double()
            mixed = mixup(images, labels, recipe.mixup, 0, 0, step, 0)
            loss = mixed.loss(network(mixed.images), 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def smooth(values: Sequence[float], width: int = 10) -> list[float]:
    """The mean of each value and up to `width` - 1 before it."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - width) : i + 1])]


def chart(curves: Sequence[Sequence[float]], marks: str, width: int = 70, height: int = 14) -> str:
    """The `curves` drawn with one mark each on a grid of characters, ``*`` where they meet; the axis is labelled."""
    low, high = min(map(min, curves)), max(map(max, curves))
    grid = [[" "] * width for _ in range(height)]
    for curve, mark in zip(curves, marks, strict=True):
        for column in range(width):
            value = curve[column * (len(curve) - 1) // (width - 1)]
            cells = grid[round((high - value) / ((high - low) or 1) * (height - 1))]
            cells[column] = mark if cells[column] in (" ", mark) else "*"
    labels = [f"{high:7.3f} |", *["        |"] * (height - 2), f"{low:7.3f} |"]
    rows = [label + "".join(cells).rstrip() for label, cells in zip(labels, grid, strict=True)]
    return "\n".join([*rows, "        +" + "-" * width, f"         step 1{f'step {len(curves[0])}'.rjust(width - 6)}"])


def _plot(path: Path, runs: dict[str, Run]) -> Path:
    matplotlib = require("matplotlib", "the demo")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "the demo")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (title, one), style in zip(runs.items(), ("-", "--"), strict=True):
        (line,) = axes.plot(smooth(one.losses), style, label=title, linewidth=1.8)
        axes.plot(one.losses, style, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss (mixup)", title="HCGNet on the digits: plain torch and pyext")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _table(runs: dict[str, Run]) -> Any:
    table = require("rich.table", "the demo").Table()
    for title, side in (("", "left"), ("plain torch", "right"), ("pyext", "right"), ("ratio", "right")):
        table.add_column(title, justify=side)
    plain, own = (r.summary for r in runs.values())

    def row(name: str, key: str, scale: float, unit: str, digits: int) -> None:
        a, b = plain[key] * scale, own[key] * scale
        table.add_row(name, f"{a:.{digits}f} {unit}", f"{b:.{digits}f} {unit}", f"{a / b:.2f}x" if b else "-")

    row("time per step", "seconds_per_step", 1e3, "ms", 1)
    row("peak memory", "peak_memory_bytes", 2**-20, "MiB", 0)
    table.add_row("held-out accuracy", f"{plain['top1']:.2%}", f"{own['top1']:.2%}", "")
    table.add_row("held-out loss", f"{plain['held_out_loss']:.4f}", f"{own['held_out_loss']:.4f}", "")
    return table


def _remarks(runs: dict[str, Run], steps: int, difference: float) -> list[str]:
    """What was measured and how, and how far the two trainings agree."""
    plain, own = (r.losses for r in runs.values())
    gaps = [abs(a - b) for a, b in zip(plain, own, strict=True)]
    return [
        f"the same training in float64: the losses of its first {steps} steps agree within {difference:.1e}",
        f"in float32 the first loss agrees within {gaps[0]:.1e}; over {len(gaps)} steps the losses differ by "
        f"{sum(gaps) / len(gaps):.3f} on average and {max(gaps):.3f} at most, because rounding moves a few ReLUs "
        "across zero, and training amplifies that between any two orders of summation",
        f"HCGNet 'tiny', digits at {IMAGE_SIZE}x{IMAGE_SIZE}, batches of {BATCH_SIZE}, on the CPU with "
        f"{torch.get_num_threads()} thread(s), one training after the other",
        "time per step: median over epochs of the mean over an epoch, data loading and optimizer included",
        "peak memory: resident set above what the process held before it built the network; accuracy: 360 images that "
        "were not trained on",
    ]
