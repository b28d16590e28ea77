"""`pyext dissect`, `pyext reconstruct` and `pyext eval --classes`: their options, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DISSECT_HELP = """
Finds for every training image which channels the network needs for it (DRNet, arXiv 1911.08691), and keeps each class's
sums in an atlas. A run that was stopped goes on where it was, at most one batch back. Several processes: run each with
its own --shard, 0/4 to 3/4, and its own --output; `reconstruct` and `eval` take all of them together.
"""


def add(commands: Any) -> None:
    """The commands dissect and reconstruct."""
    dissect = commands.add_parser("dissect", help="find which channels each class needs", epilog=_DISSECT_HELP)
    _add_network(dissect)
    dissect.add_argument("--output", type=Path, required=True, help="the atlas, a file that ends with .safetensors")
    dissect.add_argument("--picture", type=Path, help="PNG: importance by class and channel, overlap of classes")
    dissect.add_argument("--steps", type=int, default=30, help="updates of each image's gates (%(default)s)")
    dissect.add_argument("--lr", type=float, default=0.1, help="(%(default)s)")
    dissect.add_argument("--momentum", type=float, default=0.9, help="(%(default)s)")
    dissect.add_argument("--sparsity", type=float, default=0.05, help="weight of the sum of gates (%(default)s)")
    dissect.add_argument("--patience", type=int, help="an image is finished so many steps after its best (never)")
    dissect.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="every N-th batch from I on alone")
    dissect.set_defaults(run=_dissect)

    reconstruct = commands.add_parser("reconstruct", help="a sub-network for some classes, and what it costs")
    _add_network(reconstruct)
    _add_selection(reconstruct, required=True)
    reconstruct.add_argument("--output", type=Path, help="export the small network: .onnx, or .pt2 for torch.export")
    reconstruct.set_defaults(run=_reconstruct)


def add_to_eval(evaluate: argparse.ArgumentParser) -> None:
    """The options of `eval` that ask for some classes."""
    group = evaluate.add_argument_group("some classes alone")
    _add_selection(group, required=False)
    group.add_argument("--picture", type=Path, help="PNG: accuracy against kept parameters (needs --atlas)")


def _add_network(parser: argparse.ArgumentParser) -> None:
    from pyext.cli import _add_checkpoint, _add_data, _count, _positive

    _add_checkpoint(parser)
    _add_data(parser, default=None)
    parser.add_argument("--batch-size", type=_positive, default=128)
    parser.add_argument("--workers", type=_count, default=0)


def _add_selection(parser: Any, required: bool) -> None:
    parser.add_argument("--classes", required=required, help="names or numbers, such as 3,5")
    parser.add_argument("--atlas", type=Path, nargs="+", required=required, help="by `pyext dissect`, or its shards")
    parser.add_argument("--keep", type=float, default=0.11, help="share of the parameters (%(default)s)")
    parser.add_argument("--threshold", type=float, help="instead: importance from which on a channel is kept")
    parser.add_argument("--scope", choices=["global", "layer"], default="global", help="(%(default)s)")
    parser.add_argument("--combine", choices=["max", "mean"], default="max", help="importances (%(default)s)")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I below N, such as 0/4")
    return int(index), int(count)


def _source(options: argparse.Namespace) -> Any:
    from pyext.subnet.commands import Source
    from pyext.train import evaluation

    device = evaluation.choose_device(options.device)
    network, card = evaluation.open_network(options.checkpoint, options.arch, options.data, options.data_dir)
    data = evaluation.held_out(card, options.data, options.data_dir)
    return Source(network.to(device), card, data, device, options.batch_size, options.workers)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("keep", "threshold", "scope", "combine")}


def _dissect(options: argparse.Namespace) -> None:
    from pyext.subnet import commands

    source = _source(options)
    settings = {name: getattr(options, name) for name in ("steps", "lr", "momentum", "sparsity", "patience")}
    atlas = commands.dissect_to(source, options.output, options.shard, options.picture, settings)
    channels = sum(sums.shape[1] for sums in atlas.sums.values())
    print(
        f"{options.output}: {int(atlas.counts.sum())} images of {int((atlas.counts > 0).sum())} classes, "
        f"{channels} channels in {len(atlas.layers)} layers"
    )


def _reconstruct(options: argparse.Namespace) -> None:
    from pyext.subnet import commands

    source = _source(options)
    classes = commands.class_numbers(options.classes, source.card)
    subnet = commands.build(source.network, commands.open_atlas(options.atlas), classes, _settings(options))
    print(subnet.summary())
    print("outputs: " + ", ".join(f"{column} {source.card.classes[c]}" for c, column in subnet.labels.items()))
    if options.output is not None:
        commands.write(subnet, options.output)


def asked(options: argparse.Namespace) -> bool:
    """Whether `pyext eval` was asked for some classes alone; UserError where what it then needs is missing."""
    from pyext.train.errors import UserError

    if options.classes is None and (options.atlas or options.picture):
        raise UserError("--atlas and --picture need --classes.", usage=True)
    if options.picture is not None and not options.atlas:
        raise UserError("--picture needs --atlas.", usage=True)
    return options.classes is not None


def evaluate(options: argparse.Namespace) -> None:
    """Accuracy on the held-out images of some classes: of the whole network, and of the sub-network of an atlas."""
    from pyext.subnet import commands
    from pyext.train.networks import kernels

    source = _source(options)
    classes = commands.class_numbers(options.classes, source.card)
    names = ", ".join(source.card.classes[c] for c in classes)
    with kernels(options.plain):
        whole = commands.score(source, commands.restricted(source.network, classes), classes)
        print(f"classes {names}, {int(whole.sums[3])} held-out images of {source.data.name}")
        print(f"whole network: top-1 {whole.top1:.2%}, loss {whole.loss:.4f}")
        if not options.atlas:
            return
        subnet = commands.build(source.network, commands.open_atlas(options.atlas), classes, _settings(options))
        scores, (kept, count) = commands.score(source, subnet, classes), subnet.summary().parameters
        print(f"sub-network: top-1 {scores.top1:.2%}, loss {scores.loss:.4f}, {kept / count:.1%} of the parameters")
        if options.picture is not None:
            commands.accuracy_curve(source, subnet, classes, _settings(options), options.picture)
