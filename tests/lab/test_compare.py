import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_this_process import compare_in_this_process
from shrunk import shrunk

from fogzo_lab.cli.main import main
from fogzo_lab.comparison import compare as module
from fogzo_lab.comparison import run_cache, summary, timing
from fogzo_lab.comparison import tables as words
from fogzo_lab.comparison.compare import CompareConfig, compare, plan
from fogzo_lab.comparison.intervals import Interval
from fogzo_lab.comparison.metrics import METRICS
from fogzo_lab.comparison.overview import (
    beside_table,
    best_free_rival,
    differences_table,
    leaders_table,
    minus_table,
    rivals_table,
    tuning_table,
    verdict_table,
)
from fogzo_lab.comparison.plots import STYLES, comparison_plots, in_seconds
from fogzo_lab.comparison.report import write_compare_report
from fogzo_lab.comparison.results import Candidate, Comparison, RowResult
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.timing import run_seconds
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.json_files import dumps
from fogzo_lab.table import Table
from fogzo_lab.training.config import from_dict
from fogzo_lab.training.loop import train
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.run_folder import read_config
from fogzo_lab.training.tasks import ImageTask

SOME = ("float", "ptq", "ste", "ste-stochastic", "placebo", "fogzo", "ste-then-fogzo")
STEPS = 20


def digits(folder, **changes):
    return replace(RECIPES["digits-mlp"](), output_dir=folder, log_every=5, **changes)


