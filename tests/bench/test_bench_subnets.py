"""The report on sub-networks says what was recorded, and its experiment covers what it names."""

import json

from bench import subnets


def test_results_in_the_repository_are_those_of_its_records():
    saved = json.loads((subnets.RESULTS / "subnets_digits.json").read_text())
    assert (subnets.RESULTS / "subnets_digits.md").read_text() == subnets.report(saved)
    pairs = {tuple(r["classes"]) for r in saved["records"] if len(r["classes"]) == 2 and r["keep"] == subnets.KEEP}
    assert len(pairs) == 45
    assert {len(r["classes"]) for r in saved["records"]} == {2, 3, 5, 10}


def test_no_method_has_more_parameters_than_its_share():
    records = json.loads((subnets.RESULTS / "subnets_digits.json").read_text())["records"]
    assert all(r[f"{method}: parameters"] <= r["keep"] for r in records for method in subnets.METHODS)


def test_against_counts_the_pairs_at_the_stated_share_alone():
    def record(ours, other, keep=subnets.KEEP, classes=(0, 1)):
        return {"classes": list(classes), "keep": keep, "atlas, recalibrated": ours, "whole": other}

    records = [record(0.9, 0.8), record(0.9, 0.8), record(0.7, 0.7), record(0.1, 0.2), record(1, 0, 0.2)]
    assert subnets.against([*records, record(1, 0, classes=(0, 1, 2))], "whole") == "2 better, 1 equal, 1 worse"
