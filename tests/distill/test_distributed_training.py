"""`pyext train mcl-okd` under torchrun: exact resumption after kill -9, with and without its peers spread."""

from __future__ import annotations

import json

import pytest
import torch
from training_helpers import KILLED, assert_same_run, losses, python

from pyext import cli
from pyext.checkpoint import load_checkpoint

RUN = ["train", "mcl-okd", "--arch", "tiny", "--data", "digits", "--image-size", "8", "--peers", "2", "--epochs", "2"]
RUN += ["--batch-size", "216", "--log-every", "1", "--save-every", "2"]
"""Five steps an epoch."""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

WHOLE_AND_RESUMED = """
import sys
from pyext import cli

cli._main([*sys.argv[3:], "--output", sys.argv[1]])
sys.exit(cli.main([*sys.argv[3:], "--output", sys.argv[2], "--resume"]))
"""
"""Both in the same processes, which take longer to start than to train."""


def _whole_and_resumed(folder, *options):
    """Folders of an uninterrupted run of two processes, and of one that was killed in its second epoch."""
    scripts = {"killed.py": KILLED.format(epoch=1, step=2), "rest.py": WHOLE_AND_RESUMED}
    for name, text in scripts.items():
        (folder / name).write_text(text)
    whole, killed = folder / "whole", folder / "killed"
    died = python(*TORCHRUN, str(folder / "killed.py"), *RUN, *options, "--output", str(killed))
    assert "Signal 9 (SIGKILL)" in died.stderr
    before = load_checkpoint(killed / "last.pt")
    assert (before["epoch"], before["step"]) == (1, 2)
    assert len(losses(killed).splitlines()) == 1 + 5 + 3
    done = python(*TORCHRUN, str(folder / "rest.py"), str(whole), str(killed), *RUN, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed at epoch 2, step 2") == 1
    assert done.stdout.count("epoch 2/2:") == 2
    return whole, killed


def _assert_same(whole, killed):
    assert_same_run(whole, killed)
    first, second = (load_checkpoint(folder / "last.pt")["training"] for folder in (whole, killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_two_processes_killed_in_the_middle_of_an_epoch_resume_exactly(tmp_path):
    _assert_same(*_whole_and_resumed(tmp_path))


def _shapes(entry):
    if isinstance(entry, torch.Tensor):
        return entry.shape, entry.dtype
    return {key: _shapes(value) for key, value in entry.items()} if isinstance(entry, dict) else entry


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_spread_peers_resume_exactly_and_leave_the_checkpoint_of_one_process(tmp_path, capsys, one_thread):
    whole, killed = _whole_and_resumed(tmp_path, "--spread-peers")
    _assert_same(whole, killed)
    alone = tmp_path / "alone"
    assert cli.main([*RUN, "--output", str(alone)]) == 0
    # The first loss comes before any gradient; the later ones' rounding differs, and grows with every step.
    assert losses(alone).splitlines()[1] == losses(whole).splitlines()[1]
    states = [load_checkpoint(folder / "last.pt") for folder in (alone, whole)]
    for part in ("training", "optimizer"):
        assert _shapes(states[0][part]) == _shapes(states[1][part])
    assert list(states[0]["optimizer"]["state"]) == list(states[1]["optimizer"]["state"])
    file_sizes = [(folder / "last.pt").stat().st_size for folder in (alone, whole)]
    assert abs(file_sizes[0] - file_sizes[1]) < 0.01 * file_sizes[0]  # what peers share is written once
    summary = json.loads((whole / "summary.json").read_text())
    capsys.readouterr()
    assert cli.main(["eval", str(whole)]) == 0
    assert f"top-1 {summary['top1']:.2%}" in capsys.readouterr().out
    # And one process goes on with it, here to nothing but the last evaluation.
    assert cli.main([*RUN, "--output", str(whole), "--resume"]) == 0
    again = json.loads((whole / "summary.json").read_text())
    assert again["peers_top1"] == pytest.approx(summary["peers_top1"], abs=1e-6)
    assert again["ensemble_top1"] == pytest.approx(summary["ensemble_top1"], abs=1e-6)
