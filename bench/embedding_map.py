"""`python -m bench.embedding_map`: where the peers of MCL-OKD put the held-out digits, before and after training.

All peers' embeddings are mapped to the plane together (t-SNE of cosine distances), so that two peers that see an image
alike put it in one place.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.manifold import TSNE
from torch import Tensor

from bench.distill import ARCH, DATA, EPOCHS, IMAGE_SIZE, RESULTS, RUNS, command
from pyext.checkpoint import load_checkpoint
from pyext.distill import Distillation
from pyext.distill.recipe import DistillationRecipe
from pyext.train.data import ImageData, load_data
from pyext.train.randomness import Stream, seed_all

MARKERS = ("o", "^", "s", "D")


def network(data: ImageData, seed: int) -> Distillation:
    """What the run of `seed` starts from."""
    recipe = DistillationRecipe()
    seed_all(seed, Stream.WEIGHTS)
    return recipe.network(ARCH, recipe.parts(data, seed)).eval()


@torch.no_grad()
def embeddings(trained: Distillation, data: ImageData) -> Tensor:
    """(peers, images, d) of the held-out images, normalised."""
    images = data.preprocessing.normalise(data.held_out.images)
    return trained.contrast.embed(trained.peers(images).features)


def cosines(v: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Mean cosine of two peers' embeddings of one image, of two images of a class, and of two of different classes."""
    peers, images, _ = v.shape
    between = sum(v[i] @ v[j].T for i in range(peers) for j in range(peers) if i != j) / (peers * (peers - 1))
    one, alike = torch.eye(images, dtype=torch.bool), labels[:, None] == labels
    return tuple(float(between[which].mean()) for which in (one, alike & ~one, ~alike))


def plot(panels: dict[str, Tensor], labels: Tensor, path: Path) -> None:
    """A panel for each of the embeddings: colour says the digit, shape the peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(9, 5), layout="constrained")
    for axes, (title, v) in zip(all_axes, panels.items(), strict=True):
        places = TSNE(metric="cosine", init="pca", random_state=0).fit_transform(v.flatten(0, 1).numpy())
        for marker, points in zip(MARKERS, places.reshape(*v.shape[:2], 2), strict=True):
            axes.scatter(*points.T, c=labels, cmap="tab10", marker=marker, s=9, linewidths=0, alpha=0.7)
        image, alike, other = cosines(v, labels)
        axes.set(xticks=[], yticks=[], title=title)
        cosine = f"one image {image:.2f}, one class {alike:.2f}, different classes {other:.2f}"
        axes.set_xlabel(f"mean cosine between two peers:\n{cosine}", fontsize=9)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one run of `bench.distill`, and draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.embedding_map", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    data = load_data(DATA, None, IMAGE_SIZE)
    trained = network(data, options.seed)
    before = embeddings(trained, data)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        subprocess.run(command(RUNS["4 by MCL-OKD"], options.seed, options.epochs, run), check=True)
        trained.load_state_dict(load_checkpoint(run / "last.pt")["training"])
    after = embeddings(trained.eval(), data)
    options.output.mkdir(parents=True, exist_ok=True)
    panels = {"before training": before, f"after {options.epochs} epochs": after}
    plot(panels, data.held_out.labels, options.output / "embeddings_digits.png")


if __name__ == "__main__":
    main()
