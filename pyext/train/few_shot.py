"""Few-shot classification with frozen features: N-way, K-shot episodes, as MCL-OKD's paper evaluates them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyext.train.data import HeldOutBatches, ImageData, Preprocessing, checked, loader
from pyext.train.errors import UserError
from pyext.train.linear_probe import fit_linear_probe
from pyext.train.progress import Progress

PROBES = ("centroid", "linear")

TOGETHER = 32
"""Episodes that are drawn and classified at once."""


@dataclass(frozen=True)
class Episodes:
    """What is asked: `count` episodes of `ways` classes with `shots` labelled and `queries` other images of each.

    `probe` is ``"centroid"`` (the nearest mean of a class's shots, in Euclidean distance) or ``"linear"`` (logistic
    regression on the shots, see `pyext.train.linear_probe`). `normalise`: features are divided by their Euclidean
    length first; the nearest centroid then is that of the largest cosine, because centroids are normalised as well.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15
    count: int = 600
    probe: str = "centroid"
    normalise: bool = True
    seed: int = 0


@dataclass(frozen=True)
class FewShotScores:
    """The share of queries that were right, for every episode: (episodes,) float64."""

    accuracies: Tensor

    @property
    def mean(self) -> float:
        """Over the episodes."""
        return float(self.accuracies.mean())

    @property
    def interval(self) -> float:
        """Half of the 95 % confidence interval of the mean, 1.96 · s / √episodes; NaN for one episode."""
        return 1.96 * float(self.accuracies.std()) / math.sqrt(len(self.accuracies))


@torch.no_grad()
def held_out_features(
    network: nn.Module, images: ImageData, preprocessing: Preprocessing, device: torch.device, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """(n, F) float32 features of all held-out images and their (n,) labels, on the CPU; `network` is in eval mode."""
    extract: Any = getattr(network, "forward_features", None)
    if extract is None:
        raise UserError(f"{type(network).__name__} has no forward_features, whose output few-shot episodes classify.")
    batches = loader(images.held_out, HeldOutBatches(len(images.held_out), batch_size), 0, device.type == "cuda")
    features, labels = [], []
    with Progress(len(batches), 0, batch_size) as progress:
        for pixels, classes in checked(batches):
            features.append(extract(preprocessing.normalise(pixels.to(device))).float().cpu())
            labels.append(classes)
            progress.step("features", None)
    return torch.cat(features), torch.cat(labels)


def evaluate(features: Tensor, labels: Tensor, episodes: Episodes) -> FewShotScores:
    """Accuracy of every episode, the same for the same seed.

    Args:
        features: (n, F), floating.
        labels: (n,) int64.
        episodes: what to draw and how to classify.

    Raises:
        UserError: fewer classes than ways, a class with fewer than shots + queries images, counts below 1, an unknown
            probe, features that are not finite.
    """
    rows = _rows_by_class(features, labels, episodes)
    if episodes.normalise:
        features = F.normalize(features, dim=1)
    right = _centroid if episodes.probe == "centroid" else _linear
    generator = torch.Generator().manual_seed(episodes.seed)
    accuracies = []
    with Progress(-(-episodes.count // TOGETHER), 0, TOGETHER, unit="episodes") as progress:
        for first in range(0, episodes.count, TOGETHER):
            count = min(TOGETHER, episodes.count - first)
            drawn = torch.stack([_draw(rows, episodes, generator) for _ in range(count)])
            accuracies.append(right(features[drawn], episodes))
            progress.step("episodes", None)
    return FewShotScores(torch.cat(accuracies))


def _rows_by_class(features: Tensor, labels: Tensor, episodes: Episodes) -> list[Tensor]:
    if episodes.probe not in PROBES:
        raise UserError(f"unknown probe {episodes.probe!r}: choose among {', '.join(PROBES)}.", usage=True)
    least = {"ways": 2, "shots": 1, "queries": 1, "count": 1}
    for name, smallest in least.items():
        if getattr(episodes, name) < smallest:
            raise UserError(f"few-shot {name} is {getattr(episodes, name)}, at least {smallest} needed.", usage=True)
    if not features.isfinite().all():
        raise UserError("the network's features are not all finite.")
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    if len(rows) < episodes.ways:
        raise UserError(f"{episodes.ways}-way episodes need as many classes; the images have {len(rows)}.", usage=True)
    needed, fewest = episodes.shots + episodes.queries, min(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[fewest]) < needed:
        raise UserError(
            f"an episode takes {needed} images of a class ({episodes.shots} shots and {episodes.queries} queries), and "
            f"class {int(labels.unique()[fewest])} has {len(rows[fewest])}: lower --shots or --queries.",
            usage=True,
        )
    return rows


def _draw(rows: list[Tensor], episodes: Episodes, generator: torch.Generator) -> Tensor:
    """(ways, shots + queries) rows of one episode, none of them twice."""
    classes = torch.randperm(len(rows), generator=generator)[: episodes.ways].tolist()
    needed = episodes.shots + episodes.queries
    return torch.stack([rows[c][torch.randperm(len(rows[c]), generator=generator)[:needed]] for c in classes])


def _centroid(features: Tensor, episodes: Episodes) -> Tensor:
    centroids = features[:, :, : episodes.shots].mean(dim=2)
    if episodes.normalise:
        centroids = F.normalize(centroids, dim=2)
    return _share_right(torch.cdist(_queries(features, episodes), centroids).argmin(dim=2), episodes)


def _linear(features: Tensor, episodes: Episodes) -> Tensor:
    shots = features[:, :, : episodes.shots].flatten(1, 2)
    probe = fit_linear_probe(shots, torch.arange(episodes.ways).repeat_interleave(episodes.shots), episodes.ways)
    return _share_right(probe(_queries(features, episodes)).argmax(dim=2), episodes)


def _queries(features: Tensor, episodes: Episodes) -> Tensor:
    """(episodes, ways · queries, F) of (episodes, ways, shots + queries, F), class by class."""
    return features[:, :, episodes.shots :].flatten(1, 2)


def _share_right(guesses: Tensor, episodes: Episodes) -> Tensor:
    """(episodes,) float64."""
    return (guesses == torch.arange(episodes.ways).repeat_interleave(episodes.queries)).double().mean(dim=1)
