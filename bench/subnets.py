"""`python -m bench.subnets`: sub-networks of a small VGG on the digits, the speed of dissection and of switching.

A network is trained on the digits at 32x32 and dissected on its training images. Sub-networks by the atlas, by random
scores and by the size of filters, all of at most the same parameters, are compared on held-out images of their classes
with the whole network, whose other outputs are ignored. Every step is kept in the folder, so a stopped run goes on;
another folder begins anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine import facts
from pyext import subnet
from pyext.checkpoint import atomic_save, load_weights
from pyext.models import densenet40_12, hcgnet_a1, resnet32, vgg16
from pyext.subnet import selection
from pyext.subnet.dissection import Gated, Settings, find_gates
from pyext.subnet.pictures import draw_accuracy
from pyext.train.data import ImageData, load_data

RESULTS = Path(__file__).parent / "results"
WIDTHS = (32, 32, 64, 64, 128, 128)
KEEPS = (0.03, 0.05, 0.08, 0.11, 0.2, 0.35, 0.6, 1.0)
METHODS = ("atlas", "atlas, per layer", "atlas, mean", "random", "magnitude")
RECALIBRATED = ("atlas", "random", "magnitude")
KEEP = 0.11
OTHERS = ("whole", "random, recalibrated", "magnitude, recalibrated")
SWITCHED = {"VGG16-BN": vgg16, "ResNet-32": resnet32, "DenseNet-40-12": densenet40_12, "HCGNet-A1": hcgnet_a1}
"""Networks for images of 32x32 and 100 classes, as they are begun."""
SUBSETS = 20
"""Sub-tasks that are drawn for each number of classes between 2 and 10."""


class SmallVGG(nn.Sequential):
    """Six 3x3 convolutions with BN and ReLU, a max-pool after every second, mean, linear."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for i, (before, channels) in enumerate(itertools.pairwise((3, *WIDTHS))):
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i % 2 else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def normalised(data: ImageData, part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `part` without augmentation."""
    for images, labels in zip(part.images.split(128), part.labels.split(128), strict=True):
        yield data.preprocessing.normalise(images), labels


def trained(data: ImageData, epochs: int, seed: int, path: Path) -> nn.Module:
    """The network after `epochs` of Nesterov SGD with one cosine; read from `path` where it is there."""
    torch.manual_seed(seed)
    network = SmallVGG()
    if path.exists():
        return load_weights(network, path).eval()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        order = torch.randperm(len(data.train)).tolist()
        for start in range(0, len(order) - 63, 64):
            images, labels = data.train.__getitems__([(epoch, i) for i in order[start : start + 64]])  # type: ignore[misc]
            loss = F.cross_entropy(network(data.preprocessing.normalise(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)
    atomic_save(path, network.state_dict())
    return network.eval()


def group_scores(sub: subnet.Subnet, method: str, classes: Sequence[int], seed: int) -> np.ndarray:
    """The score of each channel group by `method`."""
    if method.startswith("atlas"):
        merged = selection.combined(sub.atlas, np.array(classes), "mean" if method == "atlas, mean" else "max")
    elif method == "random":
        random = np.random.default_rng([seed, *classes])
        merged = {layer: random.random(sums.shape[1]) for layer, sums in sub.atlas.sums.items()}
    else:  # mean size of a filter's weights, in units of its layer's mean, so that layers can be compared
        sizes = {
            layer: sub.network.get_submodule(layer).weight.detach().abs().mean((1, 2, 3)) for layer in sub.atlas.sums
        }
        merged = {layer: (size / size.mean()).numpy() for layer, size in sizes.items()}
    return selection.scores(sub.plan, merged, "max")


@torch.no_grad()
def accuracy(
    network: Callable[[Tensor], Tensor], data: ImageData, classes: Sequence[int], columns: Sequence[int]
) -> float:
    """Share of the held-out images of `classes` whose class has the largest of the logits in `columns`."""
    chosen = torch.isin(data.held_out.labels, torch.tensor(classes))
    images, labels = data.preprocessing.normalise(data.held_out.images[chosen]), data.held_out.labels[chosen]
    guesses = torch.tensor(classes)[network(images)[:, list(columns)].argmax(1)]
    return float((guesses == labels).double().mean())


def compare(sub: subnet.Subnet, data: ImageData, classes: Sequence[int], keep: float, seed: int) -> dict[str, Any]:
    """Accuracy of the whole network and of every method's sub-network on one sub-task."""
    record: dict[str, Any] = {"classes": list(classes), "keep": keep, "seed": seed}
    record["whole"] = accuracy(sub.network, data, classes, classes)
    for method in METHODS:
        sub.select(classes, group_choice(sub, method, classes, keep, seed))
        kept, whole = sub.summary().parameters
        record[method], record[f"{method}: parameters"] = (
            accuracy(sub, data, classes, range(len(classes))),
            kept / whole,
        )
    return record


def group_choice(sub: subnet.Subnet, method: str, classes: Sequence[int], keep: float, seed: int) -> np.ndarray:
    """The channel groups that `method` keeps."""
    scope = "layer" if method == "atlas, per layer" else "global"
    return selection.choose(sub.plan, group_scores(sub, method, classes, seed), np.array(classes), keep, scope)


def add_recalibrated(sub: subnet.Subnet, data: ImageData, records: list[dict[str, Any]]) -> None:
    """To `records` of 11 %: accuracies with batch norm's statistics measured on 256 training images of the classes."""
    for record in records:
        if record["keep"] != KEEP:
            continue
        classes = record["classes"]
        own = torch.isin(data.train.labels, torch.tensor(classes)).nonzero().flatten()[:256]
        images = data.preprocessing.normalise(data.train.images[own])  # type: ignore[union-attr]
        for method in RECALIBRATED:
            sub.select(classes, group_choice(sub, method, classes, KEEP, record["seed"]))
            small = subnet.recalibrate(sub.materialize(), [images])
            record[f"{method}, recalibrated"] = accuracy(small, data, classes, range(len(classes)))


def tasks(seed: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Sub-tasks and kept shares: all pairs at every share; subsets of 3, of 5 and all 10 classes at 11 %."""
    pairs = list(itertools.combinations(range(10), 2))
    for keep in KEEPS:
        yield from ((pair, keep) for pair in pairs)
    random = np.random.default_rng(seed)
    for size in (3, 5):
        subsets = [tuple(sorted(random.permutation(10)[:size].tolist())) for _ in range(SUBSETS)]
        yield from ((chosen, KEEP) for chosen in subsets)
    yield tuple(range(10)), KEEP


def experiment(folder: Path, epochs: int, seeds: int) -> list[dict[str, Any]]:
    """The records of all sub-tasks of `seeds` networks; each seed's is kept in `folder`."""
    data, records = load_data("digits", None, 32), []
    for seed in range(seeds):
        network = trained(data, epochs, seed, folder / f"network{seed}.pt")
        print(f"seed {seed}: held-out accuracy {accuracy(network, data, range(10), range(10)):.2%}", flush=True)
        start, checkpoint = time.perf_counter(), folder / f"dissection{seed}.pt"
        atlas = subnet.dissect(network, normalised(data, data.train), 10, checkpoint=checkpoint)
        print(
            f"seed {seed}: {int(atlas.counts.sum())} images dissected, {time.perf_counter() - start:.0f} s", flush=True
        )
        atlas.save(folder / f"atlas{seed}.safetensors")
        sub = subnet.reconstruct(network, atlas, range(10), keep=1.0)
        path = folder / f"records{seed}.json"
        if not path.exists():
            own = [compare(sub, data, classes, keep, seed) for classes, keep in tasks(seed)]
            add_recalibrated(sub, data, own)
            path.write_text(json.dumps(own))
        records += json.loads(path.read_text())
        print(f"seed {seed}: {len(records)} sub-tasks", flush=True)
    return records


def published_loop(network: nn.Module, images: Tensor, frozen: bool, steps: int = 30) -> Tensor:
    """The published form: image after image, a gate behind every batch norm, SGD on the gates; (B, channels).

    `frozen` spares it the gradients of the weights, which the published program computes and does not use.
    """
    network.requires_grad_(not frozen)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    found = []
    for image in images.split(1):
        with torch.no_grad():
            target = network(image).softmax(1)
        gates = [image.new_ones(1, norm.num_features, 1, 1).requires_grad_() for norm in norms]
        hooks = [
            n.register_forward_hook(lambda m, i, y, gate=gate: y * gate) for n, gate in zip(norms, gates, strict=True)
        ]
        optimizer = torch.optim.SGD(gates, 0.1, momentum=0.9)
        lowest, best = float("inf"), None
        for step in range(steps + 1):
            logits = network(image)
            loss = -(target * logits.log_softmax(1)).sum() + 0.05 * sum(gate.abs().sum() for gate in gates)
            if loss.item() < lowest and logits.argmax() == target.argmax():
                lowest, best = loss.item(), torch.cat([gate.detach().flatten() for gate in gates])
            if step < steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for gate in gates:
                    gate.data.clamp_(0, 5)
        for hook in hooks:
            hook.remove()
        found.append(best)
    network.requires_grad_(True).zero_grad()
    return torch.stack(found)


def speed(network: nn.Module, images: Tensor, rounds: int = 3, per_image: int = 4) -> dict[str, Any]:
    """Images per second, contenders in turn: medians over `rounds`. All find the same gates (asserted in float64)."""
    few, traced = images[:per_image], subnet.plan(network, tuple(images.shape[1:]))
    double = type(network)()
    double.load_state_dict(network.state_dict())
    double = double.double().eval()
    ours = find_gates(Gated(subnet.plan(double, traced.input_shape)), few.double(), Settings())
    torch.testing.assert_close(ours, published_loop(double, few.double(), True), rtol=1e-9, atol=1e-9)
    contenders: dict[str, tuple[int, Callable[[], Any]]] = {
        "published loop": (per_image, lambda: published_loop(network, few, False)),
        "loop, weights frozen": (per_image, lambda: published_loop(network, few, True)),
    }
    gated = Gated(traced)
    for batch in (1, 16, 64, 128):
        contenders[f"dissect, batch {batch}"] = (
            batch,
            lambda batch=batch: find_gates(gated, images[:batch], Settings()),
        )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (count, run) in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def dissection_work(network: nn.Module, size: int, steps: int = 30) -> float:
    """Floating-point operations of one image's dissection: forward each step and once more, backward to the maps."""
    traced = subnet.plan(network, (3, size, size))
    rows = selection.costs(traced, np.ones(len(traced.fixed), dtype=bool))
    forward = sum(row.multiply_adds for row in rows)
    return 2 * ((steps + 1) * forward + steps * (forward - rows[0].multiply_adds))  # nobody asks for the images' own


def switching(network: nn.Module, size: int, count: int = 200) -> dict[str, float]:
    """Microseconds, medians over `count` pairs of classes that come for the first time, by a drawn atlas."""
    generator, traced = torch.Generator().manual_seed(0), subnet.plan(network, (3, size, size))
    classes = len(traced.classes)
    widths = {layer: len(traced.groups_of(layer)) for layer in traced.gates}
    sums = {layer: torch.randint(2**37, (classes, width), generator=generator) for layer, width in widths.items()}
    seen = torch.ones(classes, dtype=torch.int64)
    atlas = subnet.Atlas(sums, seen, subnet.fingerprint(network), traced.input_shape, {})
    sub = subnet.reconstruct(network, atlas, [0, 1])
    found: dict[str, list[float]] = {"scores": [], "choice": [], "switch": [], "switch back": []}
    for pair in list(itertools.combinations(range(classes), 2))[-count:]:
        last = sub.classes
        start = time.perf_counter()
        scores = selection.class_scores(sub.plan, atlas, np.array(pair), "max")
        scored = time.perf_counter()
        selection.choose(sub.plan, scores, np.array(pair), KEEP, "global")
        chosen = time.perf_counter()
        sub.switch(pair, keep=KEEP)
        switched = time.perf_counter()
        sub.switch(last, keep=KEEP)
        back = time.perf_counter()
        sub.switch(pair, keep=KEEP)
        times = (scored - start, chosen - scored, switched - chosen, back - switched)
        for values, seconds in zip(found.values(), times, strict=True):
            values.append(1e6 * seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def mean(records: Sequence[dict[str, Any]], key: str, size: int, keep: float) -> float:
    """Over the sub-tasks of `size` classes at the share `keep`, in per cent."""
    return 100 * statistics.mean(r[key] for r in records if len(r["classes"]) == size and r["keep"] == keep)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per number of classes and kept share; mean accuracy of every method."""
    heads = ["classes", "sub-tasks", "parameters at most, %", "whole network", *METHODS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for size, keep in sorted({(len(r["classes"]), r["keep"]) for r in records}):
        count = sum(len(r["classes"]) == size and r["keep"] == keep for r in records)
        cells = [f"{mean(records, key, size, keep):.2f}" for key in ("whole", *METHODS)]
        lines.append(f"| {size} | {count} | {100 * keep:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recalibrated_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per number of classes, at 11 %, with batch norm's statistics measured anew."""
    lines = ["| classes | whole network | " + " | ".join(RECALIBRATED) + " |", "|---|---|" + "---|" * len(RECALIBRATED)]
    for size in sorted({len(r["classes"]) for r in records}):
        keys = ("whole", *(f"{method}, recalibrated" for method in RECALIBRATED))
        lines.append(f"| {size} | {' | '.join(f'{mean(records, key, size, KEEP):.2f}' for key in keys)} |")
    return "\n".join(lines)


def against(records: Sequence[dict[str, Any]], other: str) -> str:
    """On how many pairs at 11 %, recalibrated, the atlas is better than, equal to and worse than `other`."""
    gains = [r["atlas, recalibrated"] - r[other] for r in records if len(r["classes"]) == 2 and r["keep"] == KEEP]
    return f"{sum(g > 0 for g in gains)} better, {sum(g == 0 for g in gains)} equal, {sum(g < 0 for g in gains)} worse"


def report(saved: dict[str, Any]) -> str:
    """The whole Markdown file."""
    records, found = saved["records"], saved["speed"]["images_per_second"]
    pairs = "; ".join(f"{other}: {against(records, other)}" for other in OTHERS)
    kept = max(100 * r["atlas: parameters"] for r in records if len(r["classes"]) == 2 and r["keep"] == KEEP)
    rows = "\n".join(
        f"| {name} | {rate:.2f} | {rate / found['published loop']:.1f} | {rate / found['loop, weights frozen']:.1f} |"
        for name, rate in found.items()
    )
    work = dissection_work(SmallVGG().eval(), 32) / 1e9
    fastest, twenty = work * max(found.values()), 20 * work * found["published loop"]
    about = saved["switching"]
    switches = "\n".join(
        f"| {name} | {' | '.join(f'{value:.0f}' for value in row.values())} |"
        for name, row in about["microseconds"].items()
    )
    return f"""# Sub-networks on the digits

`python -m bench.subnets`, {saved["machine"]["date"]}, {saved["machine"]["CPU"]}. Six convolutions of {WIDTHS} channels,
images of 32x32, {saved["epochs"]} epochs, {len({r["seed"] for r in records})} seeds, dissected on the training images.
Top-1 in per cent on the held-out images of a sub-task's classes, mean over sub-tasks and seeds; the whole network's
other outputs are ignored. Equal budgets: no method has more than the share of the parameters (at 11 %: {kept:.2f} % at
most by the atlas). No weight is trained after the reconstruction.

{table(records)}

At 11 %, with batch norm's statistics measured anew on 256 training images of the classes (`pyext.subnet.recalibrate`):

{recalibrated_table(records)}

There, on pairs, the atlas is against {pairs}.

![accuracy against size](subnets_digits.png)

## Speed of dissection

The same network, 30 steps, {saved["speed"]["threads"]} thread(s), contenders in turn, medians.
Where other programs run, ratios of 10 to 20 were seen, since the loop suffers more; this table is of a quiet machine.
Ratios are to the published form (image after image; it computes the weights' gradients and does not use them) and to
the same loop with frozen weights. All find the same gates (float64, 1e-9).

What bounds it is arithmetic: an image takes {work:.2f} GFLOP (31 times forward, 30 times backward, without the weights'
gradients). The fastest row computes {fastest:.0f} GFLOP/s, elementwise work beside it. Twenty times the loop
would be {twenty:.0f}, to be compared with the float32 roof of the machine of this table.

| | images/s | x published loop | x loop, weights frozen |
|---|---|---|---|
{rows}

## Switching

To another pair of classes at 11 %, {about["threads"]} thread(s), {about["CPU"]}, load {about["load"]:.1f}: in us,
medians over pairs that come for the first time. Scores and choice are part of the switch; the rest prepares the layers.
Weights are gathered by the first image.

| | scores | choice | switch | switch back |
|---|---|---|---|---|
{switches}
"""


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy on pairs against the kept share."""
    curves = {key: [(k, mean(records, key, 2, k) / 100) for k in KEEPS] for key in ("whole", *METHODS)}
    draw_accuracy(curves, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.subnets", description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/subnets"), help="networks and atlases (%(default)s)")
    parser.add_argument(
        "--only", choices=["experiment", "speed", "switching", "tables"], help="the rest is read from the records"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.output / "subnets_digits.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if options.only in (None, "experiment"):
        saved["records"] = experiment(options.folder, options.epochs, options.seeds)
        saved |= {"epochs": options.epochs, "machine": facts(torch.device("cpu"))}
        path.write_text(json.dumps(saved, indent=1) + "\n")
    if options.only in (None, "speed"):
        data = load_data("digits", None, 32)
        network = trained(data, options.epochs, 0, options.folder / "network0.pt")
        images = data.preprocessing.normalise(data.train.images[:128])  # type: ignore[union-attr]
        saved["speed"] = {"threads": options.threads, "images_per_second": speed(network, images)}
        path.write_text(json.dumps(saved, indent=1) + "\n")
    if options.only in (None, "switching"):
        found = {name: switching(build().eval(), 32) for name, build in SWITCHED.items()}
        about = {"threads": options.threads, "CPU": facts(torch.device("cpu"))["CPU"], "load": os.getloadavg()[0]}
        saved["switching"] = {**about, "microseconds": found}
        path.write_text(json.dumps(saved, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(saved))
    plot(saved["records"], path.with_suffix(".png"))
    print(table(saved["records"]))


if __name__ == "__main__":
    main()