def small(folder, **changes):
    """A comparison of seconds."""
    options = {"rows": ("ste", "fogzo"), "learning_rates": (1e-3, 1e-2), "num_seeds": 2}
    return CompareConfig(base=digits(folder, max_steps=10), workers=1, **options | changes)


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Those of test_compare_signals.py and test_executors.py have workers."""
    with pytest.MonkeyPatch.context() as patch:
        compare_in_this_process(patch)
        yield


@pytest.fixture(scope="module")
def comparison(in_this_process, tmp_path_factory):
    """One small comparison."""
    watched = {"track_flips": True, "inspect_every": 10}
    base = digits(tmp_path_factory.mktemp("compare"), max_steps=STEPS, **watched)
    config = CompareConfig(
        base=base,
        rows=SOME,
        learning_rates=(3e-3, 2e-2),
        kappas=(0.1, 1.0),
        num_seeds=2,
        tuning_seeds=1,
        workers=2,
    )
    progress = []
    results = compare(config, lambda *counts: progress.append(counts))
    return config, results, progress


def by_name(results, budget="steps"):
    return {row.name: row for row in results.rows if row.budget == budget}


def test_every_row_tries_every_candidate_and_reports_the_best_on_validation(comparison):
    config, results, progress = comparison
    assert list(by_name(results)) == list(SOME)
    for row in results.rows:
        own = {0.1, 1.0} if row.parameter == "kappa" else {None}
        losses = {(tried.learning_rate, tried.value): tried.loss for tried in row.tuning}
        assert set(losses) == {(rate, value) for rate in (3e-3, 2e-2) for value in own}
        assert losses[row.learning_rate, row.value] == min(losses.values()) == row.best_loss
        assert row.tuning_runs == len(losses) * config.tuning_seeds
        assert len(row.seeds) == config.num_seeds
        assert row.summary("train_loss").mean > 0
    runs = len(list((config.base.output_dir / "runs").iterdir()))
    assert progress[-2:] == [(runs, runs)] * 2


def test_equal_time_gives_every_row_the_steps_that_fit_into_fogzos_seconds(comparison):
    _, results, _ = comparison
    seconds, longer = results.run_seconds, by_name(results, "time")
    assert {"float", "ptq", "ste"} <= set(longer)
    assert "fogzo" not in longer
    for name, row in longer.items():
        assert row.steps == math.floor(STEPS * seconds["fogzo"] / seconds[name])


def test_reports_show_times_of_the_interleaved_timing_and_not_of_busy_runs(comparison):
    _, results, _ = comparison
    for row in in_seconds(results):
        seconds = results.seconds(row)
        assert row.curve[-1]["seconds"] == pytest.approx(seconds)
        step = results.run_seconds[row.name] / STEPS
        assert 0 <= results.run_seconds["fogzo"] - seconds < 1.02 * step
    assert results.seconds(replace(results.find("ste"), name="lambda")) is None
    ste = results.find("ste")
    half = [point for point in ste.curve if point["step"] <= STEPS / 2]  # as where a seed diverged
    [cut] = in_seconds(replace(results, rows=[replace(ste, curve=half)]))
    assert cut.curve[-1]["seconds"] == pytest.approx(results.seconds(ste) / 2)


def test_equal_time_may_be_that_of_another_row(tmp_path, monkeypatch):
    # A step of FOGZO takes twice as long as one of STE, one of the placebo as long.
    times = {"ste": 1.0, "ste-unmasked": 1.0, "placebo": 1.01, "fogzo": 2.0}
    monkeypatch.setattr(module, "_seconds", lambda *_, **__: times)
    found = compare(small(tmp_path, rows=("ste", "placebo", "fogzo"), time_of="ste"))
    assert Comparison.from_dict(found.to_dict()) == found
    assert {(row.name, row.budget): row.steps for row in found.rows} == {
        **dict.fromkeys([("ste", "steps"), ("placebo", "steps"), ("fogzo", "steps")], 10),
        ("fogzo", "time"): 5,
    }
    fogzo, ste = found.find("fogzo", "time"), found.find("ste", "time")
    assert [(gap.title, gap.budget) for gap in found.differences] == [
        ("STE", "steps"),
        ("placebo", "steps"),
        ("STE (equal time)", "time"),
        ("placebo (equal time)", "time"),
    ]
    loss = METRICS["test_loss"]
    for budget, row in (("steps", found.find("fogzo")), ("time", fogzo)):
        gap = Interval.paired(row.values(loss.key), ste.values(loss.key))
        assert found.interval(ste, loss, budget) == gap
    assert "fit into STE's seconds" in beside_table(found).caption
    whole = compare(
        small(tmp_path, rows=("ste", "ste-unmasked", "placebo", "fogzo"), time_of="ste")
    )
    shown = {line[1]: line[2] for line in differences_table({"a net": whole}).rows}
    main = whole.main_metric
    for budget, reached in shown.items():
        assert reached == main.spread(whole.find("fogzo", budget).summary(main.key))
    with pytest.raises(ValueError, match=r"none of the rows ste fogzo: --time-of ste"):
        small(tmp_path, time_of="placebo")


def test_rows_share_their_first_batch_and_initial_weights(comparison):
    _, results, _ = comparison
    first = {
        (row.name, row.budget): row.curve[0]["loss"]
        for row in results.rows
        if row.name not in ("float", "ptq", "ste-stochastic")
    }
    assert len(set(first.values())) == 1


def test_cost_is_counted_in_passes(comparison):
    rows = by_name(comparison[1])
    assert (rows["ste"].forwards, rows["ste"].forward_equivalents) == (20, 60)
    assert (rows["fogzo"].forwards, rows["fogzo"].forward_equivalents) == (60, 100)
    assert rows["ste-then-fogzo"].forwards == 20 + 2 * 6


def test_the_new_rows_are_what_they_say(comparison):
    _, results, _ = comparison
    rows = by_name(results)
    loss = {name: row.summary("test_loss").mean for name, row in rows.items()}
    assert loss["float"] < loss["ptq"] < math.log(10)
    assert loss["ste-stochastic"] < math.log(10)
    assert loss["ste-stochastic"] != loss["ste"]
    then = rows["ste-then-fogzo"].curve
    assert [p["step"] for p in then if "agreement" in p] == [15, 20]
    assert all(0 <= p["flip_rate"] < 0.2 for p in then[-1:])
    assert rows["ptq"].curve == []


def test_the_same_again_runs_nothing_and_says_the_same(comparison):
    config, results, _ = comparison
    runs = config.base.output_dir / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    assert before
    assert compare(config) == results
    assert before == {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}


def test_the_files_on_disk_say_the_same(comparison):
    config, results, _ = comparison
    stored = json.loads((config.base.output_dir / "results.json").read_text())
    assert Comparison.from_dict(stored) == results
    assert json.loads(dumps(results.to_dict())) == stored
    assert {"date", "torch", "processor", "cores"} <= set(stored["environment"])
    assert stored["code"]["versions_of_runs"] == [stored["code"]["version"]]


def test_a_method_is_tuned_over_its_own_parameter_and_results_name_it(tmp_path):
    config = small(tmp_path, rows=("ste-winq",), learning_rates=(1e-3,), num_seeds=1)
    (found,) = compare(config).rows
    assert [tried.value for tried in found.tuning] == [0.2, 0.5, 0.8]
    edge = "" if found.value == 0.5 else " (edge)"
    assert found.chosen_value == f"keep {found.value:g}{edge}"
    stored = json.loads((tmp_path / "results.json").read_text())
    assert (stored["rows"][0]["parameter"], stored["rows"][0]["value"]) == ("keep", found.value)
    assert len(list(tmp_path.glob("runs/ste-winq-lr0.001-keep0.5-steps10-seed0-*"))) == 1
    html = write_compare_report(config, Comparison.from_dict(stored)).read_text()
    assert "a parameter of its own: STE, WinQ (keep 0.2, 0.5, 0.8)" in html
    for part in (stored["rows"][0], *stored["rows"][0]["tuning"]):
        part["kappa"] = part.pop("value")  # as it was called when there was no other
    assert Comparison.from_dict(stored).rows[0].value == found.value


def test_the_report_is_one_file_with_every_row_table_and_plot(comparison):
    config, results, _ = comparison
    html = write_compare_report(config, results).read_text()
    assert html.count("<svg") == 9
    assert html.count("<table") == 3
    assert not any(outside in html for outside in ("<script", "<link", "<img", "@import"))
    for row in results.rows:
        assert row.title in html.replace("&#39;", "'")
    for part in (
        "Student",
        "tuning runs",
        "Agreement",
        "flip",
        "Masked weights over training",
        results.code["version"],
    ):
        assert part in html


def row(name, accuracies, **changes):
    """A row whose seeds reached so much."""
    row = RowResult(
        name=name,
        budget="steps",
        steps=100,
        learning_rate=0.01,
        value=None,
        extra_forwards=0,
        tuning=[Candidate(0.01, None, 0.5)],
        tuning_runs=1,
        seeds=[{"test_accuracy": value} for value in accuracies],
        curve=[],
        fallbacks={},
    )
    return replace(row, **changes)


def made(*rows):
    """A comparison of such rows."""
    return Comparison(
        recipe="made",
        environment={},
        code={},
        grid=(0.01,),
        kappas=(0.1,),
        num_seeds=len(rows[0].seeds),
        tuning_seeds=1,
        run_seconds={},
        rows=rows,
    )


FOGZO = row("fogzo", (0.79, 0.80, 0.81), extra_forwards=200)
RIVALS = (
    row(
        "ste", (0.77, 0.779, 0.791), tuning=[Candidate(0.01, None, 0.6), Candidate(0.1, None, 0.7)]
    ),
    row("ste-unmasked", (0.79, 0.81, 0.80), tuning=[Candidate(0.01, None, 0.4)]),
    row("placebo", (0.81, 0.821, 0.829)),
)


SECONDS = {"ste": 1.0, "ste-unmasked": 1.0, "placebo": 1.0, "fogzo": 2.0}


def test_the_story_names_wins_losses_and_what_is_not_significant():
    story = " ".join(words.story(made(*RIVALS, FOGZO)))
    assert "significantly better than STE (+2.00 points, +1.75 to +2.25)" in story
    assert "significantly worse than placebo (-2.00 points" in story
    assert "not significantly different from STE, unmasked" in story
    assert words.findings(made(*RIVALS, FOGZO))[:3] == [
        "FOGZO's test accuracy is significantly better than that of STE.",
        "FOGZO's test accuracy is significantly worse than that of placebo.",
        "No significant difference in test accuracy: STE, unmasked.",
    ]


@pytest.mark.parametrize(
    ("rows", "findings", "story"),
    [
        (
            [row("float", (0.9, 0.91, 0.92)), FOGZO],
            ["No other quantized row stands beside FOGZO to be compared with: --rows ste fogzo."],
            ["FOGZO reached a test accuracy of 80.00 ± 1.00%."],
        ),
        (
            [*RIVALS, row("fogzo", (0.8, None, 0.8))],
            ["1 of 3 runs of FOGZO diverged, so no interval exists and no winner is called."],
            [],
        ),
        (
            [row("float", (0.9, 0.9, 0.9)), row("ste", (0.8, None, 0.8)), FOGZO],
            [
                "A run diverged in each of the other quantized rows, so no interval exists and no "
                "winner is called."
            ],
            ["FOGZO reached a test accuracy of 80.00 ± 1.00%."],
        ),
        (
            [row("ste", (0.8,)), row("fogzo", (0.9,))],
            ["With one seed no interval exists, and no winner is called: --num-seeds 5."],
            ["FOGZO reached a test accuracy of 90.00 ± –%."],
        ),
        (
            [row("ste", (0.75, 0.77)), row("fogzo", (0.78, 0.8))],
            [
                "All seeds differ by the same number, which tells no spread, so no interval exists "
                "and no winner is called."
            ],
            ["FOGZO reached a test accuracy of 79.00 ± 1.41%."],
        ),
    ],
)
def test_where_nothing_is_called_the_true_reason_is_said(rows, findings, story):
    assert words.findings(made(*rows)) == findings
    assert words.story(made(*rows)) == [*story, *findings]


def test_the_story_of_equal_time_says_that_equal_steps_diverged():
    later = [row(name, (0.8, 0.8, 0.8), budget="time") for name in ("ste", "fogzo")]
    story = words.story(made(RIVALS[0], row("fogzo", (None, 0.8, 0.8)), *later))
    assert story[0] == "1 of 3 runs of FOGZO diverged."
    assert story[1].startswith("With equal time")


def test_an_end_of_what_was_tried_is_marked_of_rates_and_of_own_parameters():
    tried = [Candidate(0.01, keep, keep) for keep in (0.2, 0.5, 0.8)]
    ends = [row("ste-winq", (0.8,), tuning=tried, value=keep) for keep in (0.2, 0.5)]
    ends += [row("fogzo", (0.8,), tuning=[Candidate(0.01, 0.1, 0.5)], value=0.1)]
    table = words.quality_table(made(*ends))
    column = list(table.heading).index("own parameter")
    assert [cells[column] for cells in table.rows] == ["keep 0.2 (edge)", "keep 0.5", "kappa 0.1"]


def test_no_column_is_left_empty_and_no_tuning_is_claimed_that_was_not():
    alone, beside = made(*RIVALS), made(*RIVALS, FOGZO)
    claim = "have tried more candidates than the others"
    for found, shown in ((alone, False), (beside, True)):
        assert ("FOGZO minus row, points [95%]" in words.quality_table(found).heading) == shown
        assert claim not in words.cost_table(replace(found, run_seconds=SECONDS)).caption
    tuned = made(*RIVALS, replace(FOGZO, tuning_runs=3))
    assert claim in words.cost_table(replace(tuned, run_seconds=SECONDS)).caption


def test_rows_without_a_curve_leave_no_legend(recwarn):
    comparison_plots(replace(made(row("ptq", (0.7, 0.8))), run_seconds={"ptq": 1.0}))
    assert not recwarn.list


def test_the_step_at_which_a_seed_diverged_is_no_point_of_the_curve(tmp_path):
    for seed, last in enumerate((20, 13)):
        lines = [{"step": step, "loss": 1.0, "seconds": 1.0} for step in (1, 10, last)]
        log = tmp_path / str(seed) / "metrics.jsonl"
        log.parent.mkdir()
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [SimpleNamespace(path=lambda _, seed=seed: tmp_path / str(seed)) for seed in range(2)]
    assert [point["step"] for point in summary._curve(None, runs)] == [1, 10]


def test_a_page_shows_no_training_loss_where_none_was_measured():
    where = {"processor": "P", "cores": 2, "torch": "2", "date": "today"}
    table = words.page_table(replace(made(*RIVALS, FOGZO), environment=where))
    assert table.heading[2:] == ["test accuracy %", "FOGZO − row"]
    seeds = [{"test_accuracy": 0.8, "train_loss": 0.5}] * 3
    both = words.page_table(replace(made(replace(FOGZO, seeds=seeds)), environment=where))
    assert both.heading[4] == "train loss (nats)"


def test_verdicts_are_signs_of_the_intervals_at_both_budgets():
    both = made(*RIVALS, FOGZO, row("ste", (0.81, 0.821, 0.829), budget="time"))
    table = verdict_table({"a net": both, "another": made(*RIVALS, FOGZO)})
    # The placebo has no run of its own at equal time: it costs as much as FOGZO.
    assert table.rows[0] == [
        "a net", "+ / −", "= / =", "− / −", "= / = (STE, unmasked)",
    ]  # fmt: skip
    assert table.rows[1] == ["another", "+ / ·", "= / ·", "− / ·", "= / · (STE, unmasked)"]
    assert "9 signs in the first three columns: 2 are +, 4 are − and 3 are =" in table.caption
    assert "edge of the grid: 2 of 9 tuned rows" in table.caption


def test_rows_stand_beside_ste_and_the_leader_of_each_budget_is_named():
    cage = row("ste-cage", (0.81, 0.83, 0.82), value=10.0, tuning=[Candidate(0.01, 10.0, 0.3)])
    later = row("ste", (0.82, 0.831, 0.839), budget="time", tuning=[Candidate(0.01, None, 0.2)])
    found = replace(
        made(*RIVALS, FOGZO, cage, later),
        run_seconds={
            "ste": 2.0,
            "ste-unmasked": 2.0,
            "placebo": 2.2,
            "fogzo": 4.0,
            "ste-cage": 2.1,
        },
        environment={"processor": "P", "cores": 2, "torch": "2", "date": "today"},
    )
    table = beside_table(found)
    assert table.heading[1:4] == ["test accuracy %", "− STE", "− STE at equal time"]
    (line,) = [cells for cells in table.rows if cells[0] == "STE, CAGE"]
    assert line[1:3] == ["82.00 ± 1.00", "**+4.00 [+1.27, +6.73]** better"]
    assert line[3:] == ["-1.00 [-3.24, +1.24]", "0.01, strength 10", "1.05"]
    assert table.rows[0][2] == "" and "FOGZO's seconds" in table.caption
    assert table.caption.endswith(" P, 2 cores, torch 2, today.")
    elsewhere = {**found.environment, "machines": "1 runs: P; 2 runs: Q"}
    caption = beside_table(replace(found, environment=elsewhere)).caption
    assert caption.endswith(" 1 runs: P; 2 runs: Q; today.")
    assert leaders_table({"a net": found}).rows == [
        ["a net", "steps", "78.00 ± 1.05", "STE, CAGE", line[2], "**+2.00 [+1.75, +2.25]** better"],
        ["a net", "time", "83.00 ± 0.95", "STE", "", "**-3.00 [-3.25, -2.75]** worse"],
    ]
    assert minus_table({"a net": found}, ["fogzo", "ste-cage"]).rows == [
        ["a net", "steps", "78.00 ± 1.05", "**+2.00 [+1.75, +2.25]** better", line[2]],
        ["a net", "time", "83.00 ± 0.95", "**-3.00 [-3.25, -2.75]** worse", line[3]],
    ]
    with pytest.raises(ValueError, match="a net lacks the row lambda"):
        minus_table({"a net": found}, ["lambda"])
    with pytest.raises(ValueError, match="there is no row ste at equal steps, only placebo"):
        beside_table(replace(found, rows=(RIVALS[2],)))


# Rows that diverged

NEVER = [Candidate(rate, None, math.inf) for rate in (0.01, 0.1)]
LOST = {"tuning": NEVER, "extra_forwards": None}
WHERE = {"processor": "P", "cores": 2, "torch": "2", "date": "today"}


def with_facts(*rows):
    """A comparison of such rows that pages can show."""
    times = {row.name: 1.0 for row in rows}
    return replace(made(*rows), run_seconds=times, environment=WHERE)


def test_a_row_that_diverged_at_every_rate_is_at_no_edge_and_its_passes_are_unknown():
    lost = row("ste", (None,) * 3, **LOST)
    own = [Candidate(0.01, kappa, math.inf) for kappa in (0.1, 1.0)]
    found = with_facts(
        lost,
        RIVALS[2],
        row(
            "fogzo",
            (None,) * 3,
            value=0.1,
            **LOST,
        ),
    )
    assert not lost.at_edge_of_grid and lost.chosen_rate == "0.01"
    assert replace(lost, value=0.1, name="fogzo", tuning=own).chosen_value == "kappa 0.1"
    table = words.page_table(found)
    assert [cells[:4] for cells in table.rows] == [
        ["STE", "100 + –", "diverged", "diverged"],
        ["placebo", "100 + 0", "82.00 ± 0.95", "diverged"],
        ["FOGZO", "100 + –", "diverged", ""],
    ]
    assert "edge" not in table.caption
    assert "0 of 3 tuned rows" in verdict_table({"a net": found}).caption
    assert words.difference_table(found) is None
    assert "FOGZO minus row, points [95%]" not in words.quality_table(found).heading


def test_a_verdict_without_an_interval_is_told_from_a_row_that_was_not_run():
    part = row("ste", (0.8, None, 0.8), tuning=[Candidate(0.01, None, 0.1)])
    table = verdict_table({"a net": made(part, RIVALS[2], FOGZO)})
    assert table.rows == [["a net", "? / ·", "· / ·", "− / ·", "? / · (STE)"]]
    assert table.caption.startswith("1 signs in the first three columns")
    assert "?: run, but without an interval" in table.caption
    assert "?" not in verdict_table({"a net": made(*RIVALS, FOGZO)}).caption
    assert verdict_table({"a net": made(RIVALS[0])}).rows[0][1:] == [*["· / ·"] * 3, "· / · ()"]


def test_a_difference_from_a_run_that_diverged_is_not_taken_for_none():
    cage = row("ste-cage", (0.8, None, 0.8), value=10.0, tuning=[Candidate(0.01, 10.0, 0.1)])
    found = with_facts(*RIVALS, FOGZO, cage)
    (line,) = [cells for cells in beside_table(found).rows if cells[0] == "STE, CAGE"]
    assert line[1:3] == ["diverged", "diverged"]
    assert beside_table(found).rows[0][2] == ""
    assert minus_table({"a net": found}, ["ste-cage"]).rows[0][3] == "diverged"
    assert leaders_table({"a net": found}).rows[0][3:5] == ["STE, CAGE", "diverged"]
    lost = [replace(each, tuning=NEVER) for each in (RIVALS[0], FOGZO)]
    assert leaders_table({"a net": made(*lost)}).rows[0][3] == "diverged"


def test_a_rival_of_which_a_seed_diverged_is_named():
    later = row("ste", (0.8, 0.8, None), budget="time")
    found = made(RIVALS[0], row("ste-unmasked", (None, None, 0.8)), FOGZO, later)
    said = (
        "2 of 3 runs of STE, unmasked diverged; 1 of 3 runs of STE (equal time) diverged, so no "
        "winner is called there."
    )
    assert said == words.story(found)[-2] == words.findings(found)[-2]
    assert "diverged" not in " ".join(words.story(made(*RIVALS, FOGZO)))


def test_every_row_can_be_drawn():
    assert set(STYLES) == set(ROWS)


def test_the_best_free_rival_is_chosen_by_validation_loss_and_costs_nothing():
    cheap = row("lambda", (0.9, 0.9, 0.9), extra_forwards=10, tuning=[Candidate(1, None, 0.1)])
    not_quantized = row("float", (0.9, 0.9, 0.9), tuning=[Candidate(1, None, 0.1)])
    comparison = made(*RIVALS, FOGZO, cheap, not_quantized)
    assert best_free_rival(comparison, "steps").name == "ste-unmasked"


def test_differences_are_called_where_the_interval_excludes_zero():
    table = differences_table({"lsq": made(*RIVALS, FOGZO)})
    assert table.rows == [
        [
            "lsq", "steps", "80.00 ± 1.00", "**+2.00 [+1.75, +2.25]** better",
            "+0.00 [-2.48, +2.48]", "**-2.00 [-2.25, -1.75]** worse",
        ]
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"lsq has rows ste, .*expected fogzo"):
        differences_table({"lsq": made(*RIVALS)})


def test_tuning_is_shown_with_its_edges():
    table = tuning_table({"a net": made(*RIVALS, FOGZO)})
    assert [cells[2] for cells in table.rows] == ["0.01 (edge)", "0.01", "0.01", "0.01"]
    with pytest.raises(ValueError, match="lacks the row placebo"):
        tuning_table({"a net": made(*RIVALS[:2], FOGZO)})


def test_a_row_stands_beside_its_rivals():
    table = rivals_table(made(*RIVALS, row("ste-then-fogzo", (0.7, 0.8, 0.9))), "ste-then-fogzo")
    assert [cells[0] for cells in table.rows] == ["STE", "STE, unmasked", "placebo"]
    with pytest.raises(ValueError, match="made lacks a row: expected ste-then-fogzo, ste"):
        rivals_table(made(*RIVALS), "ste-then-fogzo")


def test_rows_of_a_table_fit_its_heading():
    with pytest.raises(ValueError, match=r"'1' has 1 cells under 2 headings \(a, b\)"):
        Table("", ["a", "b"], [["1"]])
    with pytest.raises(ValueError, match="no rows"):
        Table("", ["a", "b"], []).markdown()


@pytest.mark.parametrize("limit", [1e9, 1e-9], ids=["fast", "slow"])
def test_every_turn_has_its_share_of_probes_and_a_float_phase_stays_in_float(limit, monkeypatch):
    clock, loss = [0.0], ImageTask.loss

    def counted(task, model, batch):
        in_float = any(getattr(layer, "is_in_float", False) for layer in model.modules())
        clock[0] += (3 if torch.is_grad_enabled() else 1) * (0.5 if in_float else 1)
        return loss(task, model, batch)

    monkeypatch.setattr(ImageTask, "loss", counted)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    base = digits("unused", max_steps=12)
    rows = ("ste", "fogzo", "fogzo-every-4", "float-then-ste")
    configs = {name: ROWS[name].config(base, None) for name in rows}
    configs["half"] = replace(configs["fogzo"], start=0.5)
    found = run_seconds(configs, rounds=4, steps=6, limit=limit)
    expected = {"ste": 36, "fogzo": 60, "fogzo-every-4": 42, "float-then-ste": 27, "half": 48}
    assert found == expected


def test_a_learning_rate_at_which_a_run_diverges_is_never_chosen(tmp_path):
    base = digits(tmp_path, max_steps=20, optimizer="sgd", schedule="constant")
    config = CompareConfig(
        base=replace(base, quantizer=QuantizerConfig(preset="lsq")),
        rows=("ptq", "fogzo"),
        learning_rates=(1e30, 1e-2),
        num_seeds=1,
        equal_time=False,
        workers=1,
    )
    progress = []
    results = compare(config, lambda *counts: progress.append(counts))
    # Two float networks that are quantized afterwards count too; the end is said once more.
    assert progress == [*((done, 6) for done in range(1, 7)), (6, 6)]
    for row in results.rows:
        assert row.learning_rate == 1e-2
        assert row.loss_by_rate[1e30] == math.inf
        assert [1e30, math.inf] in row.to_dict()["validation_loss_by_learning_rate"]
    # one seed: allowed, and no winner
    assert "no interval exists" in words.findings(results)[0]
    assert "no interval exists" in write_compare_report(config, results).read_text()
    assert not results.differences[0].intervals["test_loss"].exists
    worst = compare(replace(config, learning_rates=(1e30,)))
    assert "diverged" in str(words.quality_table(worst).rows)
    assert write_compare_report(config, worst).exists()


def test_text_is_compared_by_perplexity(tmp_path):
    base = shrunk(RECIPES["pydoc-llama"](), output_dir=tmp_path, max_steps=4)
    config = CompareConfig(
        base=base, rows=("ste", "spsa", "fogzo-rademacher", "fogzo"), learning_rates=(1e-3,),
        num_seeds=2, equal_time=False, workers=1,
    )  # fmt: skip
    results = compare(config)
    assert results.main_metric.key == "test_perplexity"
    gap = results.differences[0].intervals["test_perplexity"]
    assert gap.low < gap.mean < gap.high
    html = write_compare_report(config, results).read_text()
    assert "test perplexity" in html
    assert "less is better" in html


def test_a_plan_runs_nothing_and_knows_what_is_finished(tmp_path):
    config = small(tmp_path / "new", tuning_seeds=1)
    planned = plan(config)
    assert not (tmp_path / "new").exists()
    steps = [row for row in planned.rows if row.budget == "steps"]
    assert [(row.name, row.runs, row.to_run) for row in steps] == [("ste", 3, 3), ("fogzo", 3, 3)]
    assert planned.seconds > 0
    compare(config)
    assert plan(config).to_run == 0
    more = plan(replace(config, learning_rates=(1e-3, 1e-2, 1e-1)))
    assert [row.to_run for row in more.rows if row.budget == "steps"] == [2, 2]


def test_a_damaged_run_is_set_aside_and_run_again(tmp_path, caplog):
    config = small(tmp_path, equal_time=False, num_seeds=1)
    results = compare(config)
    unreadable, foreign, short = sorted((tmp_path / "runs").iterdir())[:3]
    (unreadable / "result.json").write_text("{")
    text = (foreign / "result.json").read_text()
    (foreign / "result.json").write_text(text.replace('"run": "', '"run": "0'))
    (short / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 0.1}\n')
    again = compare(config)
    warned = [record.message for record in caplog.records]
    assert [
        sum(path.name in message for message in warned) for path in (unreadable, foreign, short)
    ] == [1] * 3
    assert len(list((tmp_path / "corrupt").iterdir())) == 3
    assert by_name(again)["fogzo"].values("test_loss") == by_name(results)["fogzo"].values(
        "test_loss"
    )
    caplog.clear()
    compare(config)
    assert not caplog.records


def test_runs_of_other_code_are_refused_before_anything_runs(tmp_path, monkeypatch):
    config = small(tmp_path, equal_time=False, learning_rates=(1e-2,))
    results = compare(config)
    monkeypatch.setattr(module, "code_version", lambda: "0123456789ab")
    monkeypatch.setattr(module, "start_executor", lambda *_: pytest.fail("it has begun"))
    for refused in (compare, plan):
        with pytest.raises(ValueError, match="--mix-versions") as error:
            refused(config)
        assert "--output-dir" in str(error.value)
    compare_in_this_process(monkeypatch)
    before = sorted((tmp_path / "runs").iterdir())
    mixed = compare(replace(config, mix_versions=True))
    assert sorted((tmp_path / "runs").iterdir()) == before
    assert mixed.code["versions_of_runs"] == [results.code["version"]]
    assert mixed.rows == results.rows


def test_runs_of_other_code_that_were_killed_are_not_gone_on_with(tmp_path):
    config = small(
        tmp_path, rows=("ptq",), equal_time=False, learning_rates=(1e-2,), num_seeds=1,
        mix_versions=True,
    )  # fmt: skip
    compare(config)
    quantized, trained = (next((tmp_path / "runs").glob(f"{row}-*")) for row in ("ptq", "float"))
    shutil.rmtree(quantized)
    shutil.rmtree(trained / "checkpoints")
    # Another version finished the float network, and was killed while it quantized that.
    others = [
        path.with_name(path.name.rpartition("-")[0] + "-0123456789ab")
        for path in (trained, quantized)
    ]
    trained.rename(others[0])
    result = json.loads((others[0] / "result.json").read_text())
    result["run"] = "-".join(others[0].name.rsplit("-", 2)[1:])
    (others[0] / "result.json").write_text(json.dumps(result))
    others[1].mkdir()
    (others[1] / "result.json").write_text('{"steps": 10, "seconds": 1.0}')
    before = {path: path.read_bytes() for other in others for path in other.rglob("*.json*")}
    found = compare(config)
    assert found.code["versions_of_runs"] == [run_cache.code_version()]
    assert before == {
        path: path.read_bytes() for other in others for path in other.rglob("*.json*")
    }
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        path.name for path in (trained, quantized, *others)
    }


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    config = small(tmp_path / "runs", equal_time=False)
    cache = run_cache.RunCache(tmp_path / "runs", code="0" * 12)
    with (
        cache.lock(),
        pytest.raises(ValueError, match=r"another process is at work.*--output-dir .*runs-2"),
    ):
        compare(config)
    with cache.lock():  # given back
        pass
    plan(config)  # and a plan disturbs nobody


def test_the_folder_of_a_run_is_left_alone(tmp_path):
    train(digits(tmp_path, max_steps=2, estimator="ste", checkpoint_every=-1))
    for refused in (compare, plan):
        with pytest.raises(ValueError, match=r"has metrics.jsonl.*--output-dir .*-compare$"):
            refused(small(tmp_path))
    assert read_config(tmp_path).max_steps == 2


def test_a_run_is_another_one_when_its_data_files_change(tmp_path):
    file = tmp_path / "some" / "text.txt"
    file.parent.mkdir()
    hashes = set()
    for text in ("one", "two", "three"):
        file.write_text(text)
        config = RECIPES["pydoc-llama"]()
        config = replace(config, data=replace(config.data, dataset=str(file)))
        run_cache.RunCache(tmp_path, "code")
        hashes.add(run_cache.config_hash(config))
    assert len(hashes) == 3
    file.write_text("four")
    assert run_cache.config_hash(config) in hashes  # a comparison reads them once


IN_FLOAT = replace(RECIPES["digits-mlp"](), quantizer=QuantizerConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("ste", "fogso")}, "no such row: fogso; did you mean --rows fogzo?"),
        ({"rows": ("ste,fogzo",)}, "no such row: ste,fogzo; did you mean --rows ste fogzo?"),
        ({"rows": ()}, "none given"),
        ({"rows": ("ste", "fogzo", "ste")}, "--rows ste fogzo$"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"tuning_seeds": 0}, "--tuning-seeds"),
        ({"tuning_seeds": 6}, "--tuning-seeds 5"),
        ({"workers": 0}, "--workers"),
        ({"learning_rates": ()}, "empty: --learning-rates"),
        ({"learning_rates": (0.0,)}, "positive, got 0.0: --learning-rates"),
        ({"learning_rates": (0.1, -0.1)}, "positive, got -0.1"),
        ({"learning_rates": (math.nan,)}, "finite"),
        ({"learning_rates": (0.1, 0.1)}, "--learning-rates 0.1$"),
        ({"kappas": ()}, "empty: --kappas"),
        ({"kappas": (-0.1,)}, "0 or more, got -0.1: --kappas 0.01 0.1"),
        ({"kappas": (0.1,), "rows": ("ste", "ste-winq")}, "or --rows ste ste-winq fogzo$"),
        ({"base": IN_FLOAT}, "^ste ste-unmasked .* fogzo would train in float.*preset lsq"),
    ],
)  # fmt: skip
def test_a_comparison_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**{"base": RECIPES["digits-mlp"](), **changes})


@pytest.mark.parametrize("rows", [("float",), ("float", "ste-bbq")])
def test_recipes_in_float_have_rows_that_need_no_quantizer(rows, tmp_path, capsys):
    options = ("--quantizer.preset", "none", "--rows", *rows, "--max-steps", "2", "--plan")
    main(["compare", "digits-mlp", *options, "--no-equal-time", "--output-dir", str(tmp_path)])
    assert f"{25 * len(rows)} runs" in capsys.readouterr().out


def test_a_time_too_short_for_one_step_is_refused_before_anything_runs(tmp_path, monkeypatch):
    times = {"fogzo": 1.0, "fogzo-one-sided": 3.0}
    monkeypatch.setattr(module, "_seconds", lambda *_, **__: times)
    config = CompareConfig(
        base=digits(tmp_path, max_steps=2), rows=tuple(times), num_seeds=1, workers=1
    )
    with pytest.raises(ValueError, match=r"fogzo-one-sided: --max-steps 3, or --no-equal-time"):
        compare(config)
    assert not (tmp_path / "runs").exists()


def test_every_row_can_be_made_of_every_recipe():
    for make in RECIPES.values():
        recipe = make()
        for row in ROWS.values():
            changed = row.config(recipe, None)
            assert (changed.seed, changed.data, changed.model) == (
                recipe.seed,
                recipe.data,
                recipe.model,
            )


def test_bbq_has_as_many_bits_as_the_recipe():
    for preset, bits in (("sign", 1), ("ternary", 2), ("abs_max", 8), ("lsq", 2)):
        recipe = replace(RECIPES["digits-mlp"](), quantizer=QuantizerConfig(preset=preset))
        assert ROWS["ste-bbq"].config(recipe, None).quantizer.bits == bits


EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def committed(folder):
    """A comparison as it was asked for and as it was found."""
    config = json.loads((folder / "config.json").read_text())
    stored = json.loads((folder / "results.json").read_text())
    return from_dict(CompareConfig, config), Comparison.from_dict(stored), stored


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in EXPERIMENTS.glob("*/config.json")),
    ids=lambda folder: folder.name,
)
def test_committed_comparisons_of_an_earlier_version_still_load(folder):
    _, results, stored = committed(folder)
    # What is computed from the seeds is what was written beside them.
    assert_close(json.loads(dumps(results.to_dict())), stored)


# Of the first version with a kappa for all, of one without, of text, and with masks recorded.
@pytest.mark.parametrize(
    "name",
    ["mnist-mlp-adamw", "methods-mnist-mlp", "shakespeare-llama-kappa", "long-llama-identity"],
)
def test_committed_comparisons_of_an_earlier_version_still_render(name, tmp_path):
    config, results, _ = committed(EXPERIMENTS / name)
    config = replace(config, base=replace(config.base, output_dir=tmp_path))
    html = write_compare_report(config, results).read_text()
    assert html.count("<table") == 2 + bool(results.differences)


def assert_close(new, old):
    """Equal to rounding; earlier versions also wrote a bootstrap interval, called all kappa, and
    did not name the row of equal time."""
    if isinstance(new, dict):
        if "time_of" not in old:
            assert new.pop("time_of", "fogzo") == "fogzo"
        if "kappa" in old:
            assert new.pop("parameter", None) in (None, "kappa")
            old = {("value" if key == "kappa" else key): value for key, value in old.items()}
        assert set(new) == {key for key in old if not key.startswith("bootstrap")}
        for key, value in new.items():
            assert_close(value, old[key])
    elif isinstance(new, list):
        assert len(new) == len(old)
        for pair in zip(new, old, strict=True):
            assert_close(*pair)
    elif isinstance(new, float):
        assert math.isclose(new, old, rel_tol=1e-9, abs_tol=1e-12)
    else:
        assert new == old


def test_results_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"'rows' is missing, expected what `fogzo compare`"):
        Comparison.from_dict({"recipe": "digits-mlp"})


FINISHED = {"steps": 10, "seconds": 1.5, "validation_loss": 2.0, "test_loss": 2.0}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda result: [result], "it must be an object"),
        (lambda result: result | {"steps": "10"}, "steps must be an integer"),
        (lambda result: result | {"validation_loss": [2.0]}, "validation_loss must be a number"),
        (lambda result: result | {"fallbacks": {"reason": "1"}}, "fallbacks.reason must be"),
        (lambda result: {k: v for k, v in result.items() if k != "seconds"}, "seconds is missing"),
        (lambda result: {k: v for k, v in result.items() if "val" not in k}, "no validation_loss"),
        (lambda result: result | {"log_lines": 2}, "1 lines of 2"),
        (lambda result: result | {"run": 7}, "run must be a text"),
    ],
)
def test_a_result_of_another_structure_is_set_aside(damage, says, tmp_path, caplog):
    cache = run_cache.RunCache(tmp_path, code="0" * 12)
    path = cache.path("ste", "1" * 12)
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0, "seconds": 1.5}\n')
    run_cache.finish(path, digits(path), FINISHED)
    result = cache.result(path)
    assert result == FINISHED | {"run": "1" * 12 + "-" + "0" * 12, "log_lines": 1}
    (path / "result.json").write_text(json.dumps(damage(result)))
    assert cache.result(path) is None
    assert says in caplog.text
    assert not path.exists()
    [aside] = (tmp_path / "corrupt").iterdir()
    # Another one was deleted since, and the numbers of those that are left have a gap.
    aside.rename(aside.with_name(f"{path.name}-1"))
    run_cache.finish(path, digits(path), FINISHED)
    (path / "result.json").write_text("{")
    run_cache._set_aside(path)
    run_cache.finish(path, digits(path), FINISHED)
    run_cache._set_aside(path)
    assert len(list((tmp_path / "corrupt").iterdir())) == 3


@pytest.mark.parametrize("text", ["[]", '{"a": "1"}', '{"a": 0}', "{"])
def test_damaged_step_times_are_measured_again_and_that_is_said(text, tmp_path, caplog):
    (tmp_path / "timing.json").write_text(text)
    timing = run_cache.RunCache(tmp_path, code="0" * 12).timing()
    assert timing.get("a") is None
    assert "timing.json" in caplog.text
    timing.add({"a": 0.5})
    assert run_cache.RunCache(tmp_path, code="0" * 12).timing().get("a") == 0.5
