"""A training run whose peers are spread over its processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyext.train.placement import DataParallel


class _Autocast(nn.Module):
    """`network` under the run's precision, which Fabric's own wrapper sees to elsewhere."""

    def __init__(self, fabric: Any, network: nn.Module) -> None:
        super().__init__()
        self.fabric, self.network = fabric, network

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.fabric.autocast():
            return self.network(*inputs)


class SpreadPeers(DataParallel):
    """Every process holds some of the peers (`Peers.spread`), and takes whole batches.

    Checkpoints are those of one process: a run may go on with its peers placed otherwise. The first process keeps a
    copy of all peers in the CPU's memory for them.
    """

    def __init__(self, fabric: Any) -> None:
        super().__init__(fabric)
        self.first = self.rank == 0
        self.rank, self.processes = 0, 1

    def set_up(self, network: Any, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """`optimizer`, made for all parameters of `network`, a `Distillation`, is left with those that are here."""
        self.whole = copy.deepcopy(network) if self.first else None
        places = {parameter: place for place, parameter in enumerate(network.parameters())}
        self.num_parameters = len(places)
        network.peers.spread()
        self.network = self.fabric.to_device(network)
        parameters = list(network.parameters())
        self.places = [places[parameter] for parameter in parameters]
        (group,) = optimizer.param_groups
        group["params"] = parameters
        self.optimizer = optimizer
        self.module = _Autocast(self.fabric, network)
        return self.module, self.fabric.setup_optimizers(optimizer)

    def before_evaluation(self) -> None:
        """Every process's batch norm has seen the same."""

    def total(self, sums: Tensor) -> Tensor:
        """Every process has scored all peers on all images."""
        return sums

    def collect(self) -> tuple[Any, dict[str, Any]]:
        """The copy of all peers, brought up to date, and one optimizer state over them."""
        own = self.optimizer.state_dict()
        state = {self.places[i]: entry for i, entry in own["state"].items()}
        # Banks and heads are the same everywhere. In the CPU's memory, where any process can read what another sent.
        network = {name: x for name, x in self.network.state_dict().items() if self.first or name.startswith("peers.")}
        part = _on_cpu((network, state))
        parts: list[Any] | None = [None] * dist.get_world_size() if self.first else None
        dist.gather_object(part, parts)
        if self.whole is None or parts is None:
            return self.network, own
        networks, states = zip(*reversed(parts), strict=True)  # what several hold, as the first has it
        self.whole.load_state_dict({name: tensor for network in networks for name, tensor in network.items()})
        groups = [{**own["param_groups"][0], "params": list(range(self.num_parameters))}]
        merged = {place: entry for state in states for place, entry in state.items()}
        return self.whole, {"state": dict(sorted(merged.items())), "param_groups": groups}

    def restore(self, network: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """This process's part of a whole network and of the optimizer's state over it."""
        self.network.load_state_dict({name: network[name] for name in self.network.state_dict()})
        state = {i: optimizer["state"][place] for i, place in enumerate(self.places) if place in optimizer["state"]}
        groups = [{**optimizer["param_groups"][0], "params": list(range(len(self.places)))}]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _on_cpu(entries: Any) -> Any:
    if isinstance(entries, Tensor):
        return entries.detach().cpu()
    if isinstance(entries, tuple):
        return tuple(_on_cpu(entry) for entry in entries)
    return {name: _on_cpu(entry) for name, entry in entries.items()} if isinstance(entries, dict) else entries
