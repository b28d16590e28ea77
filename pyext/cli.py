"""The `pyext` command: train, eval, predict, dissect, reconstruct, demo, doctor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pyext import cli_subnet as subnet_commands

_TRAIN_HELP = """
hcgnet: defaults are the paper's recipe for CIFAR (SGD with Nesterov momentum, cosine restarts, mixup, DropBlock); with
--data imagenet they are the published ImageNet code's (630 epochs, learning rate 0.1 per 256 images, weight decay 4e-5,
mixup 0.4, label smoothing 0.1, AutoAugment). The published CIFAR runs of A3 start the schedule anew after 630 epochs:
--repeat-at 630.

mcl-okd: several networks learn together, online distillation with contrast between them (arXiv 2006.04093): SGD with
momentum, one cosine, cross-entropy of each, the last taught by the mean of all, 0.025 times the contrast over memory
banks. A part of the training images (--validation) selects the peer to deploy, whose weights are exported each epoch;
summary.json has every peer's and the ensemble's accuracy on the held-out images after the last one. Its --epochs fix
the learning rates, so a finished run is not made longer.

Several processes and machines: `torchrun --nproc-per-node 8 -m pyext train hcgnet ...`. --batch-size counts all images
of a step together. Batch norm uses each process's own share of the batch, and the first process's running statistics
are kept; --sync-bn normalises over all processes with torch's SyncBatchNorm, for which the fused gates step aside.
mcl-okd --spread-peers instead gives each process some of the peers and the whole batch: as one process would train
them. Its checkpoints are the same, so a run can go on with or without it.

