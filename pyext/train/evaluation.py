"""Scores of a network on held-out images, and predictions for image files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyext.train.data import (
    Batch,
    CentreCrop,
    HeldOutBatches,
    ImageData,
    Preprocessing,
    checked,
    load_data,
    loader,
    open_image,
    to_tensor,
)
from pyext.train.errors import UserError
from pyext.train.runs import Card, load_network


@dataclass(frozen=True)
class Scores:
    """`sums` holds the summed loss, the images right at first guess, right among five, and all images."""

    sums: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.sums[0] / self.sums[3])

    @property
    def top1(self) -> float:
        """Share of the images whose most probable class is right."""
        return float(self.sums[1] / self.sums[3])

    @property
    def top5(self) -> float:
        """Share of the images whose class is among the five most probable (all classes when there are fewer)."""
        return float(self.sums[2] / self.sums[3])


@torch.no_grad()
def evaluate(
    network: nn.Module, batches: Iterable[Batch], preprocessing: Preprocessing, device: torch.device
) -> Scores:
    """Score `network`, which is in eval mode and on `device`, on uint8 `batches`."""
    sums = torch.zeros(4, device=device)
    for images, labels in batches:
        sums += count(network(preprocessing.normalise(images.to(device))).float(), labels.to(device))
    return Scores(sums)


def count(logits: Tensor, labels: Tensor) -> Tensor:
    """What a batch adds to `Scores.sums`, from float32 `logits` (N, C) and `labels` (N,)."""
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, guesses[:, 0].sum(), guesses.sum(), loss.new_tensor(float(len(labels)))])


def choose_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is the accelerator that torch finds, or the CPU."""
    try:
        found = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else None
        device = found or torch.device("cpu" if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}", usage=True) from error
    return device


def open_network(checkpoint: Path, arch: str | None, data: str | None, data_dir: Path | None) -> tuple[nn.Module, Card]:
    """The network in `checkpoint` and its card; weights without a card are taken for `arch` trained on `data`."""
    if arch is None:
        return load_network(checkpoint)
    if data is None:
        raise UserError("--arch needs --data, which names the classes.", usage=True)
    return load_network(checkpoint, Card.of(arch, load_data(data, data_dir)))


def held_out(card: Card, data: str | None, data_dir: Path | None) -> ImageData:
    """The data set `data` (by default the one in `card`), checked to have the network's classes."""
    images = load_data(data or card.data, data_dir, card.preprocessing.image_size)
    if images.classes != card.classes:
        odd = sorted(set(images.classes) ^ set(card.classes))
        named = f", among them {', '.join(odd[:5])}" if odd else ", in another order"
        raise UserError(
            f"{images.name} has {len(images.classes)} classes and the network {len(card.classes)}; they differ{named}."
        )
    return images


def evaluate_data(
    network: nn.Module, card: Card, images: ImageData, device: torch.device, batch_size: int, workers: int
) -> tuple[Scores, float]:
    """Scores of `network` on the held-out images, and images per second with reading and preprocessing counted."""
    batches = HeldOutBatches(len(images.held_out), batch_size)
    start = time.perf_counter()
    stream = checked(loader(images.held_out, batches, workers, pin_memory=device.type == "cuda"))
    scores = evaluate(network, stream, card.preprocessing, device)
    count = float(scores.sums[3])
    return scores, count / (time.perf_counter() - start)


@torch.no_grad()
def predict(
    network: nn.Module, card: Card, files: Sequence[str | Path], device: torch.device, top: int = 3
) -> list[list[tuple[str, float]]]:
    """For each image file the `top` most probable classes with their probabilities, best first.

    `network` is in eval mode and on `device`. UserError when a file is missing or not an image.
    """
    crop = CentreCrop(card.preprocessing.image_size)
    predictions = []
    for file in files:
        image = to_tensor(crop(open_image(file)))[None].to(device)
        probabilities = network(card.preprocessing.normalise(image)).float().softmax(dim=1)[0]
        best = probabilities.topk(min(top, len(card.classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        predictions.append([(card.classes[index], probability) for index, probability in pairs])
    return predictions
