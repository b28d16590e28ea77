"""`pyext` as people use it: evaluation, prediction, and every wrong use answered in one sentence."""

from __future__ import annotations

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pyext import cli
from pyext.checkpoint import atomic_save, load_checkpoint
from pyext.train import few_shot
from pyext.train.data import load_data
from pyext.train.networks import build
from pyext.train.runs import load_network

SMALL = ["train", "hcgnet", "--arch", "tiny", "--data", "digits", "--image-size", "8", "--epochs", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main([*SMALL, "--lr", "0.02", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def fails(capsys, status, *arguments):
    """The one sentence that `pyext arguments` ends with, after checking its status."""
    try:
        result = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse's own way out
        result = stop.code
    err = capsys.readouterr().err
    assert result == status
    assert "Traceback" not in err
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith("pyext")
    return sentence


@pytest.mark.parametrize("probe", ["centroid", "linear"])
def test_few_shot_says_what_its_episodes_found(trained, capsys, probe):
    command = ["eval", "few-shot", str(trained), "--episodes", "20", "--shots", "5", "--probe", probe]
    assert cli.main([*command, "--seed", "3"]) == 0
    first = capsys.readouterr().out
    network, card = load_network(trained)
    images = load_data("digits", None, 8)
    with torch.no_grad():  # as the command: another form of the convolutions could decide a tie the other way
        features = network.forward_features(card.preprocessing.normalise(images.held_out.images))
    asked = few_shot.Episodes(shots=5, count=20, probe=probe, seed=3)
    scores = few_shot.evaluate(features, images.held_out.labels, asked)
    assert first == (
        f"5-way 5-shot, 20 episodes, {probe} probe, digits: accuracy {scores.mean:.2%} ± {scores.interval:.2%} "
        "(95 % confidence)\n"
    )
    assert scores.mean > 1 / 5 + 3 * scores.interval  # one epoch has taught the network something
    assert cli.main(command) == 0
    assert capsys.readouterr().out != first


def test_few_shot_shows_its_progress_on_a_terminal(trained, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["eval", "few-shot", str(trained), "--episodes", "200"]) == 0
    shown = sys.stdout.getvalue()
    assert "100%" in shown
    assert "images/s" in shown
    assert "episodes/s" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ways", "11"], "11-way episodes need as many classes; the images have 10"),
        (["--shots", "30"], "30 shots and 15 queries"),
        (["--episodes", "0"], "0 is less than 1"),
        (["--probe", "tree"], "invalid choice: 'tree'"),
    ],
)
def test_few_shot_that_cannot_be_is_said(trained, capsys, options, words):
    assert words in fails(capsys, 2, "eval", "few-shot", trained, *options)


def test_eval_agrees_with_the_scores_of_training(trained, capsys):
    scores = dict(zip(*((line.split(",")) for line in (trained / "epochs.csv").read_text().splitlines()), strict=True))
    for file in (trained, trained / "last.pt", trained / "model.safetensors"):
        assert cli.main(["eval", str(file), "--batch-size", "128"]) == 0
        out = capsys.readouterr().out
        assert f"top-1 {float(scores['top1']):.2%}, top-5 {float(scores['top5']):.2%}" in out
        assert f"loss {float(scores['held_out_loss']):.4f}" in out
        assert "360 held-out images of digits" in out
        assert "images/s" in out


def test_eval_does_not_depend_on_the_batch_size(trained, capsys):
    lines = []
    for size in ("360", "7"):
        cli.main(["eval", str(trained), "--batch-size", size])
        lines.append(capsys.readouterr().out.rsplit(",", 1)[0])
    assert lines[0] == lines[1]


def test_predict_prints_classes_and_probabilities(trained, tmp_path, capsys):
    data = load_data("digits", None, 8)
    files = []
    for i in range(3):
        files.append(tmp_path / f"digit{i}.png")
        Image.fromarray(data.held_out.images[i].permute(1, 2, 0).numpy()).save(files[-1])
    assert cli.main(["predict", str(trained), *map(str, files), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    network, card = load_network(trained)
    with torch.no_grad():
        probabilities = network(card.preprocessing.normalise(data.held_out.images[:3])).softmax(dim=1)
    for line, file, row in zip(lines, files, probabilities, strict=True):
        (first, second), (i, j) = row.topk(2)
        assert line == f"{file}: {i} {first:.1%}, {j} {second:.1%}"


def test_published_weights_are_used_with_arch_and_data(trained, tmp_path, capsys):
    weights = {f"module.{k}": v for k, v in load_checkpoint(trained / "last.pt")["model"].items()}
    torch.save({"net": weights, "acc": 50.0}, tmp_path / "published.pth")
    assert "name them with --arch and --data" in fails(capsys, 1, "eval", tmp_path / "published.pth")
    assert "--arch needs --data" in fails(capsys, 2, "eval", tmp_path / "published.pth", "--arch", "tiny")
    assert cli.main(["eval", str(tmp_path / "published.pth"), "--arch", "tiny", "--data", "digits"]) == 0


@pytest.mark.parametrize("file", ["last.pt", "model.safetensors"])
def test_truncated_checkpoint(run, file, capsys):
    whole = (run / file).read_bytes()
    for keep in (0, 5, len(whole) // 2, len(whole) - 1):
        (run / file).write_bytes(whole[:keep])
        assert file in fails(capsys, 1, "eval", run / file)
    (run / file).write_bytes(b"Not a checkpoint at all, but some text of a hundred bytes or so, to be sure.")
    assert file in fails(capsys, 1, "predict", run / file, "image.png")


def test_resuming_from_a_damaged_or_foreign_checkpoint(run, capsys):
    whole = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert "last.pt" in fails(capsys, 1, *SMALL, "--output", run, "--resume")
    atomic_save(run / "last.pt", {"model": {}, "epoch": 1})
    assert "checkpoint of another program" in fails(capsys, 1, *SMALL, "--output", run, "--resume")


def test_missing_checkpoint(tmp_path, capsys):
    assert "there is no checkpoint" in fails(capsys, 1, "eval", tmp_path / "no.pt")
    assert "no.safetensors" in fails(capsys, 1, "eval", tmp_path / "no.safetensors")
    assert "there is no checkpoint" in fails(capsys, 1, "eval", tmp_path)


def test_weights_of_another_network(run, capsys):
    entries = load_checkpoint(run / "last.pt")
    atomic_save(run / "last.pt", {**entries, "model": build("tiny", 7).state_dict()})
    assert "classifier.weight (7, 76), expected (10, 76)" in fails(capsys, 1, "eval", run / "last.pt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "a1"], "belongs to a run with arch tiny, and this one asks for a1"),
        (["--data", "cifar10", "--image-size", "32"], "belongs to a run with data digits"),
        (["--seed", "3"], "belongs to a run with seed 0, and this one asks for 3"),
        (["--lr", "0.5"], "belongs to a run with learning_rate 0.02"),
    ],
)
def test_resuming_another_run(run, options, words, capsys, monkeypatch):
    data = load_data("digits", None, 8)
    monkeypatch.setattr("pyext.train.loop.load_data", lambda *_: data)
    assert words in fails(capsys, 2, *SMALL, "--lr", "0.02", *options, "--output", run, "--resume")


def test_output_that_holds_a_run_is_not_overwritten(run, capsys):
    before = (run / "last.pt").read_bytes()
    assert "add --resume to continue it" in fails(capsys, 2, *SMALL, "--output", run)
    assert (run / "last.pt").read_bytes() == before


def test_classes_that_do_not_match(run, capsys):
    entries = load_checkpoint(run / "last.pt")
    entries["card"]["classes"] = [f"class{i}" for i in range(10)]
    atomic_save(run / "last.pt", entries)
    assert "digits has 10 classes and the network 10; they differ, among them 0" in fails(
        capsys, 1, "eval", run / "last.pt"
    )
    assert "on other classes or images" in fails(capsys, 1, *SMALL, "--lr", "0.02", "--output", run, "--resume")
    del entries["card"]["classes"]
    atomic_save(run / "last.pt", entries)
    assert "does not say which network and data" in fails(capsys, 1, "eval", run / "last.pt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "hcgnet", "--arch", "a9", "--data", "digits"], "unknown architecture 'a9': choose among a1, a2"),
        (["train", "resnet"], "invalid choice: 'resnet'"),
        (["train", "hcgnet", "--data", "nowhere"], "--data nowhere is neither digits"),
        ([*SMALL, "--image-size", "0"], "0 is less than 1"),
        ([*SMALL, "--lr", "-1"], "-1 is not between 0 and inf"),
        ([*SMALL, "--lr", "nan"], "nan is not between 0 and inf"),
        ([*SMALL, "--seed", "-1"], "-1 is negative"),
        ([*SMALL, "--epochs", "many"], "invalid"),
        ([*SMALL, "--device", "abacus"], "--device abacus cannot be used here"),
        ([*SMALL, "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        ([], "required"),
    ],
)
def test_wrong_commands(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, 2, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_too_small_or_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "fewer than one batch of 2000" in fails(capsys, 1, *SMALL, "--batch-size", "2000")
    sentence = fails(capsys, 1, "train", "hcgnet", "--data", "imagenet", "--data-dir", tmp_path / "none")
    # Beside a torch that has no torchvision, that is what is missing first.
    assert "should hold train/CLASS/IMAGE and val/CLASS/IMAGE" in sentence or "needs torchvision" in sentence


def test_predicting_what_is_no_image(trained, tmp_path, capsys):
    assert "cannot read" in fails(capsys, 1, "predict", trained, tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("no image")
    assert "text.png as an image" in fails(capsys, 1, "predict", trained, tmp_path / "text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:1000])
    assert "half.png as an image" in fails(capsys, 1, "predict", trained, tmp_path / "half.png")
    assert "--device abacus" in fails(capsys, 2, "predict", trained, "x.png", "--device", "abacus")


def test_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    sentence = fails(capsys, 1, *SMALL, "--output", tmp_path / "run")
    assert sentence == ("pyext: training needs lightning_fabric: install it with `pip install pyext-kernels[train]`.")


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails(capsys, 1, *SMALL, "--output", tmp_path / "file" / "run")


def test_export_carries_its_card(trained):
    network, card = load_network(trained / "model.safetensors")
    assert (card.arch, card.data, card.classes) == ("tiny", "digits", tuple("0123456789"))
    assert card.preprocessing.image_size == 8
    assert not network.training
    checkpoint = load_checkpoint(trained / "last.pt")
    assert json.loads(json.dumps(card.to_dict())) == checkpoint["card"]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][name])


def test_doctor_prints_the_report(capsys):
    from pyext import doctor

    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == doctor.report() + "\n"
