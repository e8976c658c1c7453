"""The toy of CEWT's authors: each method ends where their own program ends."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import toy

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
EXPECTED = {name: method.expected for name, method in toy.METHODS.items() if method.expected}


@pytest.fixture(scope="module")
def committed():
    return json.loads((EXPERIMENTS / "toy" / "results.json").read_text(encoding="utf-8"))


def losses(results, name, rate):
    (row,) = [row for row in results["rows"] if row["name"] == name]
    (run,) = [run for run in row["runs"] if run["learning_rate"] == rate]
    return [1000 * loss for loss in run["loss"]]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_method_ends_where_its_authors_program_does(name):
    config = toy.Config()
    found = toy.train(name, config, 0, config.authors_rate)
    assert 1000 * found["loss"] == pytest.approx(EXPECTED[name], abs=1)
    if name == "cewt":
        assert found["near_threshold"] == pytest.approx(0.0100, abs=2e-4)


def test_the_committed_results_are_those_of_the_settings(committed):
    assert committed["config"] == json.loads(json.dumps(toy.asdict(toy.Config())))
    assert [row["name"] for row in committed["rows"]] == list(toy.METHODS)
    for name, expected in EXPECTED.items():
        assert losses(committed, name, 0.1)[0] == pytest.approx(expected, abs=1)
        published = toy.METHODS[name].published
        assert statistics.mean(losses(committed, name, 0.1)) == pytest.approx(published, abs=1.5)


def test_fogzo_on_weights_held_on_the_grid_changes_nothing(committed):
    # The loss says nothing there, and each step keeps its first-order gradient.
    for rate in committed["config"]["learning_rates"]:
        alone = statistics.mean(losses(committed, "cage", rate))
        both = statistics.mean(losses(committed, "cage-fogzo", rate))
        assert both == pytest.approx(alone, rel=0.05)


def test_the_table_is_narrow_and_dated(committed):
    table = toy.table(committed)
    assert len(table.rows) == len(toy.METHODS) and len(table.heading) <= 6
    assert committed["environment"]["date"] in table.caption


def test_a_quick_run_writes_results_like_the_committed_ones(tmp_path, monkeypatch, committed):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--quick", "--output-dir", str(tmp_path)])
    toy.main()
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results.keys() == committed.keys()
    assert [row.keys() for row in results["rows"]] == [row.keys() for row in committed["rows"]]