A run that was stopped, by Ctrl-C or kill -9, continues with --resume as if it had not been: on the CPU with the same
number of threads the losses are the same bit for bit (CUDA's own kernels may add in another order each time).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for a failed run, 2 for a wrong command, 130 when stopped.

    Where it has joined other processes (torchrun), it ends this one with that status instead, and not through Python's
    own end: gloo's threads outlive the process group, and one that lets go of a tensor meanwhile aborts (torch 2.11).
    """
    status = _main(arguments)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _main(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] == ["eval", "few-shot"]:  # `pyext eval CHECKPOINT` leaves argparse no place for a command below eval
        words[:2] = ["eval few-shot"]
    options = _parser().parse_args(words)
    from pyext.checkpoint import CheckpointError
    from pyext.train.errors import UserError
    from pyext.train.loop import Interrupted

    try:
        options.run(options)
    except UserError as error:
        return _fail(str(error), 2 if error.usage else 1)
    except (CheckpointError, OSError) as error:  # OSError: a disk that is full, a folder that cannot be written
        return _fail(str(error), 1)
    except Interrupted as stop:
        return _fail(str(stop), 130)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"pyext: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyext", description="Efficient vision networks with fused kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_few_shot(commands)
    _add_predict(commands)
    subnet_commands.add(commands)
    demo = commands.add_parser("demo", help="train a small HCGNet with plain torch and with pyext, and compare")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for logs and plot (%(default)s)")
    demo.add_argument("--epochs", type=_positive, default=10, help="epochs of each training (%(default)s)")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="what this installation has, and what it lacks and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="train a network", epilog=_TRAIN_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    train.add_argument("system", choices=["hcgnet", "mcl-okd"], help="what to train, by its paper's recipe")
    archs = "a1, a2, a3 (CIFAR), b, c (ImageNet), tiny, resnet32, resnet110, vgg16 or densenet40-12 (%(default)s)"
    train.add_argument("--arch", default="a1", help=archs)
    _add_data(train, default="cifar10")
    train.add_argument("--image-size", type=_positive, help="side of the images (digits 32, folders 224)")
    recipe = train.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=_positive, help="(hcgnet 1270, mcl-okd 300)")
    recipe.add_argument("--batch-size", type=_positive, help="images per step (hcgnet 128, mcl-okd 64)")
    recipe.add_argument(
        "--lr", type=_number(0), dest="learning_rate", help="at the start and after a restart (0.1, 0.05)"
    )
    recipe.add_argument("--weight-decay", type=_number(0), help="(1e-4, 5e-4)")
    recipe.add_argument("--momentum", type=_number(0, 1), help="(0.9), Nesterov's for hcgnet")
    recipe = train.add_argument_group("recipe of hcgnet")
    recipe.add_argument("--period", type=_positive, help="epochs until the first restart; doubles after each (10)")
    recipe.add_argument("--repeat-at", type=_positive, metavar="EPOCH", help="start the schedules anew at this epoch")
    recipe.add_argument("--mixup", type=_number(0), metavar="ALPHA", help="0 switches mixup off (1)")
    recipe.add_argument("--label-smoothing", type=_number(0, 1), help="(0)")
    recipe.add_argument("--no-drop-block", action="store_false", dest="drop_block", default=None)
    _add_distillation(train.add_argument_group("recipe of mcl-okd"))
    run = train.add_argument_group("run")
    run.add_argument("--seed", type=_count, default=0)
    run.add_argument("--amp", choices=["off", "bf16"], default="off", help="bf16: automatic mixed precision")
    run.add_argument("--plain", action="store_true", help="without pyext's kernels, for comparison")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    run.add_argument("--workers", type=_count, default=0, help="data-loading processes (%(default)s)")
    run.add_argument("--sync-bn", action="store_true", help="batch norm over all processes (see below)")
    run.add_argument("--output", type=Path, help="folder of the run (runs/ARCH-DATA, mcl-okd: runs/METHOD-ARCH-DATA)")
    run.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    run.add_argument("--save-every", type=_count, default=0, metavar="STEPS", help="besides every epoch")
    run.add_argument("--log-every", type=_positive, default=50, metavar="STEPS", help="rows of steps.csv (%(default)s)")
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events, if it is installed")
    train.set_defaults(run=_train)


def _add_distillation(recipe: Any) -> None:
    recipe.add_argument("--peers", type=_positive, dest="num_peers", metavar="M", help="networks trained together (4)")
    recipe.add_argument(
        "--method",
        help="mcl-okd, kd (the same without contrast), dml (deep mutual learning) or independent (mcl-okd)",
    )
    recipe.add_argument(
        "--share-until",
        metavar="STAGE",
        help="last stage that peers share, or none (the network's first; none for dml and independent)",
    )
    recipe.add_argument("--contrast", help="bank: over memory banks; batch: within the batch; none (bank)")
    recipe.add_argument("--contrast-weight", type=_number(0), help="(bank 0.025; batch 1, times each term's)")
    recipe.add_argument(
        "--negatives", type=_positive, dest="num_negatives", metavar="K", help="(16384; 256 for fewer images than that)"
    )
    recipe.add_argument("--embedding-dim", type=_positive, help="(128)")
    recipe.add_argument(
        "--validation", type=_number(0, 1), metavar="SHARE", help="training images that select the deployed peer (0.1)"
    )
    recipe.add_argument(
        "--spread-peers", action="store_true", default=None, help="over the processes, under torchrun (see below)"
    )


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="accuracy of a checkpoint on held-out images")
    _add_checkpoint(evaluate)
    _add_data(evaluate, default=None)
    evaluate.add_argument("--batch-size", type=_positive, default=128)
    evaluate.add_argument("--workers", type=_count, default=0)
    subnet_commands.add_to_eval(evaluate)
    evaluate.set_defaults(run=_eval)


def _add_few_shot(commands: Any) -> None:
    few_shot = commands.add_parser(
        "eval few-shot",
        help="accuracy of N-way K-shot episodes on frozen features",
        epilog="Classes are those of the held-out images of --data: a folder of other classes than the network was "
        "trained on makes them novel; the training data's own classes are not.",
    )
    _add_checkpoint(few_shot)
    _add_data(few_shot, default=None)
    few_shot.add_argument("--batch-size", type=_positive, default=128)
    few_shot.add_argument("--ways", type=_positive, default=5, help="classes of an episode (%(default)s)")
    few_shot.add_argument("--shots", type=_positive, default=1, help="labelled images of each (%(default)s)")
    few_shot.add_argument("--queries", type=_positive, default=15, help="other images of each (%(default)s)")
    few_shot.add_argument("--episodes", type=_positive, default=600, dest="count", metavar="EPISODES", help="(600)")
    few_shot.add_argument("--probe", choices=["centroid", "linear"], default="centroid", help="(%(default)s)")
    few_shot.add_argument("--raw", action="store_false", dest="normalise", help="features at their own length")
    few_shot.add_argument("--seed", type=_count, default=0)
    few_shot.set_defaults(run=_few_shot)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="most probable classes of image files")
    _add_checkpoint(predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    _add_data(predict, default=None)
    predict.add_argument("--top", type=_positive, default=3, help="classes to print (%(default)s)")
    predict.set_defaults(run=_predict)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a run's folder, last.pt, model.safetensors or published weights")
    parser.add_argument("--arch", help="only for weights that `pyext train` did not write; --data names their classes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plain", action="store_true", help="without pyext's kernels")


def _add_data(parser: argparse.ArgumentParser, default: str | None) -> None:
    stated = default or "what the checkpoint was trained on"
    parser.add_argument(
        "--data",
        default=default,
        help=f"digits, cifar10, cifar100, imagenet or a folder with train/CLASS/IMAGE and val/CLASS/IMAGE ({stated})",
    )
    parser.add_argument("--data-dir", type=Path, help="where CIFAR is kept (data) or ImageNet lies (data/imagenet)")


def _number(low: float, high: float = float("inf")) -> Any:
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return number


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _train(options: argparse.Namespace) -> None:
    from pyext.train.loop import Settings, Trainer

    options.recipe = _recipe(options)
    prefix = "" if options.system == "hcgnet" else f"{options.recipe.method}-"
    options.output = options.output or Path("runs") / f"{prefix}{options.arch}-{Path(options.data).name}"
    Trainer(Settings(**{option.name: getattr(options, option.name) for option in fields(Settings)})).run()


_FLAGS = {"num_peers": "--peers", "num_negatives": "--negatives", "drop_block": "--no-drop-block"}
"""Options that are not called as the recipe's field."""


def _recipe(options: argparse.Namespace) -> Any:
    """The system's recipe with what was given in place of its defaults; UserError for an option of the other one."""
    from pyext.distill.recipe import DistillationRecipe
    from pyext.train.errors import UserError
    from pyext.train.recipe import Recipe

    recipes: dict[str, Any] = {"hcgnet": Recipe(), "mcl-okd": DistillationRecipe()}
    names = {system: [field.name for field in fields(recipe)] for system, recipe in recipes.items()}
    given = {
        name: value
        for name in {*names["hcgnet"], *names["mcl-okd"]}
        if (value := getattr(options, name, None)) is not None
    }
    wrong = sorted(name for name in given if name not in names[options.system])
    if wrong:
        flags = ", ".join(_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in wrong)
        raise UserError(f"{flags}: no part of the recipe of {options.system}.", usage=True)
    recipe = recipes[options.system]
    if options.system == "hcgnet" and options.data == "imagenet":
        recipe = Recipe.for_imagenet(given.get("batch_size", recipe.batch_size))
    return replace(recipe, **given)


def _eval(options: argparse.Namespace) -> None:
    from pyext.train import evaluation
    from pyext.train.networks import kernels

    if subnet_commands.asked(options):
        subnet_commands.evaluate(options)
        return
    device = evaluation.choose_device(options.device)
    network, card = evaluation.open_network(options.checkpoint, options.arch, options.data, options.data_dir)
    images = evaluation.held_out(card, options.data, options.data_dir)
    with kernels(options.plain):
        scores, speed = evaluation.evaluate_data(
            network.to(device), card, images, device, options.batch_size, options.workers
        )
    print(
        f"{type(network).__name__} {card.arch} on {len(images.held_out)} held-out images of {images.name}: "
        f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f}, {speed:.0f} images/s on {device}"
    )


