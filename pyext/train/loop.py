"""The training loop: one step, one epoch, one run, on one process or many.

Lightning Fabric supplies what is not this project's purpose: choice of device, bfloat16 autocast, the process group and
DistributedDataParallel under torchrun. The loop itself stays plain torch and can be read from top to bottom.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from pyext.train.base_recipe import BaseRecipe
from pyext.train.data import (
    ArrayImages,
    EpochBatches,
    FolderImages,
    HeldOutBatches,
    ImageData,
    IndexedImages,
    checked,
    load_data,
    loader,
)
from pyext.train.errors import UserError, require
from pyext.train.networks import kernels
from pyext.train.progress import PeakMemory, Progress
from pyext.train.randomness import Stream, seed_all
from pyext.train.recipe import Recipe
from pyext.train.runs import Card, Table, export, load_run, save_run


@dataclass(frozen=True)
class Settings:
    """A training run as `pyext train` takes it: see its help for the meaning of each."""

    arch: str
    data: str
    output: Path
    recipe: BaseRecipe = field(default_factory=Recipe)
    data_dir: Path | None = None
    image_size: int | None = None
    seed: int = 0
    amp: str = "off"
    device: str = "auto"
    workers: int = 0
    save_every: int = 0
    log_every: int = 50
    resume: bool = False
    plain: bool = False
    sync_bn: bool = False
    tensorboard: bool = False

    def decisive(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        own = {name: getattr(self, name) for name in ("arch", "data", "image_size", "seed", "amp", "sync_bn")}
        return {**own, **self.recipe.decisive()}


class Interrupted(Exception):
    """The run was asked to stop, and its checkpoint is on the disk."""


class Trainer:
    """One training run: `run` trains to the last epoch, from the checkpoint in the run's folder when resuming."""

    def __init__(self, settings: Settings):
        self.settings, self.recipe = settings, settings.recipe
        self.fabric = _fabric(settings)
        self.rank, self.processes = self.fabric.global_rank, self.fabric.world_size
        self.placement = self.recipe.placement(self.fabric)
        folder = settings.output
        self.checkpoint = folder / "last.pt"
        self.steps_table = Table(folder / "steps.csv", ("epoch", "step", "loss"), place=2)
        self.epoch_columns = (*_EPOCH_COLUMNS, *self.recipe.columns(), "seconds", "images_per_second")
        self.epochs_table = Table(folder / "epochs.csv", self.epoch_columns, place=1)
        self.stop = False
        self.tensorboard = require("torch.utils.tensorboard", "--tensorboard") if settings.tensorboard else None
        self.epoch = self.step = 0
        previous = self._previous()

        self.whole = load_data(settings.data, settings.data_dir, settings.image_size, settings.seed)
        self.data = self.recipe.parts(self.whole, settings.seed)
        self.card = Card.of(settings.arch, self.data)
        if previous is not None:
            _check_same_run(previous, settings, self.card, self.checkpoint)
        self.memory = PeakMemory(self.fabric.device)
        self._build_network()
        self._build_loaders()
        self.totals = torch.zeros(2, device=self.fabric.device)
        if previous is not None:
            self._restore(previous)

    def _previous(self) -> dict[str, Any] | None:
        """The checkpoint to resume from; refuses to write over a run that nobody asked to continue."""
        if not self.settings.resume and self.checkpoint.exists():
            raise UserError(
                f"{self.checkpoint} already holds a run: add --resume to continue it, or choose another --output.",
                usage=True,
            )
        return load_run(self.checkpoint) if self.checkpoint.exists() else None

    def _build_network(self) -> None:
        seed_all(self.settings.seed, Stream.WEIGHTS)
        network = self.recipe.network(self.settings.arch, self.data)
        if self.settings.sync_bn:
            if self.fabric.device.type != "cuda":
                raise UserError("--sync-bn needs CUDA devices: torch has no SyncBatchNorm for others.", usage=True)
            if self.placement.processes == self.processes:  # else each has the whole batch
                network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network
        parameters = sum(p.numel() for p in network.parameters())
        kind = type(self.recipe.deployed(network)).__name__
        self.title = f"{kind} {self.settings.arch}, {parameters:,} parameters"
        self.module, self.optimizer = self.placement.set_up(network, self.recipe.optimizer(network))

    def _build_loaders(self) -> None:
        batch_size, share = self.recipe.batch_size, (self.placement.rank, self.placement.processes)
        self.batches = EpochBatches(len(self.data.train), batch_size, self.settings.seed, *share)
        self.train_loader = self._loader(IndexedImages(self.data.train), self.batches)
        self.held_out_loader = self._held_out_loader(self.data)

    def _loader(self, images: ArrayImages | FolderImages | IndexedImages, batches: Sampler) -> DataLoader:
        return loader(images, batches, self.settings.workers, pin_memory=self.fabric.device.type == "cuda")

    def _held_out_loader(self, data: ImageData) -> DataLoader:
        share = self.placement.rank, self.placement.processes
        return self._loader(data.held_out, HeldOutBatches(len(data.held_out), self.recipe.batch_size, *share))

    def _restore(self, previous: dict[str, Any]) -> None:
        self.placement.restore(previous.get("training", previous["model"]), previous["optimizer"])
        self.epoch, self.step = previous["epoch"], previous["step"]
        totals = previous["totals"]
        self.totals.copy_(totals[self.rank] if len(totals) == self.processes else totals.mean(dim=0))

    def run(self) -> dict[str, Any]:
        """Train to the end and return the summary that is also written to summary.json."""
        if self._first:
            self.settings.output.mkdir(parents=True, exist_ok=True)
            self.steps_table.cut((self.epoch, self.step))
            self.epochs_table.cut((self.epoch,))
        self.fabric.barrier()
        total = self.recipe.epochs * len(self.batches)
        done = self.epoch * len(self.batches) + self.step
        step_seconds: list[float] = []
        progress = Progress(total, done, self.recipe.batch_size, self._first)
        with kernels(self.settings.plain), self._stopping(), progress as self.progress:
            self._announce(done)
            while self.epoch < self.recipe.epochs:
                step_seconds += self._run_epoch()
            return self._summarise(step_seconds)

    @property
    def _first(self) -> bool:
        return self.rank == 0

    def _announce(self, done: int) -> None:
        place = f", resumed at epoch {self.epoch + 1}, step {self.step}" if done else ""
        self.progress.line(
            f"{self.title}, {self.data.name}: {len(self.data.train)} training and {len(self.data.held_out)} held-out "
            f"images of {len(self.data.classes)} classes, {self.processes} x {self.fabric.device}, into "
            f"{self.settings.output}{place}"
        )

    def _run_epoch(self) -> list[float]:
        """The rest of the current epoch, its evaluation and its records; returns the seconds per step, once."""
        rate = self.recipe.start_epoch(self.epoch, self.network, self.optimizer)
        self.batches.epoch, self.batches.first_step = self.epoch, self.step
        steps, start = len(self.batches) - self.step, time.perf_counter()
        self.module.train()
        for batch in checked(self.train_loader):
            loss = self._step(*batch)
            self.step += 1
            self._record_step(loss)
        train_loss = self._train_loss()
        seconds = time.perf_counter() - start
        sums = self._evaluate(self.held_out_loader)
        self.recipe.select(self.network, sums)
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        self._record_epoch(rate, train_loss, sums, seconds, steps)
        return [seconds / steps] if steps else []

    def _step(self, images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        place = self.epoch, self.step, self.placement.rank
        seed_all(self.settings.seed, Stream.STEP, *place)
        images, labels, index = self.fabric.to_device((images, labels, index))
        images = self.data.preprocessing.normalise(images)
        loss = self.recipe.loss(self.module, images, labels, index, self.settings.seed, *place)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self.optimizer.step()
        loss = loss.detach()
        self.totals += torch.stack([loss, torch.ones_like(loss)])
        return loss

    def _record_step(self, loss: Tensor) -> None:
        """Log, save and stop where it is time to; processes agree on stopping where they meet to average the loss."""
        mean, agreed = None, 0.0
        if self.step % self.settings.log_every == 0:
            mean, agreed = self._mean(torch.stack([loss, torch.full_like(loss, self.stop)])).tolist()
            self._log_step(mean)
        stop = self.stop if self.processes == 1 else agreed > 0
        self.progress.step(f"epoch {self.epoch + 1}/{self.recipe.epochs} step {self.step}/{len(self.batches)}", mean)
        every = self.settings.save_every
        if stop or (every and self.step % every == 0):
            self._save()
        if stop:
            raise Interrupted(
                f"stopped at epoch {self.epoch + 1}, step {self.step}: continue with --resume --output "
                f"{self.settings.output}"
            )

    def _log_step(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at epoch {self.epoch + 1}, step {self.step}: lower --lr, or look for bad images."
            )
        if self._first:
            self.steps_table.add(self.epoch, self.step - 1, repr(loss))

    def _train_loss(self) -> float:
        total, count = self._mean(self.totals).tolist()
        return total / max(count, 1)

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over processes; Fabric reduces in place, hence the copy."""
        return self.fabric.all_reduce(values.clone(), reduce_op="mean") if self.processes > 1 else values

    def _evaluate(self, batches: DataLoader) -> Tensor:
        """The recipe's sums over the held-out `batches` of all processes."""
        self.placement.before_evaluation()
        self.network.eval()
        with self.fabric.autocast():
            sums = self.recipe.evaluate(self.network, checked(batches), self.data.preprocessing, self.fabric.device)
        self.network.train()
        return self.placement.total(sums)

    def _record_epoch(self, rate: float, train_loss: float, sums: Tensor, seconds: float, steps: int) -> None:
        speed = steps * self.recipe.batch_size / seconds
        row = (self.epoch - 1, rate, train_loss, *self.recipe.scores(self.network, sums), seconds, speed)
        if self._first:
            self.epochs_table.add(*row)
            self._to_tensorboard(row)
        self._save(whole_epoch=True)
        self.progress.line(
            f"epoch {self.epoch}/{self.recipe.epochs}: learning rate {rate:.4f}, training loss {train_loss:.4f}, "
            f"{self.recipe.describe(self.network, sums)}, {speed:.0f} images/s"
        )

    def _to_tensorboard(self, row: tuple[float, ...]) -> None:
        if self.tensorboard is None:
            return
        writer = self.tensorboard.SummaryWriter(str(self.settings.output))
        for name, value in zip(self.epoch_columns[1:], row[1:], strict=True):
            writer.add_scalar(name, value, int(row[0]))
        writer.close()

    def _save(self, whole_epoch: bool = False) -> None:
        totals = self.fabric.all_gather(self.totals).view(-1, 2)
        network, optimizer = self.placement.collect()
        if self._first:
            deployed = self.recipe.deployed(network)
            if whole_epoch:
                export(self.settings.output / "model.safetensors", deployed, self.card)
            # Tensors that two entries share are written once.
            training = {} if deployed is network else {"training": network.state_dict()}
            save_run(
                self.checkpoint,
                {
                    "card": self.card.to_dict(),
                    "settings": self.settings.decisive(),
                    "model": deployed.state_dict(),
                    **training,
                    "optimizer": optimizer,
                    "epoch": self.epoch,
                    "step": self.step,
                    "totals": totals,
                },
            )
        self.fabric.barrier()

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a stop after the step at hand; a second Ctrl-C stops at once.

        torchrun answers a Ctrl-C with SIGTERM to processes that have seen it already, which must not count as a second.
        """

        def ask(number: int, _: FrameType | None) -> None:
            if self.stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop = True

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _summarise(self, step_seconds: list[float]) -> dict[str, Any]:
        rows = self.epochs_table.read() if self._first else []
        last = {name: float(value) for name, value in rows[-1].items()} if rows else {}
        held_out = None if self.data is self.whole else self._evaluate(self._held_out_loader(self.whole))
        summary = {
            "arch": self.settings.arch,
            "data": self.settings.data,
            "backend": "reference" if self.settings.plain else "auto",
            "epochs": self.epoch,
            "batch_size": self.recipe.batch_size,
            **self.recipe.summary(self.network, last, held_out),
            "seconds_per_step": statistics.median(step_seconds) if step_seconds else None,
            "peak_memory_bytes": self.memory.read(),
        }
        if self._first:
            (self.settings.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary


_EPOCH_COLUMNS = ("epoch", "learning_rate", "train_loss")
"""Before the recipe's scores; seconds and images per second come after them."""


def _fabric(settings: Settings) -> Any:
    """Fabric on the asked device; under torchrun, one process per device with DistributedDataParallel."""
    fabric = require("lightning_fabric", "training")
    kind, _, index = settings.device.partition(":")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        made = fabric.Fabric(
            accelerator="gpu" if kind == "cuda" else kind,
            devices=[int(index)] if index else here,
            num_nodes=processes // here,
            strategy="ddp" if processes > 1 else "auto",
            precision="bf16-mixed" if settings.amp == "bf16" else "32-true",
        )
        made.launch()
    except (ValueError, RuntimeError, fabric.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"--device {settings.device} cannot be used here: {error}", usage=True) from error
    return made


def _check_same_run(previous: dict[str, Any], settings: Settings, card: Card, path: Path) -> None:
    """UserError when the checkpoint belongs to a run with other settings or other classes."""
    for name, value in settings.decisive().items():
        if name not in previous["settings"] or previous["settings"][name] != value:
            raise UserError(
                f"{path} belongs to a run with {name} {previous['settings'].get(name)}, and this one asks for {value}: "
                "resume with the same settings, or choose another --output.",
                usage=True,
            )
    if previous["card"] != card.to_dict():
        raise UserError(f"{path} belongs to a run on other classes or images than {settings.data} holds now.")
