"""`python -m bench.distill`: peers on the digits against the same network trained alone, over five seeds.

Every training is a `pyext train mcl-okd` process of its own; equal seeds share split, batches and initial weights. The
scores are top-1 on held-out images that neither trained nor selected anything.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import facts
from pyext.train.data import load_data

RESULTS = Path(__file__).parent / "results"
ARCH, DATA, IMAGE_SIZE, EPOCHS, SEEDS = "tiny", "digits", 8, 15, 5
RUNS = {
    "alone": ["--method", "independent", "--peers", "1"],
    "4 independent": ["--method", "independent"],
    "4 by DML": ["--method", "dml"],
    "4 by KD from the ensemble": ["--method", "kd"],
    "4 by MCL-OKD": ["--method", "mcl-okd"],
    "4 by MCL-OKD, contrast in the batch": ["--method", "mcl-okd", "--contrast", "batch"],
}


def command(options: Sequence[str], seed: int, epochs: int, output: Path) -> list[str]:
    """One training."""
    fixed = ["--arch", ARCH, "--data", DATA, "--image-size", str(IMAGE_SIZE), "--device", "cpu"]
    run = ["--epochs", str(epochs), "--seed", str(seed), "--output", str(output)]
    return [sys.executable, "-m", "pyext", "train", "mcl-okd", *fixed, *options, *run]


def measure(runs: Sequence[str], seeds: int, epochs: int, folder: Path) -> list[dict[str, Any]]:
    """A record per run and seed; seeds outermost, so that whatever else the machine does meets every run alike."""
    records = []
    for seed in range(seeds):
        for name, options in ((run, RUNS[run]) for run in runs):
            output, start = folder / f"{name.replace(' ', '-')}-{seed}", time.perf_counter()
            subprocess.run(command(options, seed, epochs, output), check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((output / "summary.json").read_text())
            with open(output / "epochs.csv", newline="") as file:
                curve = [float(row["validation_ensemble"]) for row in csv.DictReader(file)]
            seconds = round(time.perf_counter() - start, 1)
            kept = {key: summary[key] for key in ("top1", "ensemble_top1", "peers_top1", "deployed_peer")}
            records.append({"run": name, "seed": seed, **kept, "validation_ensemble": curve, "seconds": seconds})
            print(f"seed {seed}, {name}: deployed {summary['top1']:.2%}, ensemble {summary['ensemble_top1']:.2%}")
    return records


def of(records: Sequence[dict[str, Any]], run: str, score: str) -> list[float]:
    """The `score` of `run` in per cent, in the order of the seeds."""
    return [100 * record[score] for record in records if record["run"] == run]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f}"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per run, with the paired difference of each from the network trained alone."""
    lines = [
        "| run | deployed peer | minus alone | mean of peers | ensemble | minus alone | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = of(records, "alone", "top1")
    for run in RUNS:
        deployed, ensemble = of(records, run, "top1"), of(records, run, "ensemble_top1")
        peers = [100 * statistics.mean(r["peers_top1"]) for r in records if r["run"] == run]
        gains = [spread([a - b for a, b in zip(x, alone, strict=True)], "+") for x in (deployed, ensemble)]
        own = [spread(deployed), gains[0], spread(peers), spread(ensemble), gains[1]]
        seconds = statistics.median(r["seconds"] for r in records if r["run"] == run)
        cells = [own[0], *["-"] * 4] if run == "alone" else own
        lines.append(f"| {run} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def report(saved: dict[str, Any]) -> str:
    """The whole Markdown file."""
    records, held_out = saved["records"], len(load_data(DATA, None, IMAGE_SIZE).held_out)
    seeds = len({record["seed"] for record in records})
    return f"""# Online distillation on the digits

`python -m bench.distill`, {saved["machine"]["date"]}, {saved["machine"]["CPU"]}. Network {ARCH}, images of
{IMAGE_SIZE}x{IMAGE_SIZE}, {saved["epochs"]} epochs, {seeds} seeds, else the defaults of `pyext train mcl-okd`. Top-1 in
per cent on {held_out} held-out images (one image is {100 / held_out:.2f}), mean and standard deviation over the seeds;
differences are paired by seed. The deployed peer is the best on a tenth of the training images, on which no run trains.
Seconds are medians of whole processes, with whatever else the machine did.

{table(records)}

![validation accuracy](distill_digits.png)
"""


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Validation accuracy of each run's ensemble by epoch, mean over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run in RUNS:
        curves = [record["validation_ensemble"] for record in records if record["run"] == run]
        means = [100 * statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(range(1, len(means) + 1), means, label=run)
    axes.set(xlabel="epoch", ylabel="validation top-1 of the ensemble, %", ylim=(60, 100))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --tables write the table and picture anew from the records."""
    parser = argparse.ArgumentParser(prog="python -m bench.distill", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--run", choices=RUNS, help="measure this one alone, and keep the others' records")
    parser.add_argument("--tables", action="store_true", help="from the records of the last measurement")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    path = options.output / "distill_digits.json"
    if not options.tables:
        with tempfile.TemporaryDirectory() as folder:
            runs = [options.run] if options.run else list(RUNS)
            records = measure(runs, options.seeds, options.epochs, Path(folder))
        machine = facts(torch.device("cpu"))
        if options.run:
            before = json.loads(path.read_text())
            records = [record for record in before["records"] if record["run"] != options.run] + records
            machine = {**before["machine"], "date": f"{before['machine']['date']} ({options.run}: {machine['date']})"}
        options.output.mkdir(parents=True, exist_ok=True)
        saved = {"machine": machine, "epochs": options.epochs, "records": records}
        path.write_text(json.dumps(saved, indent=1) + "\n")
    saved = json.loads(path.read_text())
    path.with_suffix(".md").write_text(report(saved))
    plot(saved["records"], path.with_suffix(".png"))
    print(table(saved["records"]))


if __name__ == "__main__":
    main()
