"""The synthetic experiments run, and their committed results say what the tables claim."""

import contextlib
import io
import itertools
import json
import logging
import math
import runpy
import statistics
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from in_this_process import compare_in_this_process
from scipy.stats import t as student

import fogzo
from fogzo_lab.comparison.compare import CompareConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.config import from_dict

ROOT = Path(__file__).parent.parent
PLOTS = {
    "synthetic_law": "variance.svg",
    "regression": "curves.svg",
    "dynamics": "curves.svg",
    "forwards": "forwards.svg",
}
ROWS = {"ste", "placebo", "lambda", "fogzo", "control-variate"}
ROWS |= {f"{name}-unmasked" for name in ROWS}
ROWS |= {"ste-projected", "ste-drawn", "ste-drawn-projected", "ste-drawn-adjacent"}


def folder(name):
    return ROOT / "experiments" / name.replace("_", "-")


def committed(name):
    return json.loads((folder(name) / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=PLOTS)
def quick(request, tmp_path_factory):
    """A quick run: its name, its folder and what it printed."""
    output = tmp_path_factory.mktemp(request.param)
    script = ROOT / "experiments" / f"{request.param}.py"
    command = [script, "--quick", "--output-dir", output]
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", list(map(str, command)))
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(logging.getLogger("fogzo"), "setLevel", lambda level: None)
        compare_in_this_process(patch)
        runpy.run_path(str(script), run_name="__main__")
    return request.param, output, printed.getvalue()


def structure(value):
    """Keys of a JSON value, all the way down; of a list, those of its first entry."""
    if isinstance(value, dict):
        return {key: structure(entry) for key, entry in value.items()}
    return [structure(entry) for entry in value[:1]] if isinstance(value, list) else None


def test_a_quick_run_is_quiet_and_writes_results_like_the_committed_ones(quick):
    name, output, printed = quick
    assert printed == ""
    assert {path.name for path in output.iterdir()} - {"runs"} == {"results.json", PLOTS[name]}
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert structure(results) == structure(committed(name))


@pytest.mark.parametrize("name", PLOTS)
def test_the_committed_results_are_those_of_the_scripts_settings(name):
    script, results = import_module(name), committed(name)
    settings = json.loads(json.dumps(script.asdict(script.Config())))
    assert results["config"] == settings
    assert {"date", "torch", "processor", "cores"} <= set(results["environment"])


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_small_and_drawn_the_same_every_time(name, tmp_path):
    script, results = import_module(name), committed(name)
    for path in (tmp_path / "first.svg", tmp_path / "second.svg"):
        script.plot(results, path)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert (folder(name) / PLOTS[name]).stat().st_size < 100_000


def test_plots_of_long_comparisons_are_drawn_the_same_every_time(tmp_path):
    first, *others, last = import_module("tables").LONG.values()
    for script, name in (("lengths", first), ("masked_share", "masked-share")):
        for path in (tmp_path / "first.svg", tmp_path / "second.svg"):
            import_module(script).plot(committed(name), path)
        assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    import_module("lengths").plot(committed(last), tmp_path / "last.svg")
    drawn = [folder(name) / "length.svg" for name in (first, *others, last)]
    assert max(path.stat().st_size for path in drawn) < 100_000
    assert (folder("masked-share") / "gains.svg").stat().st_size < 100_000


@pytest.mark.parametrize("name", PLOTS)
def test_a_table_is_narrow_and_dated(name):
    table = import_module(name).table(committed(name))
    assert table.rows and len(table.heading) <= 6
    assert not any("|" in cell for row in table.rows for cell in row)  # which would end a cell
    assert committed(name)["environment"]["date"] in table.caption


# The law: mean and variance on a linear loss


def test_every_committed_measurement_agrees_with_its_formula():
    results = committed("synthetic_law")
    script = import_module("synthetic_law")
    points = results["points"]
    assert results["summary"] == json.loads(json.dumps(script.summary(points)))
    for point in points:
        for kind in script.KINDS:
            assert abs(point[kind]["errors_away"]) <= script.ALLOWED_ERRORS, point
    assert {point["estimator"] for point in points} == set(script.MAKERS)
    assert {point["weights"] for point in points} >= {10, 100, 1000, 10000}
    assert {point["samples"] for point in points} >= {1, 4, 16}


def test_the_committed_measurements_could_have_told_a_wrong_formula():
    points = committed("synthetic_law")["points"]
    errors = [point["variance"]["ratio_error"] for point in points]
    assert statistics.median(errors) < 0.015
    assert max(errors) < 0.04
    # Distances of right formulas are those of a unit normal: neither all tiny nor all large.
    kinds = ("variance", "mean_along_guide", "mean_along_rest", "mean_elsewhere")
    away = [point[kind]["errors_away"] for point in points for kind in kinds]
    assert 0.8 < math.sqrt(statistics.mean(value**2 for value in away)) < 1.2


def test_the_formulas_at_one_point_by_hand():
    script = import_module("synthetic_law")
    config = script.Config(cosine=0.6, guide_norm=1.5)
    law = script.formula(script.Case("fogzo", 100, 2, 0.25), config, 1.8)
    # beta q [(d + 2) c^2 + |D|^2] + q^2 (d + kappa4 - 2) |D|^2, halved by two samples
    assert law.variance == pytest.approx((0.1875 * (102 * 0.36 + 1) + 0.0625 * 99.8) / 2)
    assert (law.mean_along_guide, law.mean_along_rest) == pytest.approx((0.6, 0.25 * 0.8))


# The regression


@pytest.fixture(scope="module")
def regression():
    return committed("regression")


def rows_of(found, budget="steps"):
    return {row["name"]: row for row in found["rows"] if row["budget"] == budget}


def test_every_row_is_tuned_on_one_grid_and_reported_on_fresh_seeds(regression):
    config = regression["config"]
    assert not set(config["seeds"]) & set(config["tuning_seeds"])
    assert len(config["seeds"]) >= 5
    for found, rates in zip(regression["settings"], config["learning_rates"], strict=True):
        assert set(rows_of(found)) == ROWS
        for row in found["rows"]:
            assert {entry[0] for entry in row["tuning_risks"]} == set(rates)
            best = min(row["tuning_risks"], key=lambda entry: entry[2])
            assert best[:2] == [row["learning_rate"], row["strength"]]
            assert len(row["risk"]["values"]) == len(config["seeds"])
            assert row["risk"]["mean"] >= found["floor"] - 1e-9


def test_probes_are_counted_and_cheaper_rows_get_their_cost_in_steps(regression):
    steps = regression["config"]["steps"]
    for found in regression["settings"]:
        usual, longer = rows_of(found), rows_of(found, "cost")
        assert usual["ste"]["forwards"] == usual["placebo"]["forwards"] == steps
        for name in ("lambda", "fogzo", "control-variate"):
            assert usual[name]["forwards"] == 3 * steps
            assert usual[name]["cost"] == 5 * steps
        for row in longer.values():
            assert abs(row["cost"] - usual["fogzo"]["cost"]) <= 3


def test_a_winner_is_named_only_where_the_interval_excludes_zero(regression):
    for found in regression["settings"]:
        rows = {(row["name"], row["budget"]): row["risk"]["values"] for row in found["rows"]}
        for entry in found["differences"]:
            own, other = rows[entry["row"], "steps"], rows[entry["other"], entry["other_budget"]]
            gaps = [a - b for a, b in zip(own, other, strict=True)]
            half = student.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
            low, high = statistics.mean(gaps) - half, statistics.mean(gaps) + half
            assert (entry["low"], entry["high"]) == pytest.approx((low, high))
            winner = entry["row"] if high < 0 else entry["other"] if low > 0 else None
            assert entry["better"] == winner


# Loss against forward passes


def point(row, samples, steps, forwards, *losses):
    keys = ("optimizer", "row", "samples", "steps", "forwards", "train_loss")
    return dict(zip(keys, ("adamw", row, samples, steps, forwards, list(losses)), strict=True))


def test_what_spsa_pays_for_fogzos_loss_by_hand():
    script = import_module("forwards")
    points = [
        point("fogzo", 1, 10, 50, 0.9, 1.1),
        point("fogzo", 10, 10, 230, 0.1),
        point("ste", 1, 10, 30, 0.5),
        point("spsa", 1, 100, 100, 3.0),
        point("spsa", 1, 10_000, 10_000, 1.0),
        point("spsa", 4, 100, 1_000, 2.0),
        point("spsa", 4, 100_000, 100_000, 0.5, 0.7),
        point("spsa", 9, 25, 900_000, 2.5),
    ]
    one, ten = script.equal_loss(points)
    assert (one["train_loss"], one["spsa_samples"]) == (1.0, 1)
    assert one["spsa_forwards"] == pytest.approx(10_000)
    assert one["ratio"] == pytest.approx(200)
    assert (ten["ratio"], ten["lowest_spsa_loss"]) == (None, 0.6)
    # The dearest run is far from that loss, and bounds nothing.
    assert (ten["lowest_spsa_samples"], ten["lowest_spsa_forwards"]) == (4, 100_000)
    assert ten["lowest_spsa_ratio"] == pytest.approx(100_000 / 230)


def test_the_table_claims_of_an_unreached_loss_only_what_the_nearest_run_shows():
    script, results = import_module("forwards"), committed("forwards")
    assert results["equal_loss"] == script.equal_loss(results["points"])
    for entry, row in zip(results["equal_loss"], script.table(results).rows, strict=True):
        if entry["ratio"] is None:
            nearest = [
                p
                for p in results["points"]
                if (p["row"], p["optimizer"]) == ("spsa", entry["optimizer"])
                and statistics.fmean(p["train_loss"]) == entry["lowest_spsa_loss"]
            ]
            (samples, forwards), *others = [(p["samples"], p["forwards"]) for p in nearest]
            assert not others and f"{forwards:,}" in row[4]
            assert row[5] == f"n = {samples}: not within {forwards / entry['forwards']:.0f}"


def test_a_price_between_two_runs_is_read_on_a_log_scale():
    script = import_module("forwards")
    curve = [point("spsa", 1, 0, 100, 3.0), point("spsa", 1, 0, 10_000, 1.0)]
    assert script.price(curve, 2.0) == pytest.approx(1000)
    assert script.price(curve, 3.5) == 100
    assert script.price(curve, 0.9) is None


def test_committed_points_are_all_that_the_settings_ask_for():
    script = import_module("forwards")
    points = committed("forwards")["points"]
    asked = {(c.optimizer, c.samples, c.steps, r) for c in script.Config().cells() for r in c.rows}
    assert {(p["optimizer"], p["samples"], p["steps"], p["row"]) for p in points} == asked
    assert all(len(p["train_loss"]) >= 3 for p in points)
    for p in points:
        extra = {"spsa": 2, "fogzo": 2, "control-variate": 2}.get(p["row"], 0) * p["samples"]
        assert p["forwards"] == p["steps"] * (3 + extra)


# The paper's comparisons


PAPER = import_module("paper").comparisons()


@pytest.mark.parametrize("name", PAPER)
def test_a_committed_comparison_is_the_one_that_the_script_runs(name):
    stored = json.loads((folder(name) / "config.json").read_text(encoding="utf-8"))
    how = {key: stored.get(key, False) for key in ("workers", "mix_versions")}
    config = replace(PAPER[name], **how)
    assert from_dict(CompareConfig, stored) == config  # options since then have their defaults
    results = committed(name)
    assert {row["name"] for row in results["rows"]} == set(config.rows)
    assert all(len(row["seeds"]) == config.num_seeds for row in results["rows"])
    # Those that keep their runs may be extended by later code.
    assert len(results["code"]["versions_of_runs"]) == 1 or name.startswith("long-")
    grids = [{rate for rate, _ in r["validation_loss_by_learning_rate"]} for r in results["rows"]]
    assert all(grid == grids[0] for grid in grids)
    assert {"ste", "ste-unmasked", "placebo", "fogzo"} <= set(config.rows)


def test_every_line_of_the_verdicts_is_a_committed_comparison():
    networks = import_module("tables").NETWORKS
    folders = [folder for quantizers in networks.values() for folder in quantizers.values()]
    assert set(folders) <= set(PAPER)
    assert len(set(folders)) == len(folders)


# The doctor


def test_the_doctor_names_the_committed_illnesses_and_no_healthy_run():
    script, results = import_module("doctor"), committed("doctor")
    assert results["config"] == json.loads(json.dumps(script.asdict(script.Config())))
    assert results["thresholds"] == script.THRESHOLDS
    for row in results["rows"]:
        case = script.CASES[row["name"]]
        assert len(row["runs"]) == len(results["config"]["seeds"])
        if case.expected is not None:
            first = [(*run["findings"], "")[0] for run in row["runs"]]
            assert first == [case.expected] * len(first), row["name"]


def test_the_doctors_experiment_runs():
    quick, results = (
        import_module("doctor").measure(import_module("doctor").QUICK),
        committed("doctor"),
    )
    for part in ("thresholds", "costs"):
        assert structure(quick[part]) == structure(results[part])
    assert quick["rows"][0]["runs"][0].keys() == results["rows"][0]["runs"][0].keys()


# Prediction


def test_measuring_agreements_runs_and_leaves_the_training_as_it_was():
    script, results = import_module("prediction"), committed("prediction")
    assert results["config"] == json.loads(json.dumps(script.asdict(script.FULL)))
    quick = script.measure(script.QUICK)
    assert structure(quick["rows"]) == structure(results["rows"])
    case = script.CASES["digits-lsq"]
    settings = replace(
        script.recipe("digits"), quantizer=case.quantizer, estimator="ste", max_steps=8
    )
    observed, points = script.train(settings, 2)
    alone, _ = script.train(settings, 0)
    assert len(points) == 4
    for one, other in zip(observed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


# What to make of a measured agreement


def test_rules_for_agreements_run_and_measure_what_the_committed_ones_did(tmp_path, monkeypatch):
    script, results = import_module("agreement"), committed("agreement")
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--quick", "--output-dir", str(tmp_path)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    script.main()
    quick = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for part in ("toy", "regression"):
        assert structure(quick[part]) == structure(results[part])
        assert {row["rule"] for row in quick[part]} == set(script.RULES)
        assert all(math.isfinite(row["mean"]) for row in quick[part])
    recipe = replace(RECIPES["digits-mlp"](), max_steps=2)
    (accuracy,) = script.accuracy("shrunk by 1 error", recipe, range(1))
    assert 0 < accuracy < 100


def test_the_rule_of_two_errors_is_the_librarys():
    script = import_module("agreement")
    pairs = list(itertools.product((-3.0, -0.9, -0.3, 0.2, 1.3, 4.0), (0.0, 0.1, 0.4, 2.0)))
    two = script.shrunk_by(2)
    assert [two(*pair) for pair in pairs] == [script.shrink(*pair) for pair in pairs]
    assert [script.shrunk_by(n)(2.0, 0.4) for n in (1, 2, 3)] == pytest.approx([1.84, 1.36, 1.0])


# Masked weights


def test_gains_by_masked_share_are_those_of_the_kept_runs():
    script, results = import_module("masked_share"), committed("masked_share")
    assert script.collect() == results
    assert {point["network"] for point in results["points"]} == set(script.NETWORKS)
    for name, (where, _) in script.NETWORKS.items():
        for row in committed(where)["rows"]:
            if row["name"] in script.OTHERS:
                gains = [
                    point["gains"][row["name"]]
                    for point in results["points"]
                    if (point["network"], point["learning_rate"]) == (name, row["learning_rate"])
                    and row["name"] in point["gains"]
                ]
                assert len(gains) >= 2


def test_agreements_of_long_comparisons_are_those_of_the_kept_runs():
    script, results = import_module("agreement_scatter"), committed("agreement_scatter")
    assert script.collect() == results["comparisons"]
    assert set(results["short"]) == set(script.SHORT)


def test_a_short_run_tells_the_error_of_the_weights_from_that_with_inputs():
    script, results = import_module("agreement_scatter"), committed("agreement_scatter")
    recipe = replace(RECIPES["digits-mlp"](), batch_size=8)  # no transformer, which imports slowly
    alone, both = (
        script.short_run(fogzo.lsq(2), activations, recipe, steps=4, measured=3)
        for activations in (None, fogzo.lsq(2))
    )
    for found in (alone, both):
        assert structure(found) == structure(results["short"]["LSQ, W2"])
        assert found["steps"] == 3 and 0 < found["error"] < math.inf
    assert (alone["error"], alone["far"]) == (alone["error_with_inputs"], alone["far_with_inputs"])
    assert both["error_with_inputs"] != both["error"]


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_error_of_the_weights_does_not_depend_on_what_inputs_add(factor):
    script, found = import_module("agreement_scatter"), []
    for variance in (0.0, 1e6):
        draws = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(100_000, generator=draws))
        target = torch.randn(100_000, generator=draws)

        def loss(weight=weight, target=target):
            return 0.5 * ((weight / 0.25).round() * 0.25 - target).square().sum()

        estimator = script._Both([("weight", weight, 0.25)], noise_share=0.0)
        if variance:
            estimator._rounds_inputs = True
            estimator.load_state_dict({**estimator.state_dict(), "input_variance": variance})
        weight.grad = ((weight / 0.25).round() * 0.25 - target).detach() / factor
        stats = estimator.refine_grads_(loss)
        found.append((estimator.of_weights, stats.agreement, stats.agreement_error))
    (alone, agreement, error), (of_weights, same, with_inputs) = found
    assert agreement == same == pytest.approx(factor, rel=0.2)
    assert alone == of_weights == error < 1 < with_inputs


def test_a_mean_over_seeds_is_ranked_and_a_rate_without_a_row_is_left_out():
    script = import_module("masked_share")
    points = [
        {"network": "DeiT", "learning_rate": rate, "seed": seed, "masked": share, "gains": gains}
        for rate, share, gains in (
            (1e-3, 0.1, {"fogzo": 0.0, "placebo": 0.3}),
            (1e-2, 0.5, {"fogzo": 0.1, "placebo": 0.2}),
            (1e-1, 0.9, {"fogzo": 0.2, "placebo": 0.1}),
            (1.0, 0.95, {"placebo": 0.0}),
        )
        for seed in (0, 1)
    ]
    found = script.correlations(points)
    assert found == {
        "fogzo": {"rank_correlation": 1.0, "p": 0.0, "points": 3},
        "placebo": {"rank_correlation": -1.0, "p": 0.0, "points": 4},
    }
    table = script.table({"points": points, "correlations": found})
    assert len(table.rows) == 4 and table.rows[3][4] == ""


# Few numbers


def test_rules_for_few_numbers_run_and_measure_what_the_committed_ones_did():
    script, results = import_module("few_numbers"), committed("few_numbers")
    assert results["config"] == json.loads(json.dumps(script.asdict(script.FULL)))
    quick = json.loads(json.dumps(script.measure(script.QUICK, workers=1)))
    for entry in (*quick["networks"], *results["networks"]):
        for rule in entry["rules"]:
            for seed in rule["seeds"]:
                score = {"test_perplexity", "test_accuracy"} & seed.keys()
                assert seed.pop(score.pop()) > 0
                assert not score
    assert structure(quick["networks"]) == structure(results["networks"])


def test_the_slope_along_step_sizes_is_their_derivative():
    script = import_module("few_numbers")
    training = script.Training(
        script.recipe(script.QUICK.networks[0], seed=0), script.Ranks(torch.device("cpu"))
    )
    rule = script.Measured(training, h=1e-3)
    before = [step.detach().clone() for step in rule.steps]
    # A loss whose derivative by the logarithm of each step size is that step size.
    rule.refine_grads_(lambda: sum(step.sum() for step in rule.steps))
    assert all(map(torch.equal, rule.steps, before))
    signs = [layer_sign(rule, i) for i in range(len(before))]
    slope = sum(sign * step for sign, step in zip(signs, before, strict=True))
    for layer, step, sign in zip(rule.layers, rule.steps, signs, strict=True):
        factor = layer.quantizer.scale.grad_scale(layer.weight.numel(), layer.quantizer.grid)
        assert torch.allclose(step.grad, factor * slope * sign / step, rtol=1e-3)


def layer_sign(rule, i):
    """The sign that a step size was moved by, as all of one slope's gradients share the slope."""
    return (rule.steps[i].grad * rule.steps[0].grad).sign()


# Draws and forgetting


@pytest.mark.parametrize("name", ["latents", "forgetting"])
def test_a_quick_run_measures_what_the_committed_one_does(name):
    script, results = import_module(name), committed(name)
    assert results["config"] == json.loads(json.dumps(script.asdict(script.Config())))
    quick = json.loads(json.dumps(script.measure(script.QUICK, workers=1)))
    if name == "forgetting":  # by how many pairs of forward passes
        for entry in (*quick["tasks"], *results["tasks"]):
            entry["cosines"] = sorted(map(type, entry["cosines"].values()), key=str)
    assert structure(quick) == structure(results)


def test_samples_cut_the_toys_variance_by_the_formula_and_leave_its_bias():
    points = committed("latents")["toy"]
    for point in points:
        assert point["variance"] == pytest.approx(point["predicted"], rel=0.03)
        same = [p for p in points if p["temperature"] == point["temperature"]]
        error = max(p["bias_error"] for p in same)
        assert max(p["bias"] for p in same) - min(p["bias"] for p in same) < 3 * error


def test_learning_rates_of_the_autoencoder_are_tuned_and_reported_on_other_seeds():
    results = committed("latents")
    assert not set(results["config"]["seeds"]) & set(results["config"]["tuning_seeds"])
    for row in results["rows"]:
        assert row["learning_rate"] == min(row["tuned"], key=lambda entry: entry[1])[0]
        assert len(row["bound"]) == len(results["config"]["seeds"]) >= 6


def test_the_page_of_discrete_variables_says_what_was_measured():
    page = (ROOT / "docs" / "discrete.md").read_text(encoding="utf-8")
    gaps = {(gap["row"], gap["other"]): gap for gap in committed("latents")["differences"]}
    best = gaps["reinmax at 1", "st at 1"]
    assert best["high"] < 0 and f"{-best['mean']:.3f}"[1:] + " nats below" in page
    means = {row["name"]: statistics.mean(row["bound"]) for row in committed("latents")["rows"]}
    ranks = sorted(means, key=means.get)
    assert ranks[0] == "reinmax at 1"
    assert set(ranks[1:3]) == {"gumbel_rao-10 at 0.1", "gumbel_rao-10 at 0.5"}
    assert gaps["gumbel_rao-1 at 0.1", "st at 1"]["low"] > 0
    assert gaps["gumbel_rao-10 at 0.1", "st at 1"]["high"] < 0
    at_one = gaps["gumbel_rao-10 at 1", "gumbel_rao-1 at 1"]
    assert at_one["low"] < 0 < at_one["high"]


def scores_after(task, row, score):
    (found,) = [entry for entry in committed("forgetting")["tasks"] if entry["task"] == task]
    return statistics.mean(found["rows"][row][score])


def test_the_graphs_canaries_are_forgotten_and_its_facts_kept():
    assert scores_after("graph-4", "forget", "forget") < 0.1
    assert scores_after("graph-4", "forget", "keep") > 0.93
    assert scores_after("graph-4", "random", "forget") > 0.8


def test_the_page_of_forgetting_says_what_was_measured():
    page = (ROOT / "docs" / "forgetting.md").read_text(encoding="utf-8")
    prose = " ".join(line for line in page.splitlines() if not line.startswith("|"))
    said = {
        ("graph-4", "original", "forget"), ("graph-4", "forget", "forget"),
        ("graph-4", "original", "auc"), ("graph-4", "forget", "auc"), ("graph-4", "neggrad", "auc"),
        ("graph-4", "random", "forget"), ("digits-2", "forget-keep", "auc"),
        ("digits-2", "retrained", "auc"),
    }  # fmt: skip
    for task, row, score in said:
        assert f"{scores_after(task, row, score):.3f}".removeprefix("0") in prose, (
            task,
            row,
            score,
        )
    for row in ("original", "forget"):
        assert f"{100 * scores_after('digits-2', row, 'test'):.1f}%" in prose
    gaps = {
        (entry["task"], gap["row"], gap["other"], gap["score"]): gap
        for entry in committed("forgetting")["tasks"]
        for gap in entry["differences"]
    }
    kept = gaps["graph-4", "forget", "no-fisher", "keep"]
    lost = gaps["graph-4", "forget", "neggrad", "keep"]
    assert f"{kept['mean']:.3f}"[1:] in prose and f"{-lost['mean']:.3f}"[1:] in prose
    for task in ("graph-4", "graph-2", "digits-2"):  # keeps more and hides less in all three
        assert all(gaps[task, "forget", "neggrad", score]["high"] < 0 for score in ("keep", "auc"))
    fisher = gaps["digits-2", "forget", "no-fisher", "keep"]
    assert fisher["low"] < 0 < fisher["high"]


def test_every_edit_of_the_committed_runs_reached_its_target():
    for task in committed("forgetting")["tasks"]:
        assert len(task["targets"]) == len(task["reports"]) >= 6
        for target, reports in zip(task["targets"], task["reports"], strict=True):
            assert all(report["reached"] for report in reports.values())
            assert all(report["forget_after"] >= target for report in reports.values())
