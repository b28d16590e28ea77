"""The training recipe of MCL-OKD (arXiv 2006.04093, section 4.1), and of what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyext.distill.batch_contrast import BatchContrast
from pyext.distill.distillation import Distillation
from pyext.distill.peers import peers
from pyext.distill.spread import SpreadPeers
from pyext.models import Backbone
from pyext.nn import EnsembleDistillation, MemoryContrast, MutualDistillation
from pyext.nn.memory_contrast import banks_in
from pyext.train.base_recipe import BaseRecipe
from pyext.train.data import Batch, ImageData, Preprocessing, with_validation
from pyext.train.errors import UserError
from pyext.train.evaluation import Scores, count
from pyext.train.networks import build
from pyext.train.placement import DataParallel

METHODS = ("mcl-okd", "kd", "dml", "independent")
CONTRASTS = ("bank", "batch", "none")
CONTRAST_WEIGHTS = {"bank": 0.025, "batch": 1.0}
"""The published ones; within a batch each term has its own as well (`pyext.distill.batch_contrast.WEIGHTS`)."""

LARGE = 16384
"""The paper's negatives per image on CIFAR; data sets with fewer training images than that get 256."""


@dataclass(frozen=True)
class DistillationRecipe(BaseRecipe):
    """Hyperparameters; the defaults are the paper's for CIFAR. What it trains (`network`) is a `Distillation`.

    `method` is ``"mcl-okd"``: cross-entropy, distillation of the last peer from the ensemble, contrast; ``"kd"``: the
    same without the contrast; ``"dml"``: deep mutual learning between independent networks; ``"independent"``:
    cross-entropy alone. `share_until` names the last stage that the peers share; None means the method's own choice
    (the network's first stage, or nothing for the latter two), ``"none"`` nothing. `contrast`: ``"bank"`` (mcl-okd's
    own, the default), ``"batch"`` (that of mutual contrastive learning) or ``"none"``; the other methods have none.
    `contrast_weight` None: see `CONTRAST_WEIGHTS`. `num_negatives` None: see `LARGE`. `validation` is the share of each
    class's training images by which the deployed peer is selected: they are not trained on, and the held-out images
    play no part in the selection. `spread_peers`: under torchrun each process holds some of the peers and takes whole
    batches, where else it holds all and takes a share of each batch.
    """

    epochs: int = 300
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    num_peers: int = 4
    method: str = "mcl-okd"
    share_until: str | None = None
    temperature: float = 3.0
    contrast: str | None = None
    contrast_weight: float | None = None
    contrast_temperature: float = 0.1
    num_negatives: int | None = None
    embedding_dim: int = 128
    validation: float = 0.1
    spread_peers: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}: choose among {', '.join(METHODS)}.", usage=True)
        if self.contrast not in (None, *CONTRASTS):
            raise UserError(f"unknown contrast {self.contrast!r}: choose among {', '.join(CONTRASTS)}.", usage=True)
        if self.contrast not in (None, "none") and self.method != "mcl-okd":
            raise UserError(f"--method {self.method} has no --contrast {self.contrast}.", usage=True)
        if self.num_negatives is not None and self._contrast_kind() != "bank":
            raise UserError("--negatives: only contrast over memory banks draws them.", usage=True)
        if self.num_peers < 2 and self.method != "independent":
            raise UserError(
                f"--method {self.method} needs two peers at least, not --peers {self.num_peers}.", usage=True
            )
        if not 0 < self.validation < 1:
            raise UserError(f"--validation {self.validation} is not a share between 0 and 1.", usage=True)

    def decisive(self) -> dict[str, Any]:
        """Where the peers are does not matter: a checkpoint holds all of them."""
        settings = {name: value for name, value in super().decisive().items() if name != "spread_peers"}
        return {**settings, "contrast_weight": self._contrast_weight()}

    def _contrast_kind(self) -> str:
        return "none" if self.method != "mcl-okd" else self.contrast or "bank"

    def _contrast_weight(self) -> float:
        usual = CONTRAST_WEIGHTS.get(self._contrast_kind(), 0.0)
        return usual if self.contrast_weight is None else self.contrast_weight

    def placement(self, fabric: Any) -> DataParallel:
        """Each process's peers, or its share of each batch."""
        if not self.spread_peers or fabric.world_size == 1:
            return super().placement(fabric)
        if self.num_peers % fabric.world_size:
            raise UserError(
                f"--spread-peers: {self.num_peers} peers cannot be spread equally over {fabric.world_size} processes.",
                usage=True,
            )
        return SpreadPeers(fabric)

    def learning_rate_at(self, epoch: int) -> float:
        """Half a cosine from `learning_rate` towards 0 over all epochs."""
        return 0.5 * self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs))

    def parts(self, data: ImageData, seed: int) -> ImageData:
        """The training part without its validation images, which are the ones to score."""
        return with_validation(data, self.validation, seed)

    def network(self, arch: str, data: ImageData) -> Distillation:
        """Peers of network `arch`, and what the method needs beside them."""
        try:
            group = peers(lambda: build(arch, len(data.classes)), self.num_peers, self._shared(arch, data))
        except ValueError as error:
            raise UserError(f"--share-until {self.share_until}: {error}.", usage=True) from error
        contrast = None if self._contrast_kind() == "none" else self._contrast(group.num_features, data)
        network = Distillation(group, self._distillation(), contrast, self._contrast_weight())
        # Banks are equal on all processes as they are; sending them would cost 100 MB a step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, banks_in(network))
        return network

    def _shared(self, arch: str, data: ImageData) -> str | None:
        if self.share_until is None and self.method in ("mcl-okd", "kd"):
            with torch.device("meta"):  # draws nothing, so that the peers of every method start alike
                network = build(arch, len(data.classes))
            return network.first_stage if isinstance(network, Backbone) else None
        return None if self.share_until == "none" else self.share_until

    def _distillation(self) -> nn.Module | None:
        if self.method == "independent":
            return None
        return MutualDistillation() if self.method == "dml" else EnsembleDistillation(self.temperature)

    def _contrast(self, num_features: int, data: ImageData) -> MemoryContrast | BatchContrast:
        shares = torch.distributed.is_initialized() and not self.spread_peers
        processes = torch.distributed.get_world_size() if shares else 1
        if self.batch_size % processes:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared equally by {processes} processes, as contrast needs.",
                usage=True,
            )
        contrast = self._bank(num_features, data) if self._contrast_kind() == "bank" else self._batch(num_features)
        if processes > 1:
            contrast.distribute()
        return contrast

    def _batch(self, num_features: int) -> BatchContrast:
        return BatchContrast(self.num_peers, num_features, self.embedding_dim, temperature=self.contrast_temperature)

    def _bank(self, num_features: int, data: ImageData) -> MemoryContrast:
        samples = len(data.train)
        return MemoryContrast(
            self.num_peers,
            num_features,
            self.embedding_dim,
            num_samples=samples,
            num_negatives=self.num_negatives or (LARGE if samples > LARGE else 256),
            temperature=self.contrast_temperature,
            labels=data.train.labels,
        )

    def loss(self, module: nn.Module, images: Tensor, labels: Tensor, index: Tensor, seed: int, *place: int) -> Tensor:
        """The method's loss; the negatives come from torch's generator, which the loop seeds by the step's place."""
        return module(images, labels, index)

    @torch.no_grad()
    def evaluate(
        self, network: Any, batches: Iterable[Batch], preprocessing: Preprocessing, device: torch.device
    ) -> Tensor:
        """(num_peers + 1, 4): sums of every peer and of their ensemble, whose logits are the mean of the peers'."""
        sums = torch.zeros(self.num_peers + 1, 4, device=device)
        for images, labels in batches:
            labels = labels.to(device)
            logits = torch.stack(network.peers(preprocessing.normalise(images.to(device))).logits).float()
            sums += torch.stack([count(one, labels) for one in (*logits, logits.mean(dim=0))])
        return sums

    def select(self, network: Any, sums: Tensor) -> None:
        """The peer with the most validation images right is deployed; of equals, the one of lowest loss."""
        ranks = [(-float(right), float(loss)) for loss, right, _, _ in sums[:-1]]
        network.selected.fill_(ranks.index(min(ranks)))

    def columns(self) -> tuple[str, ...]:
        names = [f"peer{i}" for i in range(self.num_peers)]
        return "validation_loss", "validation_ensemble", *(f"validation_{name}" for name in names), "selected"

    def scores(self, network: Any, sums: Tensor) -> tuple[float, ...]:
        *each, ensemble = (Scores(row) for row in sums)
        return ensemble.loss, ensemble.top1, *(peer.top1 for peer in each), int(network.selected)

    def describe(self, network: Any, sums: Tensor) -> str:
        *each, ensemble = (Scores(row).top1 for row in sums)
        best = int(network.selected)
        return f"validation top-1: ensemble {ensemble:.2%}, best peer ({best}) {each[best]:.2%}"

    def summary(self, network: Any, last: Mapping[str, float], held_out: Tensor | None) -> dict[str, Any]:
        """Top-1 on the held-out images, which were not looked at before: `top1` is the deployed peer's."""
        if held_out is None:
            raise ValueError("DistillationRecipe.summary: held_out is None, expected the sums over the held-out images")
        *each, ensemble = (Scores(row) for row in held_out)
        deployed = int(network.selected)
        return {
            "method": self.method,
            "deployed_peer": deployed,
            "top1": each[deployed].top1,
            "held_out_loss": each[deployed].loss,
            "ensemble_top1": ensemble.top1,
            "peers_top1": [peer.top1 for peer in each],
            "validation_top1": last.get(f"validation_peer{deployed}", float("nan")),
        }

    def deployed(self, network: Any) -> nn.Module:
        """The selected peer."""
        return network.deployed()
