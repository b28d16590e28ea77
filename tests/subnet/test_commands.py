"""`pyext dissect`, `pyext reconstruct` and `pyext eval --classes` as people use them."""

import re

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from pyext import cli
from pyext.models import resnet32
from pyext.subnet import Atlas, reconstruct
from pyext.train.data import load_data
from pyext.train.networks import ARCHITECTURES, build
from pyext.train.runs import Card, export, load_network


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with an untrained network for digits, its atlas by two shards, and the picture of one."""
    folder = tmp_path_factory.mktemp("subnet")
    torch.manual_seed(0)
    export(folder / "model.safetensors", resnet32(10), Card.of("resnet32", load_data("digits", None, 8)))
    for i in range(2):
        output = ["--output", str(folder / f"atlas{i}.safetensors"), "--picture", str(folder / "atlas.png")]
        assert (
            cli.main(["dissect", str(folder), "--steps", "1", "--batch-size", "720", "--shard", f"{i}/2", *output]) == 0
        )
    return folder


def command(run, name, *words, classes="3,7"):
    atlases = [str(run / f"atlas{i}.safetensors") for i in range(2)]
    return [name, str(run), "--classes", classes, "--atlas", *atlases, *map(str, words)]


def test_dissect_sees_every_training_image_once_and_draws(run):
    shards = [Atlas.load(run / f"atlas{i}.safetensors") for i in range(2)]
    labels = load_data("digits", None, 8).train.labels
    assert torch.equal(shards[0].counts + shards[1].counts, torch.bincount(labels, minlength=10))
    assert (run / "atlas.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.part"))


def test_reconstruct_says_what_is_kept_and_exports_it(run, capsys, tmp_path):
    network, _ = load_network(run)
    atlas = Atlas.load(run / "atlas0.safetensors").merge(Atlas.load(run / "atlas1.safetensors"))
    subnet, x = reconstruct(network, atlas, [3, 7], keep=0.2, scope="layer"), torch.randn(5, 3, 8, 8)
    expected = subnet(x).detach()
    for file in ("small.onnx", "small.pt2"):
        words = ["--keep", 0.2, "--scope", "layer", "--output", tmp_path / file]
        assert cli.main(command(run, "reconstruct", *words)) == 0
        out = capsys.readouterr().out
        assert str(subnet.summary()) in out
        assert "outputs: 0 3, 1 7" in out
    (found,) = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, {"images": x.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    program = torch.export.load(tmp_path / "small.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)


def test_eval_scores_the_classes_alone(run, capsys, tmp_path):
    network, card = load_network(run)
    data = load_data("digits", None, 8).held_out
    own = (data.labels == 3) | (data.labels == 7)
    x, right = card.preprocessing.normalise(data.images[own]), data.labels[own]
    with torch.no_grad():
        whole = network(x)[:, [3, 7]].argmax(1)
        atlas = Atlas.load(run / "atlas0.safetensors").merge(Atlas.load(run / "atlas1.safetensors"))
        part = reconstruct(network, atlas, [3, 7], keep=0.3)(x).argmax(1)
    assert cli.main(command(run, "eval", "--keep", 0.3, "--picture", tmp_path / "curve.png", classes="7,3")) == 0
    out = capsys.readouterr().out
    top1 = [float(share) for share in re.findall(r"top-1 ([\d.]+)%", out)]
    for found, guesses in zip(top1, (whole, part), strict=True):
        assert found == round(100 * (torch.tensor([3, 7])[guesses] == right).double().mean().item(), 2)
    assert f"classes 3, 7, {int(own.sum())} held-out images of digits" in out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def fails(capsys, status, words):
    try:
        result = cli.main([str(word) for word in words])
    except SystemExit as stop:  # argparse's own way out
        result = stop.code
    err = capsys.readouterr().err
    assert result == status
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            lambda run: command(run, "eval", classes="3,ten"),
            2,
            "'ten' is none of the 10 classes, nor a number below 10",
        ),
        (lambda run: command(run, "eval", classes="3,3"), 2, "--classes 3,3 names a class twice"),
        (lambda run: command(run, "reconstruct", "--keep", 2), 1, "keep is 2.0, expected a share in (0, 1]"),
        (lambda run: command(run, "reconstruct", "--output", "small.pt"), 2, "ends with .onnx or .pt2"),
        (lambda run: ["eval", run, "--picture", "x.png"], 2, "--atlas and --picture need --classes"),
        (lambda run: ["eval", run, "--classes", "1", "--picture", "x.png"], 2, "--picture needs --atlas"),
        (lambda run: ["dissect", run, "--output", "atlas.pt"], 2, "ends with .safetensors"),
        (lambda run: ["dissect", run, "--output", run / "atlas0.safetensors"], 2, "already holds an atlas"),
        (lambda run: ["dissect", run, "--output", run / "a.safetensors", "--steps", 0], 1, "steps is 0"),
        (lambda run: ["dissect", run, "--output", "a.safetensors", "--shard", "2/2"], 2, "2/2 is not I/N"),
        (lambda run: ["reconstruct", run, "--classes", "1", "--atlas", run / "no.safetensors"], 1, "no checkpoint"),
    ],
)
def test_wrong_use_ends_with_a_sentence(run, capsys, words, status, message):
    assert message in fails(capsys, status, words(run))


def test_network_that_cannot_be_followed_and_atlas_of_another_are_told(run, capsys, tmp_path, monkeypatch):
    layers = nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    monkeypatch.setitem(ARCHITECTURES, "softmax", lambda _: nn.Sequential(*layers))
    card = Card.of("softmax", load_data("digits", None, 8))
    export(tmp_path / "model.safetensors", build("softmax", 10), card)
    message = fails(capsys, 1, ["dissect", tmp_path, "--output", tmp_path / "atlas.safetensors"])
    assert "is a Softmax, whose channels cannot be followed" in message
    atlas = run / "atlas0.safetensors"
    message = fails(capsys, 1, ["reconstruct", tmp_path, "--classes", "1,2", "--atlas", atlas])
    assert "the atlas was made of another network than this Sequential" in message
