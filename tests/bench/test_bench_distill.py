"""The comparison on the digits: its commands are ones that `pyext` knows, and its table says what was recorded."""

import json

import pytest

from bench import distill
from pyext import cli


def record(run, seed, top1, ensemble):
    peers = [top1, top1 - 0.02]
    return {
        "run": run,
        "seed": seed,
        "top1": top1,
        "ensemble_top1": ensemble,
        "peers_top1": peers,
        "deployed_peer": 0,
        "validation_ensemble": [0.5, ensemble],
        "seconds": 2.0 + seed,
    }


RECORDS = [
    record(run, seed, 0.9 + 0.01 * seed + 0.02 * (run == "4 by MCL-OKD"), 0.95)
    for seed in (0, 1)
    for run in distill.RUNS
]


def test_table_gives_means_spreads_and_differences_paired_by_seed():
    lines = distill.table(RECORDS).splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])}
    assert list(rows) == list(distill.RUNS)
    assert rows["alone"] == ["90.50 ± 0.71", "-", "-", "-", "-", "2"]
    # The gains over 90 and 91 are 2 and 2 for the deployed peer, 5 and 4 for the ensemble.
    assert rows["4 by MCL-OKD"] == ["92.50 ± 0.71", "+2.00 ± 0.00", "91.50 ± 0.71", "95.00 ± 0.00", "+4.50 ± 0.71", "2"]


def test_tables_and_picture_are_written_from_the_records(tmp_path):
    saved = {"machine": {"date": "today", "CPU": "an abacus"}, "epochs": 2, "records": RECORDS}
    (tmp_path / "distill_digits.json").write_text(json.dumps(saved))
    distill.main(["--tables", "--output", str(tmp_path)])
    text = (tmp_path / "distill_digits.md").read_text()
    assert distill.table(RECORDS) in text
    assert "today, an abacus" in text
    assert "2 epochs, 2 seeds" in text
    assert "360 held-out images (one image is 0.28)" in text
    assert (tmp_path / "distill_digits.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_measured_alone_leaves_the_records_of_the_others(tmp_path, monkeypatch):
    saved = {"machine": {"date": "yesterday", "CPU": "an abacus"}, "epochs": 2, "records": RECORDS}
    (tmp_path / "distill_digits.json").write_text(json.dumps(saved))
    records = [record("4 by DML", seed, 0.8, 0.9) for seed in (0, 1)]
    monkeypatch.setattr(distill, "measure", lambda runs, *_: records if runs == ["4 by DML"] else [])
    monkeypatch.setattr(distill, "facts", lambda _: {"date": "today", "CPU": "another"})
    distill.main(["--run", "4 by DML", "--output", str(tmp_path)])
    saved = json.loads((tmp_path / "distill_digits.json").read_text())
    assert [r for r in saved["records"] if r["run"] != "4 by DML"] == [r for r in RECORDS if r["run"] != "4 by DML"]
    assert distill.of(saved["records"], "4 by DML", "top1") == [80, 80]
    assert saved["machine"] == {"date": "yesterday (4 by DML: today)", "CPU": "an abacus"}


@pytest.mark.parametrize("run", distill.RUNS)
def test_every_command_trains(run, tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr("pyext.train.loop.Trainer.run", lambda trainer: epochs.append(trainer.recipe.epochs))
    command = distill.command(distill.RUNS[run], 3, 7, tmp_path / "run")
    assert command[1:3] == ["-m", "pyext"]
    assert cli.main(command[3:]) == 0
    assert epochs == [7]


def test_results_in_the_repository_are_those_of_its_records():
    saved = json.loads((distill.RESULTS / "distill_digits.json").read_text())
    assert (distill.RESULTS / "distill_digits.md").read_text() == distill.report(saved)
    assert {r["run"] for r in saved["records"]} == set(distill.RUNS)
