"""`pyext train mcl-okd`: exact resumption with its banks, selection, export, the baselines, and wrong use."""

from __future__ import annotations

import csv
import json
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import KILLED, assert_same_run, losses, python, with_torchvision, write_images

from pyext import _backend, cli, models
from pyext.checkpoint import load_checkpoint
from pyext.distill import BatchContrast, Distillation, peers
from pyext.distill.recipe import DistillationRecipe
from pyext.nn import EnsembleDistillation, MemoryContrast, PeerContrast
from pyext.train.data import load_data, with_validation
from pyext.train.errors import UserError
from pyext.train.placement import DataParallel
from pyext.train.randomness import Stream, seed_all
from pyext.train.runs import Table, load_network

SMALL = ["train", "mcl-okd", "--arch", "tiny", "--data", "digits", "--image-size", "8", "--peers", "2"]
SMALL += ["--batch-size", "216", "--log-every", "1"]
"""A run of five steps an epoch."""


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_run_killed_in_the_middle_of_an_epoch_resumes_with_the_same_losses_and_banks(tmp_path):
    command = [*SMALL, "--epochs", "2", "--save-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = python("-m", "pyext", *command, "--output", str(whole))
    assert done.returncode == 0, done.stderr
    died = python("-c", KILLED.format(epoch=1, step=2), *command, "--output", str(killed))
    assert died.returncode == -signal.SIGKILL, died.stderr
    before = load_checkpoint(killed / "last.pt")
    assert (before["epoch"], before["step"]) == (1, 2)
    assert len(losses(killed).splitlines()) == 1 + 5 + 3
    resumed = python("-m", "pyext", *command, "--output", str(killed), "--resume", "--workers", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(whole, killed)
    states = [load_checkpoint(folder / "last.pt")["training"] for folder in (whole, killed)]
    assert same(*states)
    assert not torch.equal(states[0]["contrast.contrast.memory_v0"], before["training"]["contrast.contrast.memory_v0"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main([*SMALL, "--epochs", "3", "--peers", "3", "--output", str(folder)]) == 0
    return folder


def test_deployed_peer_is_the_best_on_validation_and_an_ordinary_checkpoint(trained, capsys):
    with open(trained / "epochs.csv") as file:
        row = list(csv.DictReader(file))[-1]
    validation = [float(row[f"validation_peer{i}"]) for i in range(3)]
    summary = json.loads((trained / "summary.json").read_text())
    assert validation[summary["deployed_peer"]] == max(validation) == summary["validation_top1"]
    assert int(row["selected"]) == summary["deployed_peer"]
    for file in (trained, trained / "last.pt"):
        network, card = load_network(file)
        assert type(network) is models.HCGNet
        assert card.arch == "tiny"
        assert cli.main(["eval", str(file)]) == 0
        assert f"top-1 {summary['top1']:.2%}" in capsys.readouterr().out
    state = load_checkpoint(trained / "last.pt")
    own = {name: state["training"][f"peers.networks.{summary['deployed_peer']}.{name}"] for name in state["model"]}
    assert same(own, state["model"])
    assert summary["top1"] == summary["peers_top1"][summary["deployed_peer"]]


def test_scores_are_those_of_the_peers_and_of_their_mean_logits(trained):
    data = load_data("digits", None, 8)
    recipe = DistillationRecipe(batch_size=216, num_peers=3)
    network = recipe.network("tiny", recipe.parts(data, 0))
    network.load_state_dict(load_checkpoint(trained / "last.pt")["training"])
    with torch.no_grad():
        logits = network.eval().peers(data.preprocessing.normalise(data.held_out.images)).logits
    summary = json.loads((trained / "summary.json").read_text())
    right = [(x.argmax(dim=1) == data.held_out.labels).float().mean().item() for x in (*logits, sum(logits) / 3)]
    assert [*summary["peers_top1"], summary["ensemble_top1"]] == pytest.approx(right, abs=1e-6)


def test_selection_goes_by_accuracy_and_then_by_loss():
    recipe = DistillationRecipe(num_peers=3)
    network = Distillation(peers(lambda: nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), 3))
    assert network.deployed() is network.peers.deploy(2)
    recipe.select(network, torch.tensor([[9.0, 5, 6, 9], [7, 6, 6, 9], [5, 6, 6, 9], [1, 9, 9, 9]]))
    assert network.deployed() is network.peers.deploy(2)
    recipe.select(network, torch.tensor([[1.0, 5, 6, 9], [7, 7, 7, 9], [5, 6, 6, 9], [1, 9, 9, 9]]))
    assert network.deployed() is network.peers.deploy(1)


def linear_peers():
    torch.manual_seed(0)
    return peers(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 3, "0").double()


def batch():
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)


def test_loss_is_the_papers_sum():
    group, (images, labels, index) = linear_peers(), batch()
    contrast = MemoryContrast(3, 6, 8, num_samples=5, num_negatives=4, labels=labels).double()
    torch.manual_seed(2)
    loss = Distillation(group, EnsembleDistillation(), contrast, 0.025)(images, labels, index)
    torch.manual_seed(2)
    outputs = group(images)
    p = (torch.stack(outputs.logits).mean(dim=0) / 3).softmax(dim=1)
    divergence = 9 * (p * (p.log() - (outputs.logits[2] / 3).log_softmax(dim=1))).sum() / 5
    contrast._pending = None
    expected = sum(F.cross_entropy(x, labels) for x in outputs.logits) + divergence
    expected = expected + 0.025 * contrast(outputs.features, index)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("method", "shared", "distillation", "banks"),
    [
        ("mcl-okd", 2, "EnsembleDistillation", True),
        ("kd", 2, "EnsembleDistillation", False),
        ("dml", 0, "MutualDistillation", False),
        ("independent", 0, "NoneType", False),
    ],
)
def test_methods(method, shared, distillation, banks):
    data = load_data("digits", None, 8)
    seed_all(0, Stream.WEIGHTS)
    network = DistillationRecipe(method=method).network("tiny", data)
    assert network.peers.num_shared == shared
    assert type(network.distillation).__name__ == distillation
    assert (network.contrast is not None) == banks
    if banks:
        assert (network.contrast.num_negatives, network.contrast.num_samples) == (256, len(data.train))
    # Every method starts from the same weights, so that runs of one seed can be compared in pairs.
    seed_all(0, Stream.WEIGHTS)
    alone = DistillationRecipe(method="independent", num_peers=1).network("tiny", data)
    assert same(alone.peers.deploy(0).state_dict(), network.peers.deploy(0).state_dict())


@pytest.mark.parametrize("method", ["kd", "dml", "independent"])
def test_baselines_train_and_export(tmp_path, method, capsys):
    folder = tmp_path / "run"
    assert cli.main([*SMALL, "--method", method, "--epochs", "1", "--output", str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text())["method"] == method
    assert cli.main(["eval", str(folder)]) == 0


def test_plain_runs_the_reference_in_the_last_evaluation_too(tmp_path, monkeypatch):
    evaluate, seen = DistillationRecipe.evaluate, []

    def watched(self, *arguments):
        sums = evaluate(self, *arguments)
        seen.append((_backend._requested, float(sums[0, 3])))
        return sums

    monkeypatch.setattr(DistillationRecipe, "evaluate", watched)
    assert cli.main([*SMALL, "--plain", "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    assert seen == [("reference", 142), ("reference", 360)]


@pytest.mark.parametrize("arch", ["resnet32", "densenet40-12", "vgg16"])
def test_backbones_train(arch):
    data = load_data("digits", None, 32)
    network = DistillationRecipe(num_peers=2).network(arch, data)
    images = data.preprocessing.normalise(data.train.images[:4])
    network(images, data.train.labels[:4], torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@with_torchvision
def test_peers_train_on_a_folder_of_images(tmp_path, capsys):
    for seed, (part, count) in enumerate((("train", 10), ("val", 3))):
        write_images(tmp_path / part, ("red", "green", "blue"), count, seed=seed)
    command = ["train", "mcl-okd", "--arch", "tiny", "--data", str(tmp_path), "--image-size", "16", "--peers", "2"]
    command += ["--batch-size", "6", "--epochs", "8", "--validation", "0.2", "--negatives", "8"]
    assert cli.main([*command, "--output", str(tmp_path / "run")]) == 0
    assert "24 training and 6 held-out images of 3 classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["top1"] == 1
    parts = with_validation(load_data(str(tmp_path), None, 16), 0.2, 0)
    assert sorted(parts.train.files + parts.held_out.files) == load_data(str(tmp_path), None, 16).train.files
    assert parts.held_out.labels.bincount().tolist() == [2, 2, 2]


def test_bf16_trains_the_banks_in_float32(tmp_path):
    assert cli.main([*SMALL, "--epochs", "1", "--amp", "bf16", "--output", str(tmp_path / "run")]) == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")["training"]
    banks = [state[f"contrast.contrast.memory_v{i}"] for i in range(2)]
    assert all(bank.dtype == torch.float32 and bank.isfinite().all() for bank in banks)
    # A row has length 1 once it has moved: those of the images in the epoch's five batches.
    assert (banks[0].norm(dim=1) - 1).abs().lt(1e-5).sum() == 5 * 216


def test_contrast_within_the_batch_trains_and_resumes(tmp_path, monkeypatch):
    command = [*SMALL, "--epochs", "1", "--contrast", "batch", "--save-every", "3", "--output"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main([*command, str(whole)]) == 0
    add = Table.add

    def add_and_stop(self, *values):
        add(self, *values)
        if values[:2] == (0, 2):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Table, "add", add_and_stop)
    assert cli.main([*command, str(stopped)]) == 130
    monkeypatch.setattr(Table, "add", add)
    assert cli.main([*command, str(stopped), "--resume"]) == 0
    assert_same_run(whole, stopped)
    names = load_checkpoint(whole / "last.pt")["training"]
    assert "contrast.embed_list.1.linear.bias" in names
    assert not any("memory" in name for name in names)


def test_contrast_within_the_batch_is_the_published_sum():
    group, (images, labels, index) = linear_peers(), batch()
    contrast = BatchContrast(3, 6, 8).double()
    loss = Distillation(group, None, contrast, 0.7)(images, labels, index)
    outputs = group(images)
    v = [F.normalize(head.linear(x)) for head, x in zip(contrast.embed_list, outputs.features, strict=True)]
    vcl, icl, soft_vcl, soft_icl = PeerContrast()(v, labels)
    expected = sum(F.cross_entropy(x, labels) for x in outputs.logits)
    expected = expected + 0.7 * (0.1 * vcl + 0.1 * icl + soft_vcl + soft_icl)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_schedule_is_torchs_cosine():
    recipe = DistillationRecipe()
    optimizer = recipe.optimizer(nn.Linear(2, 2))
    assert (
        optimizer.param_groups[0] | {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False}
        == (optimizer.param_groups[0])
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for epoch in range(300):
        assert recipe.learning_rate_at(epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        schedule.step()


def test_validation_is_a_share_of_each_class_without_augmentation():
    data = load_data("digits", None, 8)
    parts = with_validation(data, 0.1, seed=0)
    assert len(parts.train) + len(parts.held_out) == len(data.train)
    for label in range(10):
        count, held = (int((part.labels == label).sum()) for part in (data.train, parts.held_out))
        assert held == round(0.1 * count)
    assert parts.train.shift == data.train.shift > 0 == parts.held_out.shift
    images = torch.cat([parts.train.images, parts.held_out.images]).flatten(1)
    assert torch.equal(images.sort(dim=0).values, data.train.images.flatten(1).sort(dim=0).values)
    again, other = with_validation(data, 0.1, seed=0), with_validation(data, 0.1, seed=1)
    assert torch.equal(parts.held_out.images, again.held_out.images)
    assert not torch.equal(parts.held_out.labels, other.held_out.labels)


def test_class_with_one_image_has_no_validation():
    data = load_data("digits", None, 8)
    index = [*range(50), int((data.train.labels == 3).nonzero()[-1])]
    keep = [i for i in index if data.train.labels[i] != 3 or i == index[-1]]
    small = type(data)(data.name, data.classes, data.preprocessing, data.train.part(keep, data.train), data.held_out)
    with pytest.raises(UserError, match="class 3 of digits has 1 training images"):
        with_validation(small, 0.1, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "alchemy"], "unknown method 'alchemy': choose among mcl-okd, kd, dml, independent"),
        (["--contrast", "lens"], "unknown contrast 'lens': choose among bank, batch, none"),
        (["--contrast", "batch", "--negatives", "8"], "--negatives: only contrast over memory banks draws them"),
        (["--method", "dml", "--contrast", "bank"], "--method dml has no --contrast bank"),
        (["--peers", "1"], "--method mcl-okd needs two peers at least, not --peers 1"),
        (["--validation", "0"], "--validation 0.0 is not a share between 0 and 1"),
        (["--share-until", "attic"], "expected None or one of conv0, HybridBlock1"),
        (["--mixup", "1", "--period", "3"], "--mixup, --period: no part of the recipe of mcl-okd"),
        (["--negatives", "0"], "0 is less than 1"),
    ],
)
def test_wrong_use(options, words, tmp_path, capsys):
    try:
        status = cli.main([*SMALL, "--output", str(tmp_path / "run"), *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_banks_need_equal_shares_of_the_batch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    data = load_data("digits", None, 8)
    with pytest.raises(UserError, match="batch-size 63 cannot be shared equally by 2"):
        DistillationRecipe(batch_size=63).network("tiny", data)
    assert DistillationRecipe(contrast="none").network("tiny", data).contrast is None


def test_peers_that_cannot_be_spread_equally_are_refused():
    recipe = DistillationRecipe(num_peers=3, spread_peers=True)
    with pytest.raises(UserError, match="--spread-peers: 3 peers cannot be spread equally over 2 processes"):
        recipe.placement(SimpleNamespace(global_rank=0, world_size=2))
    assert type(recipe.placement(SimpleNamespace(global_rank=0, world_size=1))) is DataParallel
    assert recipe.placement(SimpleNamespace(global_rank=1, world_size=3)).processes == 1


def test_options_of_mcl_okd_are_refused_by_hcgnet(capsys):
    assert cli.main(["train", "hcgnet", "--data", "digits", "--peers", "2"]) == 2
    assert "--peers: no part of the recipe of hcgnet" in capsys.readouterr().err


def test_finished_run_is_not_lengthened_since_its_schedule_depends_on_its_length(trained, capsys):
    assert cli.main([*SMALL, "--epochs", "4", "--peers", "3", "--output", str(trained), "--resume"]) == 2
    assert "belongs to a run with epochs 3, and this one asks for 4" in capsys.readouterr().err


def test_bank_of_another_size_is_refused(trained, tmp_path, capsys):
    command = [*SMALL, "--epochs", "3", "--peers", "3", "--output", str(trained), "--resume", "--validation", "0.2"]
    assert cli.main(command) == 2
    assert "belongs to a run with validation 0.1" in capsys.readouterr().err
