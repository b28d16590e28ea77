"""The training loop: exact resumption, stopping, several processes, records, options."""

from __future__ import annotations

import io
import json
import signal
import sys

import numpy as np
import pytest
import torch
from training_helpers import KILLED, SMALL, assert_same_run, losses, python

from pyext import _backend, cli
from pyext.checkpoint import load_checkpoint
from pyext.train import loop, recipe
from pyext.train.data import EpochBatches, checked, load_data, loader
from pyext.train.networks import build
from pyext.train.randomness import Stream, seed_all
from pyext.train.runs import Table


def test_run_killed_in_the_middle_of_an_epoch_resumes_with_the_same_losses(tmp_path):
    command = [*SMALL, "--epochs", "2", "--save-every", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = python("-m", "pyext", *command, "--output", str(whole))
    assert done.returncode == 0, done.stderr
    died = python("-c", KILLED.format(epoch=1, step=7), *command, "--output", str(killed))
    assert died.returncode == -signal.SIGKILL, died.stderr
    state = load_checkpoint(killed / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 6)
    assert len(losses(killed).splitlines()) == 1 + 11 + 8
    assert losses(whole).startswith(losses(killed))
    resumed = python("-m", "pyext", *command, "--output", str(killed), "--resume", "--workers", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at epoch 2, step 6" in resumed.stdout
    assert_same_run(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_that_is_asked_to_stop_saves_and_resumes_exactly(train, monkeypatch, capsys, number):
    handler = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    whole = train("--epochs", "2", name="whole")
    add = Table.add

    def add_and_stop(self, *values):
        add(self, *values)
        if values[:2] == (1, 4):
            signal.raise_signal(number)

    monkeypatch.setattr(Table, "add", add_and_stop)
    stopped = train("--epochs", "2", name="stopped", status=130)
    assert "stopped at epoch 2, step 5: continue with --resume" in capsys.readouterr().err
    monkeypatch.setattr(Table, "add", add)
    assert train("--epochs", "2", "--resume", name="stopped") == stopped
    assert_same_run(whole, stopped)
    assert signal.getsignal(signal.SIGINT) is handler


def test_finished_run_can_be_given_more_epochs(train):
    whole = train("--epochs", "2", name="whole")
    train("--epochs", "1", name="longer")
    assert_same_run(whole, train("--epochs", "2", "--resume", name="longer"))


def test_runs_differ_by_seed_and_resume_starts_where_there_is_nothing(train):
    first = train("--epochs", "1", "--resume", name="first")
    assert losses(first) != losses(train("--epochs", "1", "--seed", "1", name="second"))


DISTRIBUTED = """
import os, sys, torch
from pathlib import Path
from pyext.train.loop import Settings, Trainer
from pyext.train.recipe import Recipe

folder = Path(sys.argv[1])
settings = Settings("tiny", "digits", folder / "run", Recipe(epochs=1, batch_size=480), image_size=8, log_every=1)
trainer = Trainer(settings)
step, seen = trainer._step, []
def watched(images, labels, index):
    loss = step(images, labels, index)
    seen.append((float(loss), images.clone(), labels.clone()))
    return loss
trainer._step = watched
trainer.run()
torch.save({"state": trainer.network.state_dict(), "seen": seen}, folder / f"rank{trainer.rank}.pt")
sys.stdout.flush()
os._exit(0)  # as `pyext.cli.main` ends such a process, and why
"""


def manual_steps(size, batch_size, processes):
    """What data-parallel SGD is, in one process: each share's own gradients, averaged; returns the parameters."""
    data = load_data("digits", None, size)
    seed_all(0, Stream.WEIGHTS)
    network = build("tiny", 10)
    settings = recipe.Recipe(batch_size=batch_size)
    optimizer = settings.optimizer(network)
    settings.start_epoch(0, network, optimizer)
    shares = []
    for rank in range(processes):
        batches = EpochBatches(len(data.train), batch_size, 0, rank, processes)
        shares.append(checked(loader(data.train, batches, 0, pin_memory=False)))
    for step, parts in enumerate(zip(*shares, strict=True)):
        sums = [torch.zeros_like(p) for p in network.parameters()]
        for rank, (images, labels) in enumerate(parts):
            seed_all(0, Stream.STEP, 0, step, rank)
            mixed = recipe.mixup(data.preprocessing.normalise(images), labels, 1.0, 0, 0, step, rank)
            gradients = torch.autograd.grad(mixed.loss(network(mixed.images), 0.0), list(network.parameters()))
            sums = [total + gradient / processes for total, gradient in zip(sums, gradients, strict=True)]
        for parameter, gradient in zip(network.parameters(), sums, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return dict(network.named_parameters())


def test_two_processes_train_one_network_on_shares_of_each_batch(tmp_path):
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(*launcher, str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, tensor in ranks[0]["state"].items():
        assert torch.equal(tensor, ranks[1]["state"][name]), name

    rows = [line.split(",") for line in losses(tmp_path / "run").splitlines()[1:]]
    assert len(rows) == 2
    for row, first, second in zip(rows, ranks[0]["seen"], ranks[1]["seen"], strict=True):
        assert float(row[2]) == pytest.approx((first[0] + second[0]) / 2, rel=1e-6)
        assert not torch.equal(first[1], second[1])
        assert len(first[2]) == len(second[2]) == 240
    assert done.stdout.count("epoch 1/1:") == 1

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = manual_steps(8, 480, 2)
    torch.set_num_threads(threads)
    for name, parameter in expected.items():
        assert torch.equal(ranks[0]["state"][name], parameter), name
    scores = (tmp_path / "run" / "epochs.csv").read_text().splitlines()[1].split(",")
    assert float(scores[4]) * 360 == pytest.approx(round(float(scores[4]) * 360), abs=1e-3)


def test_sync_bn_needs_cuda(train, capsys):
    train("--sync-bn", "--device", "cpu", status=2)
    assert "--sync-bn needs CUDA devices" in capsys.readouterr().err


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(train):
    dtypes = set()

    def watch(module, _, output):
        if isinstance(module, torch.nn.Conv2d):
            dtypes.add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(watch):
        folder = train("--epochs", "1", "--amp", "bf16")
    assert dtypes == {torch.bfloat16}
    weights = load_checkpoint(folder / "last.pt")["model"].values()
    assert {t.dtype for t in weights if t.is_floating_point()} == {torch.float32}
    first, full = (
        float(losses(f).splitlines()[1].split(",")[2]) for f in (folder, train("--epochs", "1", name="full"))
    )
    # The loss is a mean of 128 terms of logits that hold 8 bits each.
    assert 0 < abs(first - full) < full * 2**-7


def test_plain_runs_the_reference_and_starts_with_the_same_loss(train, monkeypatch):
    requested = []
    step = loop.Trainer._step

    def watched(self, *batch):
        requested.append(_backend._requested)
        return step(self, *batch)

    monkeypatch.setattr(loop.Trainer, "_step", watched)
    plain, own = train("--epochs", "1", "--plain", name="plain"), train("--epochs", "1", name="own")
    assert requested == ["reference"] * 11 + ["auto"] * 11
    first, second = (float(losses(folder).splitlines()[1].split(",")[2]) for folder in (plain, own))
    assert abs(first - second) <= 8 * np.finfo(np.float32).eps * first


def test_records_of_a_run(train, capsys):
    folder = train("--epochs", "1")
    out = capsys.readouterr().out
    assert "1437 training and 360 held-out images" in out
    assert "epoch 1/1: learning rate 0.1000" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["epochs"] == 1
    assert summary["seconds_per_step"] > 0
    assert summary["peak_memory_bytes"] >= 0
    assert [line.split(",")[:2] for line in losses(folder).splitlines()[1:]] == [["0", str(i)] for i in range(11)]


def test_progress_lines_tell_rate_and_remaining_time(train, monkeypatch, capsys):
    monkeypatch.setattr(loop.Progress.__init__, "__defaults__", (True, 0.0))
    train("--epochs", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if "remaining" in line]
    assert len(lines) == 10
    assert all("images/s, 0:00:" in line and "loss" in line for line in lines)


def test_loss_that_is_not_finite_stops_the_run(train, capsys):
    train("--epochs", "1", "--lr", "1e30", status=1)
    err = capsys.readouterr().err
    assert "the loss is" in err
    assert "lower --lr" in err


def test_table_is_cut_back_to_the_checkpoint(tmp_path):
    table = Table(tmp_path / "t.csv", ("epoch", "step", "loss"), place=2)
    table.cut((0, 0))
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        table.add(*place, repr(0.1 + place[1]))
    with open(table.path, "a") as file:
        file.write("1,2")
    table.cut((1, 1))
    assert [(row["epoch"], row["step"], row["loss"]) for row in table.read()] == [
        ("0", "0", "0.1"),
        ("0", "1", "1.1"),
        ("1", "0", "0.1"),
    ]


USE_AND_GIVE_BACK = """
import numpy as np, torch
from pyext.train.progress import PeakMemory
memory = PeakMemory(torch.device("cpu"))
block = np.ones(64 << 20, np.uint8)
assert block.sum() == 64 << 20
del block
print(memory.read())
"""


def test_peak_memory_counts_what_was_used_and_given_back():
    """In a process of its own: what other tests have left in this one may be given back meanwhile."""
    peak = int(python("-c", USE_AND_GIVE_BACK).stdout)
    # The kernel counts resident pages in batches, so the figure is a little off.
    assert 60 << 20 <= peak < 160 << 20


def test_stopping_twice_interrupts_at_once(train, monkeypatch, capsys):
    def stop_twice(self, *values):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Table, "add", stop_twice)
    train("--epochs", "1", status=130)
    assert capsys.readouterr().err == "pyext: interrupted\n"


def test_sigterm_after_ctrl_c_still_saves(train, monkeypatch):
    def stop_by_torchrun(self, *values):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Table, "add", stop_by_torchrun)
    assert load_checkpoint(train("--epochs", "1", status=130) / "last.pt")["step"] == 1


def test_bar_on_a_terminal(train, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    train("--epochs", "1")
    assert "\x1b[" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "remaining" in terminal.getvalue()
    assert "epoch 1/1: learning rate" in terminal.getvalue()


def test_module_and_command_are_the_same():
    assert python("-m", "pyext", "train", "--help").stdout.startswith("usage: pyext train")
    assert cli.main.__module__ == "pyext.cli"
