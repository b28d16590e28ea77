"""What every training recipe answers to the loop, with the answers of plain classification where they are common.

The loop (`pyext.train.loop`) knows batches, epochs, processes and files. What is trained, by which loss and how it is
judged is the recipe's; its fields are what must be the same when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyext.train.data import Batch, ImageData, Preprocessing
from pyext.train.evaluation import Scores, evaluate
from pyext.train.networks import build
from pyext.train.placement import DataParallel


@dataclass(frozen=True)
class BaseRecipe:
    """SGD with a learning rate per epoch; subclasses give the defaults, the schedule and the loss."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float

    nesterov: ClassVar[bool] = False
    """Whether the momentum is Nesterov's."""

    def decisive(self) -> dict[str, Any]:
        """The settings that a resumed run must share."""
        return asdict(self)

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of `epoch`, counted from 0."""
        raise NotImplementedError

    def start_epoch(self, epoch: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """Set what changes per epoch in `network` and `optimizer`; returns the learning rate."""
        rate = self.learning_rate_at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """SGD over all parameters of `network` (without momentum where that is 0)."""
        return torch.optim.SGD(
            network.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )

    def parts(self, data: ImageData, seed: int) -> ImageData:
        """The parts of `data` to train on and to score each epoch. Where the latter are not `data`'s held-out images,
        those are scored once, after the last epoch."""
        return data

    def placement(self, fabric: Any) -> DataParallel:
        """How the processes share the work."""
        return DataParallel(fabric)

    def network(self, arch: str, data: ImageData) -> nn.Module:
        """What is trained: a new network, or several with all that learns beside them."""
        return build(arch, len(data.classes))

    def loss(self, module: nn.Module, images: Tensor, labels: Tensor, index: Tensor, seed: int, *place: int) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            module: `network`, perhaps within DistributedDataParallel.
            images: float32, normalised (B, 3, S, S).
            labels: (B,) int64.
            index: (B,) int64, the images' places in the training part.
            seed: of the run, and `place` (epoch, step, rank), of which every draw is a function.
        """
        raise NotImplementedError

    def evaluate(
        self, network: nn.Module, batches: Iterable[Batch], preprocessing: Preprocessing, device: torch.device
    ) -> Tensor:
        """Sums over `batches` as `Scores` holds them, (4,), or (n, 4) for n things that are scored."""
        return evaluate(network, batches, preprocessing, device).sums

    def select(self, network: nn.Module, sums: Tensor) -> None:
        """Note in `network` what follows from the scores of an epoch."""

    def columns(self) -> tuple[str, ...]:
        """Names of the scores, as epochs.csv has them."""
        return "held_out_loss", "top1", "top5"

    def scores(self, network: nn.Module, sums: Tensor) -> tuple[float, ...]:
        """The values of `columns`."""
        scores = Scores(sums)
        return scores.loss, scores.top1, scores.top5

    def describe(self, network: nn.Module, sums: Tensor) -> str:
        """The scores of an epoch as part of a sentence."""
        scores = Scores(sums)
        return f"held-out loss {scores.loss:.4f}, top-1 {scores.top1:.2%}"

    def summary(self, network: nn.Module, last: Mapping[str, float], held_out: Tensor | None) -> dict[str, Any]:
        """What summary.json says of the result: from the last row of epochs.csv, and the sums over the held-out images
        where they were not scored each epoch."""
        return {name: last.get(name, float("nan")) for name in ("top1", "held_out_loss")}

    def deployed(self, network: nn.Module) -> nn.Module:
        """The one network that is exported and that `pyext eval` and `pyext predict` load."""
        return network
