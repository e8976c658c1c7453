"""Steps whose gradient could not be refined are counted, and said."""

import json
from dataclasses import replace

import pytest
from in_this_process import compare_in_this_process

from fogzo.estimators import GradientEstimator
from fogzo_lab.cli import display
from fogzo_lab.comparison import tables as comparison
from fogzo_lab.comparison.compare import CompareConfig, compare
from fogzo_lab.comparison.report import write_compare_report, write_train_report
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.loop import train
from fogzo_lab.training.run_folder import read_metrics

REASON = "no weight rounds differently"


@pytest.fixture
def falls_back_in_every_third_step(monkeypatch):
    refine = GradientEstimator.refine_grads_

    def refine_grads_(self, *arguments, **options):
        stats = refine(self, *arguments, **options)
        return replace(
            stats,
            fallback=None if stats.step % 3 else REASON,
            agreement=stats.agreement if stats.step % 3 else None,
            noise_share=None,  # as estimators have it that follow none
            kappa=None,
        )

    monkeypatch.setattr(GradientEstimator, "refine_grads_", refine_grads_)


def recipe(folder, **changes):
    return replace(RECIPES["digits-mlp"](), output_dir=folder, max_steps=10, **changes)


def test_a_run_counts_every_step_whether_it_is_logged_or_not(
    tmp_path, falls_back_in_every_third_step, capsys
):
    config = recipe(tmp_path, checkpoint_every=5, log_every=100)
    result = train(config)
    assert (result["refined_steps"], result["fallbacks"]) == (10, {REASON: 4})
    resumed = train(replace(config, resume=True))
    assert resumed == result | {"seconds": resumed["seconds"]}
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [(m["fallback"], m["kappa"]) for m in metrics] == [(REASON, None)] * 2
    sentence = f"4 of 10 refined steps kept STE's gradient: {REASON}."
    display.train_result(result, write_train_report(config, metrics, result))
    assert sentence in capsys.readouterr().out
    assert sentence.replace("'", "&#39;") in (tmp_path / "report.html").read_text()


def test_steps_between_probes_and_runs_that_measure_nothing_are_not_counted(tmp_path):
    every_fourth = train(recipe(tmp_path / "a", probe_every=4, checkpoint_every=-1))
    assert every_fourth["refined_steps"] == 3
    assert "fallbacks" not in every_fourth
    assert comparison.fallback_words(3, every_fourth.get("fallbacks", {})) == ""
    for estimator in ("ste", "placebo"):
        assert "refined_steps" not in train(
            recipe(tmp_path / estimator, estimator=estimator, checkpoint_every=-1)
        )


def test_a_comparison_adds_up_the_steps_of_its_seeds(tmp_path, capsys, monkeypatch):
    compare_in_this_process(monkeypatch)
    config = CompareConfig(
        base=recipe(tmp_path, log_every=5), rows=("ste", "fogzo"), learning_rates=(1e-2,),
        num_seeds=2, equal_time=False, workers=1,
    )  # fmt: skip
    compare(config)
    for path in tmp_path.glob("runs/fogzo-*/result.json"):
        result = json.loads(path.read_text())
        counts = {REASON: 3, "a probe loss is not finite": 1} if "seed1" in str(path) else {}
        path.write_text(json.dumps(result | {"fallbacks": counts}))
    for path in tmp_path.glob("runs/ste-*/result.json"):  # as of before there were counts
        assert "refined_steps" not in path.read_text()
    results = compare(config)
    ste, fogzo = results.rows
    assert fogzo.fallbacks == {REASON: 3, "a probe loss is not finite": 1}
    assert fogzo.refined_steps == 20
    assert "fallbacks" not in ste.to_dict()
    sentence = (
        f"FOGZO: 4 of 20 refined steps kept STE's gradient: {REASON} (3); "
        "a probe loss is not finite (1)."
    )
    assert comparison.fallbacks(results) == [sentence]
    display.compare_results(results, write_compare_report(config, results))
    assert sentence in capsys.readouterr().out
    assert sentence.replace("'", "&#39;") in (tmp_path / "report.html").read_text()
