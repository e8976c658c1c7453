"""The theory of the regression: against formulas, against runs, and against what was committed."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import regression_runs as runs
import torch

import fogzo
from fogzo_lab.dynamics import Regression, batches, gaussian_closure, regression_dynamics, simulate
from fogzo_lab.dynamics.probes import measure
from toolbox import every

ROOT = Path(__file__).parent.parent.parent
BASE = Regression(omega=2.0, learning_rate=0.1)
LATE = [0.0, 3000.0]


def committed(name):
    return json.loads((ROOT / "experiments" / name / "results.json").read_text(encoding="utf-8"))


# Against formulas

SETTINGS = {
    "2 bits": BASE,
    "3 bits": replace(BASE, bits=3),
    "quantized inputs": replace(BASE, input_bits=2),
    "noise": replace(BASE, omega=1.5, label_noise=0.3),
    "a teacher beyond the range": replace(BASE, teacher=3.0),
    "all of it": replace(BASE, bits=3, input_bits=3, teacher=-0.7, batch_size=4),
}


@every("setting", SETTINGS)
def test_ste_stops_where_the_formula_says_to_four_digits(setting):
    (_, last) = regression_dynamics(setting, LATE, cells=48).risk
    assert last == pytest.approx(setting.fixed_point_risk, abs=5e-5)
    assert setting.fixed_point_risk >= setting.least_risk - 1e-12


def test_even_where_cells_are_wider_than_the_cusp():
    setting = replace(BASE, batch_size=10_000)
    assert regression_dynamics(setting, LATE, cells=8).risk[-1] == pytest.approx(1 / 3, abs=5e-5)


def test_a_fixed_point_and_a_floor_by_hand():
    # Levels at 2/3 and 2 around a teacher of 1.
    assert BASE.fixed_point_risk == pytest.approx(1 / 3) and BASE.least_risk == pytest.approx(1 / 9)
    assert replace(BASE, omega=3.0).fixed_point_risk == pytest.approx(0)  # it is a level itself
    assert replace(BASE, input_bits=2).input_moments == pytest.approx((0.96928, 1.09306), abs=5e-6)


def test_more_training_is_worse_under_ste_and_not_when_levels_are_drawn():
    setting = replace(BASE, learning_rate=0.05)
    early, late = regression_dynamics(setting, [0, 30, 150]).risk[1:]
    assert (early, late) == pytest.approx((0.162, 0.333), abs=2e-3)
    for rounding in ("drawn", "adjacent"):
        drawn = regression_dynamics(replace(setting, rounding=rounding), [0, 30, 150, 1000])
        assert (np.diff(drawn.risk) < 2e-4).all() and drawn.risk.min() > setting.least_risk - 1e-4
        assert drawn.risk[-1] == pytest.approx(setting.least_risk, abs=2e-4)
    assert drawn.trained_risk[-1] == pytest.approx(0.1413, abs=2e-3)  # adjacent ends near a level


def test_without_quantization_to_speak_of_it_is_the_exact_solution():
    # Many fine levels: w relaxes to 1 with the rate eta, and E = E (w - 1)^2 obeys one ODE.
    setting = Regression(omega=6.0, bits=8, learning_rate=0.2, batch_size=2)
    times = np.linspace(0, 10, 6)
    eta, b = setting.learning_rate, setting.batch_size
    exact = 2 * np.exp((-2 * eta + eta**2 / b) * times)
    np.testing.assert_allclose(regression_dynamics(setting, times, cells=4).risk, exact, rtol=4e-3)


def test_grid_and_time_are_fine_enough():
    times = np.linspace(0, 30, 7)
    usual = regression_dynamics(BASE, times).risk
    fine = regression_dynamics(BASE, times, cells=384, time_steps=1600).risk
    assert np.abs(usual - fine).max() < 5e-4


def test_the_gaussian_closure_has_the_shape_and_not_the_numbers():
    times = [0, 5, 10, 15, 20, 25, 30]
    theory, closed = regression_dynamics(BASE, times).risk, gaussian_closure(BASE, times).risk
    assert closed == pytest.approx([2.093, 0.919, 0.351, 0.180, 0.165, 0.175, 0.187], abs=6e-4)
    assert 0.05 < np.abs(closed - theory).max() < 0.1
    assert closed.argmin() < 6 and theory.argmin() < 6
    for other in ({"masked": True}, {"rounding": "drawn"}, {"projected": True}):
        with pytest.raises(ValueError, match=r"regression_dynamics.* has no such limit"):
            gaussian_closure(replace(BASE, **other), times)


def test_weights_are_neither_lost_nor_made_and_walls_hold_them():
    times = [0.0, 5.0, 30.0]
    for options in ({}, {"masked": True}, {"projected": True}, {"teacher": "normal"}):
        curve = regression_dynamics(replace(BASE, **options), times)
        density = curve.density
        width = density.weights[1] - density.weights[0]
        assert density.density.sum() * width == pytest.approx(1, abs=1e-9)
        assert density.density.min() > -1e-9
        if options.get("projected"):
            assert curve.outside.max() < 1e-12
        elif options.get("masked"):
            assert (np.diff(curve.outside) > 0).all()  # none comes back


def test_the_first_agreement_is_the_density_at_thresholds():
    curve = regression_dynamics(BASE, [0.0, 1e-3], weights=10**10)
    bells = np.exp(-(BASE.thresholds**2) / 2).sum() / math.sqrt(2 * math.pi)
    assert curve.agreement[0] == pytest.approx(BASE.spacing * bells, rel=1e-3)


def test_a_probe_at_a_cusp_measures_less_on_fewer_weights_and_pushes_them_off():
    # An even density has agreement 1 whatever d; one that falls away on both sides has less.
    edges = np.linspace(-2, 2, 4001)
    w = (edges[1:] + edges[:-1]) / 2
    for scale, less in ((1e9, False), (0.02, True)):
        mass = sum(np.exp(-np.abs(w - t) / scale) for t in BASE.thresholds)[None]
        mass = mass / mass.sum()
        few, many = (
            measure(BASE, d, edges, mass, np.ones(1), 0.3, 0.0)[0].mean for d in (10**3, 10**8)
        )
        assert (few < 0.8 * many) == less
    # A teacher on the level 1: beyond both thresholds of its cell the loss is higher.
    own = replace(BASE, omega=3.0, batch_size=32)
    _, push = measure(own, 1000, edges, mass, np.ones(1), 0.01, 0.0)
    inside = (w > 0.002) & (w < 1.998)
    assert (push[0, inside & (w < 0.02)] > 0).all() and (push[0, inside & (w > 1.98)] < 0).all()
    assert np.abs(push[0, (w > 0.1) & (w < 1.9)]).max() < 1e-4 * np.abs(push).max()


# Against runs


def test_a_run_follows_it():
    setting = replace(BASE, batch_size=4, learning_rate=0.4)
    times = np.linspace(0, 5, 6)
    for options in ({"masked": True}, {"rounding": "adjacent"}):
        own = replace(setting, **options)
        gap = simulate(own, times, weights=100, seed=0).risk - regression_dynamics(own, times).risk
        assert np.sqrt((gap**2).mean()) < 3 / math.sqrt(100)


def test_an_estimator_of_ones_own_is_tried_where_the_curve_is_known():
    setting = replace(BASE, batch_size=8, learning_rate=1.0)
    times = [0.0, 0.2, 0.5]
    state = torch.random.get_rng_state()
    own = simulate(
        setting,
        times,
        weights=100,
        seed=1,
        estimator=lambda weights, steps: fogzo.FogzoEstimator(
            weights,
            noise_share=fogzo.linear_noise_share(total_steps=steps, kappa=1.0),
            noise_shape="isotropic",
            agreement="measured",
            seed=1,
        ),
    )
    same = simulate(replace(setting, estimator="fogzo", kappa=1.0), times, weights=100, seed=1)
    assert np.array_equal(own.risk, same.risk) and np.isfinite(own.agreement[1:]).all()
    assert torch.equal(state, torch.random.get_rng_state())
    data = list(batches(setting, 100, 50, seed=1))
    again = simulate(
        replace(setting, estimator="fogzo", kappa=1.0), times, weights=100, seed=7, data=data
    )
    assert len(data) == 51 and not np.array_equal(again.risk, np.zeros(3))


def test_levels_are_drawn_independently_of_the_data():
    uniforms = []

    def look(weights, steps):
        uniforms.append(torch.rand(1000))

    simulate(replace(BASE, rounding="drawn"), [0, 0.001], weights=1000, seed=3, estimator=look)
    start, _ = next(batches(BASE, 1000, 1, seed=3))
    for of_start in (start[0], start[0].abs()):
        correlation = torch.corrcoef(torch.stack([uniforms[0], of_start]))[0, 1]
        assert correlation.abs() < 0.1


# Against what was committed

STE_ROWS = {"ste": "masked", "ste-unmasked": "unmasked"}


def test_the_four_ste_rows_are_within_the_spread_of_the_seeds():
    results, found = committed("regression"), []
    config = results["config"]
    for setting in results["settings"]:
        for row in setting["rows"]:
            if row["name"] in STE_ROWS and row["budget"] == "steps":
                problem = Regression(
                    omega=setting["omega"],
                    learning_rate=row["learning_rate"] * config["weights"],
                    batch_size=config["batch_size"],
                    label_noise=config["label_noise"],
                    masked=row["name"] == "ste",
                )
                theory = regression_dynamics(problem, [0, config["steps"] / config["weights"]])
                assert abs(theory.risk[-1] - row["risk"]["mean"]) < row["risk"]["sd"]
                found.append(theory.risk[-1])
    assert sorted(found) == pytest.approx([0.0041, 0.162, 0.389, 0.702], abs=2e-3)


def test_all_rows_with_a_theory_are_within_two_standard_deviations_of_a_seed():
    rows = [row for setting in committed("regression")["settings"] for row in setting["rows"]]
    away = {
        (row["name"], row["budget"]): abs(row["theory"]["risk"] - row["risk"]["mean"])
        / max(row["risk"]["sd"], 1e-4)
        for row in rows
        if row["theory"] is not None
    }
    assert len(away) == 16 and max(away.values()) < 2
    assert sum(distance < 1 for distance in away.values()) >= 13


def test_the_committed_theory_is_this_one():
    results = committed("regression")
    config = runs.Config(**results["config"])
    for setting in results["settings"]:
        for name in ("ste", "ste-drawn-adjacent"):
            (row,) = (r for r in setting["rows"] if (r["name"], r["budget"]) == (name, "steps"))
            assert runs.theory(row, setting["omega"], config)["risk"] == pytest.approx(
                row["theory"]["risk"], abs=1e-6
            )


def test_the_distance_from_theory_falls_with_the_root_of_d():
    sizes = committed("dynamics")["sizes"]
    assert {entry["weights"] for entry in sizes} == {100, 300, 1000, 3000}
    for entry in sizes:
        assert 0.7 < entry["rms_times_root"] < 1.4
    assert sizes[0]["rms"] > 3 * sizes[-1]["rms"]


def test_agreements_in_settings_that_the_theory_was_not_made_on():
    entries = committed("dynamics")["agreements"]
    for entry in entries:
        risks = np.array([run[-1] for run in entry["measured"]])
        found = np.array([run[-1] for run in entry["agreements"]])
        assert abs(entry["theory"][-1] - risks.mean()) < max(1.5 * risks.std(ddof=1), 3e-3)
        assert abs(entry["theory_agreement"] - found.mean()) < 2 * found.std(ddof=1)
        assert found.mean() == pytest.approx(entry["theory_agreement"], rel=0.12)
    # Which the density at thresholds alone does not give.
    first_orders = {entry["name"]: entry["first_order"] for entry in entries}
    assert first_orders["range 2"] > 6 and first_orders["range 3"] < 1


def test_the_papers_figure_setting():
    (found,) = committed("dynamics")["figure"]
    assert found["setting"]["input_bits"] == 2 and found["times"][1:] == [10, 25, 50]
    for theory, measured in zip(found["theory"], found["measured"][0], strict=True):
        assert measured == pytest.approx(theory, abs=2.2 / math.sqrt(3000))


def test_the_page_says_what_was_computed_and_measured():
    page = " ".join((ROOT / "docs" / "dynamics.md").read_text(encoding="utf-8").split())
    early, late = regression_dynamics(replace(BASE, learning_rate=0.05), [0, 30, 150]).risk[1:]
    assert f"the risk is {early:.3f} at tau = 30 and {late:.3f} at tau = 150" in page
    (setting,) = (s for s in committed("regression")["settings"] if s["omega"] == 2)
    risks = {r["name"]: r["risk"]["mean"] for r in setting["rows"] if r["budget"] == "steps"}
    gain = f"from {risks['ste-unmasked']:.2f} to {risks['ste-drawn']:.3f}"
    assert f"{gain} with the floor at {setting['floor']:.3f}" in page
    added = [d for d in setting["differences"] if d["row"] == "ste-drawn-adjacent"]
    drawn = {"ste-drawn", "ste-drawn-projected"}
    assert all(d["better"] is None for d in added if d["other"] in drawn)
    (gained,) = (
        d
        for d in setting["differences"]
        if (d["row"], d["other"], d["other_budget"]) == ("ste-drawn", "ste-unmasked", "steps")
    )
    assert gained["better"] == "ste-drawn"


# Bad input

WRONG = {
    "omega": [0.0, -1.0, math.nan, "2"],
    "learning_rate": [0.0, math.inf, True],
    "bits": [0, 9, 2.5],
    "batch_size": [0, 1.5],
    "label_noise": [-0.1, math.nan],
    "teacher": ["uniform", math.inf],
    "rounding": ["floor"],
    "input_bits": [0],
    "estimator": ["spsa"],
    "kappa": [-1.0, 1.0],  # of STE
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_wrong_setting_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}[ =].*got .*: ") as error:
        replace(BASE, **{name: value})
    assert "\n" not in str(error.value)


def test_settings_without_a_meaning_or_a_theory_are_refused():
    with pytest.raises(ValueError, match="masked=False with rounding='adjacent'"):
        replace(BASE, rounding="adjacent", masked=True)
    with pytest.raises(ValueError, match="theory of fogzo is that of weights rounded to the near"):
        replace(BASE, estimator="fogzo", rounding="drawn")
    with pytest.raises(ValueError, match="no one level or threshold"):
        assert replace(BASE, teacher="normal").fixed_point_risk


def test_what_theory_cannot_tell_is_said():
    times = [0.0, 10.0]
    for wrong in ([0.0], [1.0, 2.0], [0.0, 2.0, 1.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match="times must ascend from 0"):
            regression_dynamics(BASE, wrong)
    with pytest.raises(ValueError, match="cells must be even and 4 or more"):
        regression_dynamics(BASE, times, cells=7)
    for weights in (0, -5, 10.0, True):
        for solve in (regression_dynamics, partial(simulate, seed=0)):
            with pytest.raises(ValueError, match=r"weights must be a positive integer, got"):
                solve(BASE, times, weights=weights)
    for name in ("cells", "time_steps", "nodes"):
        with pytest.raises(ValueError, match=rf"{name} must be"):
            regression_dynamics(replace(BASE, teacher="normal"), times, **{name: 0})
    with pytest.raises(ValueError, match=r"depends on the number of weights.*weights=1000"):
        regression_dynamics(replace(BASE, estimator="fogzo"), times)
    with pytest.raises(ValueError, match=r"weights spread beyond .*smaller learning_rate"):
        regression_dynamics(replace(BASE, learning_rate=40.0), times)
    narrow = replace(BASE, estimator="fogzo", learning_rate=0.5, batch_size=1000)
    with pytest.raises(ValueError, match=r"less than half a cell.*more cells"):
        regression_dynamics(narrow, [0.0, 6.0], weights=1000)


def test_a_run_says_what_it_was_given_amiss():
    times = [0.0, 1.0]
    short = list(batches(BASE, 10, 5, seed=0))
    for given, says in (
        ({"seed": 0.5}, "seed must be an integer"),
        ({"data": short, "weights": 20}, r"data are of 10 weights, and the run is of 20"),
        ({"data": short}, r"data end after 6 of the 11 pairs.*data=list\(batches\("),
        ({"estimator": fogzo.FogzoEstimator}, r"estimator=lambda weights, steps: fogzo\.Fogzo"),
        ({"estimator": "fogzo"}, "expected a function"),
        ({"estimator": lambda weights, steps: "fogzo"}, "'fogzo', which has no refine_grads_"),
    ):
        with pytest.raises(ValueError, match=says):
            simulate(BASE, times, **{"weights": 10, "seed": 0, **given})
    noisy = replace(BASE, estimator="placebo", kappa=1.0)
    for setting in (BASE, noisy):
        with pytest.raises(ValueError, match=r"times end at 0\.01, .* before the first step"):
            simulate(setting, [0.0, 0.01], weights=10, seed=0)
