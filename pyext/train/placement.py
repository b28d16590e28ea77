"""How the processes of a run share its work: which images each takes, what it holds, and how the run is one again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


class DataParallel:
    """Every process holds the whole network and takes its share of each batch; one process alone is a case of it.

    Attributes:
        rank, processes: which share of each batch this process takes, and of how many.
    """

    def __init__(self, fabric: Any) -> None:
        self.fabric = fabric
        self.rank, self.processes = fabric.global_rank, fabric.world_size

    def set_up(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The module to call and the optimizer to step for `network` and its `optimizer`, moved to the device."""
        self.network = network
        self.module, self.optimizer = self.fabric.setup(network, optimizer)
        return self.module, self.optimizer

    def before_evaluation(self) -> None:
        """Batch norm's running statistics differ between processes; those of the first are what is saved."""
        if self.processes > 1:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all held-out images from each process's."""
        return sums if self.processes == 1 else self.fabric.all_reduce(sums, reduce_op="sum")

    def collect(self) -> tuple[nn.Module, dict[str, Any]]:
        """The whole network and the optimizer's state, as one process would have them, on the first process.

        Called by all; what the others get is not to be used.
        """
        return self.network, self.optimizer.state_dict()

    def restore(self, network: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """The inverse of `collect`, on every process, from state dicts."""
        self.network.load_state_dict(network)
        self.optimizer.load_state_dict(optimizer)
