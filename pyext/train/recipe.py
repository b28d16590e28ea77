"""The paper's training recipe: schedules, mixup and loss (HCGNet, arXiv 1908.09699, section 4).

SGD with Nesterov momentum, cosine learning rate with warm restarts whose period doubles (10 + 20 + ... + 640 = 1270
epochs on CIFAR), mixup, and DropBlock whose probability grows from 0 to 0.1 within each restart cycle. Learning rate
and DropBlock change per epoch, as in the published code.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyext.nn import set_drop_block_epoch
from pyext.train.base_recipe import BaseRecipe
from pyext.train.randomness import Stream, generator


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """Hyperparameters; the defaults are the paper's for CIFAR."""

    epochs: int = 1270
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    period: int = 10
    repeat_at: int | None = None
    mixup: float = 1.0
    label_smoothing: float = 0.0
    drop_block: bool = True

    nesterov: ClassVar[bool] = True

    @staticmethod
    def for_imagenet(batch_size: int = 128) -> Recipe:
        """The published ImageNet code's settings: learning rate 0.1 per 256 images, 630 epochs, label smoothing 0.1."""
        return Recipe(
            epochs=630,
            batch_size=batch_size,
            learning_rate=0.1 * batch_size / 256,
            weight_decay=4e-5,
            mixup=0.4,
            label_smoothing=0.1,
            drop_block=False,
        )

    def decisive(self) -> dict[str, Any]:
        """All but the epochs: the schedule does not depend on their number, so a finished run may go on."""
        return {name: value for name, value in asdict(self).items() if name != "epochs"}

    def schedule_epoch(self, epoch: int) -> int:
        """The epoch as the schedules count it: `repeat_at` starts them anew."""
        return epoch if self.repeat_at is None or epoch < self.repeat_at else epoch - self.repeat_at

    def learning_rate_at(self, epoch: int) -> float:
        """Cosine from `learning_rate` towards 0 within each cycle of `period`, 2 `period`, 4 `period` ... epochs."""
        since, length = self.schedule_epoch(epoch), self.period
        while since >= length:
            since, length = since - length, 2 * length
        return 0.5 * self.learning_rate * (1 + math.cos(math.pi * since / length))

    def start_epoch(self, epoch: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """Set the learning rate and DropBlock's probability of `epoch`; returns the learning rate."""
        if self.drop_block:
            set_drop_block_epoch(network, self.schedule_epoch(epoch), self.period)
        return super().start_epoch(epoch, network, optimizer)

    def loss(self, module: nn.Module, images: Tensor, labels: Tensor, index: Tensor, seed: int, *place: int) -> Tensor:
        """Cross-entropy of the batch after mixup."""
        mixed = mixup(images, labels, self.mixup, seed, *place)
        return mixed.loss(module(mixed.images), self.label_smoothing)


@dataclass(frozen=True)
class Mixed:
    """A batch blended with a permutation of itself (mixup, arXiv 1710.09412): `share` of it is the first label's."""

    images: Tensor
    labels: Tensor
    other_labels: Tensor
    share: float

    def loss(self, logits: Tensor, label_smoothing: float) -> Tensor:
        """Mean cross-entropy against both labels, weighted by their shares; scalar."""
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        first = F.cross_entropy(logits, self.labels, label_smoothing=label_smoothing)
        if self.share == 1.0:
            return first
        second = F.cross_entropy(logits, self.other_labels, label_smoothing=label_smoothing)
        return self.share * first + (1 - self.share) * second


def mixup(images: Tensor, labels: Tensor, alpha: float, seed: int, *place: int) -> Mixed:
    """Blend `images` (N, C, H, W) with a permutation of themselves by a share drawn from Beta(alpha, alpha).

    The draw depends on `seed` and `place` (epoch, step, rank) alone. `alpha` 0 leaves the batch as it is.
    """
    if alpha == 0:
        return Mixed(images, labels, labels, 1.0)
    random = generator(seed, Stream.MIXUP, *place)
    share = float(random.beta(alpha, alpha))
    order = torch.from_numpy(random.permutation(len(labels))).to(labels.device)
    return Mixed(torch.lerp(images[order], images, share), labels, labels[order], share)
