import json
import math
from dataclasses import replace

import pytest

from fogzo.cli import display
from fogzo.cli.report import write_compare_report
from fogzo.recipes import RECIPES
from fogzo.recipes.compare import ROWS, CompareConfig, _differences, _summarise, compare
from fogzo.recipes.timing import run_seconds


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """One small comparison of every row, in real worker processes."""
    base = replace(
        RECIPES["digits-mlp"](), output_dir=tmp_path_factory.mktemp("compare"), max_steps=12
    )
    config = CompareConfig(
        base=base, rows=tuple(ROWS), learning_rates=(1e-3, 1e-2), num_seeds=2, workers=2
    )
    progress = []
    results = compare(config, lambda *counts: progress.append(counts))
    return config, results, progress


def test_every_row_tries_every_learning_rate_and_reports_the_best_on_validation(comparison):
    _config, results, progress = comparison
    rows = {(row["name"], row["budget"]): row for row in results["rows"]}
    assert [row["name"] for row in results["rows"] if row["budget"] == "steps"] == list(ROWS)
    for row in rows.values():
        curve = dict(row["validation_loss_by_learning_rate"])
        assert set(curve) == {1e-3, 1e-2}
        assert curve[row["learning_rate"]] == min(curve.values())
        assert len(row["seeds"]) == 2
    assert progress[-1][0] == progress[-1][1] == 2 * 2 * len(results["rows"])


def test_cheaper_rows_also_run_for_as_long_as_fogzo(comparison):
    _, results, _ = comparison
    longer = {row["name"]: row for row in results["rows"] if row["budget"] == "time"}
    assert {"ste", "ste-unmasked", "placebo"} <= set(longer)
    assert not {"float", "fogzo"} & set(longer)
    seconds = results["run_seconds_measured_in_turns"]
    for name, row in longer.items():
        assert row["steps"] == round(12 * seconds["fogzo"] / seconds[name])


def test_a_run_that_begins_with_plain_ste_takes_the_time_of_its_parts(tmp_path):
    base = replace(RECIPES["digits-mlp"](), output_dir=tmp_path, max_steps=100)
    configs = {
        "ste": replace(base, estimator="ste"),
        "fogzo": base,
        "half": replace(base, start=0.5),
    }
    seconds = run_seconds(configs, rounds=5, steps=10)
    assert seconds["ste"] < seconds["half"] < seconds["fogzo"]


def test_rows_share_their_first_batch_and_initial_weights(comparison):
    _config, results, _ = comparison
    first = {row["name"]: row["curve"][0]["loss"] for row in results["rows"]}
    quantized = {name: loss for name, loss in first.items() if name != "float"}
    assert len(set(quantized.values())) == 1


def test_the_files_on_disk_say_the_same(comparison):
    config, results, _ = comparison
    stored = json.loads((config.base.output_dir / "results.json").read_text())
    assert stored["rows"][0]["test_accuracy"] == results["rows"][0]["test_accuracy"]
    assert {"date", "torch", "processor", "cores"} <= set(stored["environment"])


def test_the_report_is_one_file_with_every_row_and_plot(comparison):
    config, results, _ = comparison
    html = write_compare_report(config, results).read_text()
    assert html.count("<svg") == 5
    assert not any(outside in html for outside in ("<script", "<link", "<img", "@import"))
    for row in results["rows"]:
        assert display.row_label(row) in html.replace("&#39;", "'")


def test_intervals_are_students_and_paired():
    # differences 1, 2, 3: mean 2, sd 1, t(.975, 2) = 4.302653
    def row(name, values):
        seeds = [{"test_accuracy": v, "train_loss": -v} for v in values]
        return {"name": name, "budget": "steps", "seeds": seeds}

    (difference,) = _differences([row("ste", [5.0, 4.0, 3.0]), row("fogzo", [6.0, 6.0, 6.0])])
    assert math.isclose(difference["test_accuracy"]["mean"], 2)
    assert math.isclose(difference["test_accuracy"]["low"], 2 - 4.302653 / 3**0.5, rel_tol=1e-6)
    assert math.isclose(difference["train_loss"]["mean"], -2)


@pytest.mark.parametrize(
    ("gap", "begin"),
    [
        ((0.01, 0.03), "FOGZO's test accuracy is better than that of STE"),
        ((-0.03, -0.01), "FOGZO's test accuracy is worse than that of STE"),
        ((-0.01, 0.03), "These seeds do not tell FOGZO's test accuracy apart from that of STE"),
    ],
)
def test_a_winner_is_called_only_where_the_interval_excludes_zero(gap, begin):
    entry = {"mean": sum(gap) / 2, "low": gap[0], "high": gap[1]}
    results = {
        "rows": [{"name": "ste", "budget": "steps"}, {"name": "fogzo", "budget": "steps"}],
        "differences": [
            {"name": "ste", "budget": "steps", "test_accuracy": entry, "train_loss": entry}
        ],
    }
    assert display.findings(results)[0].startswith(begin)


def test_a_diverged_learning_rate_is_never_chosen():
    def outcome(loss):
        keys = ("train_loss", "test_loss", "validation_loss", "test_accuracy", "seconds")
        return dict.fromkeys(keys, loss) | {"steps": 1, "extra_forwards": 0}

    class Run:
        def __init__(self, rate, folder):
            self.config = replace(RECIPES["digits-mlp"](), learning_rate=rate, output_dir=folder)

    def folder(rate, tmp):
        path = tmp / str(rate)
        path.mkdir()
        (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 0.1}\n')
        return path

    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        tmp = Path(directory)
        pairs = [
            (Run(0.1, folder(0.1, tmp)), outcome(1.5)),
            (Run(1.0, folder(1.0, tmp)), outcome(math.inf)),
        ]
        row = _summarise("ste", "steps", (0.1, 1.0), pairs)
    assert row["learning_rate"] == 0.1
    assert row["at_edge_of_grid"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("ste", "sgd")}, "no such row: sgd"),
        ({"rows": ()}, "none given"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"learning_rates": (0.0,)}, "positive"),
    ],
)
def test_a_comparison_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(base=RECIPES["digits-mlp"](), **changes)
