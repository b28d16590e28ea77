"""Peers: several networks of one kind that may share their first stages (MCL-OKD, arXiv 2006.04093, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyext.models import Backbone
from pyext.nn.exchange import gather, sum_gradient, together
from pyext.nn.stem_inference import StemSequential


class PeerOutputs(NamedTuple):
    """What every peer makes of a batch."""

    logits: list[Tensor]
    """(B, num_classes) of each."""
    features: list[Tensor]
    """(B, num_features) of each: what its classifier sees."""


class _Chain(NamedTuple):
    """A network as the steps in which it runs; the names are those of the stages' parent."""

    prepare: Callable[[Tensor], Tensor]
    stages: nn.Sequential
    names: list[str]
    pool: Callable[[Tensor], Tensor]
    classifier: nn.Module


def _chain(network: nn.Module) -> _Chain:
    if isinstance(network, Backbone):
        names = [name for name, _ in network.features.named_children()]
        return _Chain(network.prepare, network.features, names, network.pool, network.classifier)
    if isinstance(network, nn.Sequential) and len(network) > 1:
        names = [name for name, _ in network.named_children()][:-1]
        return _Chain(_as_it_is, network, names, _as_it_is, network[-1])
    raise ValueError(
        f"peers: model_fn makes a {type(network).__name__}, expected a pyext.models.Backbone (its `features` are the "
        "stages), or an nn.Sequential whose last child is the classifier"
    )


def _as_it_is(x: Tensor) -> Tensor:
    return x


_FACTS = ("Peers: batch size", "Peers: number of classes", "Peers: number of features")


class Peers(nn.Module):
    """Networks of one kind, of which the stages up to one are the same modules and run once (see `peers`).

    `networks[i]` is a whole, ordinary network. The state dict holds the shared stages under every peer's name, as the
    same tensors, which `torch.save` writes once.
    """

    def __init__(self, networks: list[nn.Module], num_shared: int) -> None:
        super().__init__()
        self.networks, self.num_shared = nn.ModuleList(networks), num_shared
        self.own = range(len(networks))
        self._group: dist.ProcessGroup | None = None
        first = _chain(networks[0])
        for network in networks[1:]:
            stages = _chain(network).stages
            for i in range(num_shared):
                stages[i] = first.stages[i]

    def __len__(self) -> int:
        return len(self.networks)

    def extra_repr(self) -> str:
        return f"num_peers={len(self)}, num_shared={self.num_shared}"

    @property
    def num_features(self) -> int:
        """Width of every peer's pooled features; TypeError where the classifier is not linear."""
        classifier = _chain(self.networks[self.own[0]]).classifier
        if not isinstance(classifier, nn.Linear):
            raise TypeError(f"Peers.num_features: the classifier is a {type(classifier).__name__}, expected nn.Linear")
        return classifier.in_features

    def spread(self, group: dist.ProcessGroup | None = None) -> None:
        """Spread the peers over the processes of `group` (None: the default one); call it on all, after they are equal.

        Process r of R keeps the M/R peers `own`, from r·M/R on, and the shared stages; the others' places in `networks`
        become None, and are not in the state dict. Make the optimizer afterwards.

        Every process then gives the same batch, and a forward pass, a collective, returns the outputs of all peers in
        their order. Every process computes the same loss of them, and its backward pass, a collective too where stages
        are shared, leaves the loss's exact gradient in the own peers and in the shared stages, which so stay the same
        everywhere: without DistributedDataParallel.

        Raises:
            ValueError: the peers cannot be spread equally, or were spread before.
        """
        group = dist.group.WORLD if group is None else group
        processes, rank = dist.get_world_size(group), dist.get_rank(group)
        if self._group is not None:
            raise ValueError("Peers.spread: the peers are spread already")
        if len(self) % processes:
            raise ValueError(f"Peers.spread: {len(self)} peers cannot be spread equally over {processes} processes")
        share = len(self) // processes
        self._group, self.own = group, range(rank * share, (rank + 1) * share)
        for i in set(range(len(self))) - set(self.own):
            self.networks.register_module(str(i), None)

    def forward(self, x: Tensor) -> PeerOutputs:
        """(B, ...) images to the logits and features of every peer.

        Raises, where the peers are spread:
            ValueError: batches of different sizes on the processes.
            RuntimeError: another process raised an error.
        """
        if self._group is None:
            return self._own_outputs(x)
        own = together(
            self._group,
            x.device,
            lambda: self._own_outputs(x),
            _FACTS,
            lambda made: (*made.logits[0].shape, made.features[0].shape[1]),
        )
        gathered = [gather(torch.stack(one), self._group, same_loss=True) for one in own]
        return PeerOutputs(*(list(every) for every in gathered))

    def _own_outputs(self, x: Tensor) -> PeerOutputs:
        outputs = PeerOutputs([], [])
        chains = [_chain(self.networks[i]) for i in self.own]
        shared = self._run(chains[0], x, 0, self.num_shared) if self.num_shared else x
        if self._group is not None and shared.requires_grad:
            shared = sum_gradient(shared, self._group)
        for chain in chains:
            # Stages that work in place would change what the next peer is given.
            given = (
                shared.clone() if self.num_shared and len(self) > 1 and _in_place(chain, self.num_shared) else shared
            )
            features = chain.pool(self._run(chain, given, self.num_shared, len(chain.names)))
            outputs.features.append(features)
            outputs.logits.append(chain.classifier(features))
        return outputs

    def _run(self, chain: _Chain, x: Tensor, start: int, stop: int) -> Tensor:
        x = x if start else chain.prepare(x)
        if isinstance(chain.stages, StemSequential):
            return chain.stages.run(x, start, stop)
        for stage in list(chain.stages)[start:stop]:
            x = stage(x)
        return x

    def deploy(self, i: int) -> nn.Module:
        """Peer `i` as an ordinary network, which shares its parameters with this one; IndexError when there is none
        here."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"Peers.deploy: there is no peer {i}, expected 0 to {len(self) - 1}")
        if i % len(self) not in self.own:
            raise IndexError(
                f"Peers.deploy: peer {i} is on another process; here are {self.own[0]} to {self.own[-1]} (see spread)"
            )
        return self.networks[i]


def _in_place(chain: _Chain, start: int) -> bool:
    """Whether what follows the shared stages may write to what it is given; pooling may where nothing is between."""
    own = list(chain.stages)[start : len(chain.names)]
    return not own or any(getattr(module, "inplace", False) for module in own[0].modules())


def peers(model_fn: Callable[[], nn.Module], num_peers: int, share_until: str | None = None) -> Peers:
    """`num_peers` networks made by `model_fn`, each with its own initial weights, which share their first stages.

    Args:
        model_fn: makes one network: a `pyext.models.Backbone`, or an `nn.Sequential` whose last child is a linear
            classifier of features (B, F).
        num_peers: M.
        share_until: name of the last stage that is shared: a child of ``features``, or of the Sequential. None:
            independent peers.

    Raises:
        ValueError: a network of another kind, `num_peers` below 1, or a stage that there is not; the message lists the
            stages.
    """
    if num_peers < 1:
        raise ValueError(f"peers: num_peers is {num_peers}, expected at least 1")
    networks = [model_fn() for _ in range(num_peers)]
    if len({id(network) for network in networks}) != num_peers:
        raise ValueError("peers: model_fn returned the same network twice, expected a new one at each call")
    names = _chain(networks[0]).names
    if share_until is not None and share_until not in names:
        raise ValueError(f"peers: share_until is {share_until!r}, expected None or one of {', '.join(names)}")
    return Peers(networks, 0 if share_until is None else names.index(share_until) + 1)