def _few_shot(options: argparse.Namespace) -> None:
    from pyext.train import evaluation
    from pyext.train.data import load_data
    from pyext.train.few_shot import Episodes, evaluate, held_out_features
    from pyext.train.networks import kernels

    episodes = Episodes(**{field.name: getattr(options, field.name) for field in fields(Episodes)})
    device = evaluation.choose_device(options.device)
    network, card = evaluation.open_network(options.checkpoint, options.arch, options.data, options.data_dir)
    images = load_data(options.data or card.data, options.data_dir, card.preprocessing.image_size)
    with kernels(options.plain):
        found = held_out_features(network.to(device), images, card.preprocessing, device, options.batch_size)
    scores = evaluate(*found, episodes)
    print(
        f"{episodes.ways}-way {episodes.shots}-shot, {episodes.count} episodes, {episodes.probe} probe, {images.name}: "
        f"accuracy {scores.mean:.2%} ± {scores.interval:.2%} (95 % confidence)"
    )


def _predict(options: argparse.Namespace) -> None:
    from pyext.train import evaluation
    from pyext.train.networks import kernels

    device = evaluation.choose_device(options.device)
    network, card = evaluation.open_network(options.checkpoint, options.arch, options.data, options.data_dir)
    with kernels(options.plain):
        predictions = evaluation.predict(network.to(device), card, options.images, device, options.top)
    for file, classes in zip(options.images, predictions, strict=True):
        print(f"{file}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in classes))


def _demo(options: argparse.Namespace) -> None:
    from pyext.train import demo

    demo.run(options.output, options.epochs)


def _doctor(_: argparse.Namespace) -> None:
    from pyext import doctor

    print(doctor.report())
