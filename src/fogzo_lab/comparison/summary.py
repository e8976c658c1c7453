"""From the runs of a comparison to its rows: the tuning, the chosen candidate, the differences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fogzo_lab.comparison.intervals import mean, paired_interval, spread
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.run_cache import RunCache
from fogzo_lab.comparison.runs import Run
from fogzo_lab.training.run_folder import read_metrics

Results = dict[str, Any]

MORE_IS_BETTER = {
    "test_accuracy": True,
    "test_loss": False,
    "test_perplexity": False,
    "train_loss": False,
}
"""What rows are compared by, and which way is up."""


def best_candidate(validation: Mapping[Any, float]) -> Any:
    """The candidate of lowest mean validation loss; the first of equals."""
    return min(validation, key=lambda candidate: validation[candidate])


def validation_losses(cache: RunCache, runs: Sequence[Run]) -> dict[tuple[float, float], float]:
    """The mean over seeds, for each candidate; infinite where one of them diverged."""
    losses: dict[tuple[float, float], list[float | None]] = {}
    for run in runs:
        loss = _outcome(cache, run).get("validation_loss")
        losses.setdefault(run.candidate, []).append(loss)
    return {candidate: mean(values) for candidate, values in losses.items()}


def summarise(
    cache: RunCache, budget: str, tuning: Sequence[Run], chosen: Sequence[Run]
) -> Results:
    """One row: what was tried, and every seed of what was chosen.

    Args:
        cache: Where the runs are.
        budget: steps or time.
        tuning: The runs that tried every candidate.
        chosen: All runs of the best one.
    """
    name = chosen[0].row
    learning_rate, kappa = chosen[0].candidate
    validation = validation_losses(cache, tuning)
    grid = sorted({rate for rate, _ in validation})
    seeds = [_outcome(cache, run) for run in chosen]
    steps = chosen[0].recipe.max_steps
    whole = [seed for seed in seeds if not seed.get("diverged")]
    extra = next((s["extra_forwards"] for s in whole if "extra_forwards" in s), None)
    # Every step of every row runs backward: what is not quantized is always trained by it.
    forwards = None if extra is None else steps + extra
    return {
        "name": name,
        "label": ROWS[name].label,
        "budget": budget,
        "learning_rate": learning_rate,
        "kappa": kappa if ROWS[name].has_kappa else None,
        "at_edge_of_grid": len(grid) > 1 and learning_rate in (grid[0], grid[-1]),
        "tuning_runs": len(tuning),
        "tuning": [
            {"learning_rate": rate, "kappa": k if ROWS[name].has_kappa else None, "loss": loss}
            for (rate, k), loss in validation.items()
        ],
        "validation_loss_by_learning_rate": [
            [rate, min(loss for (other, _), loss in validation.items() if other == rate)]
            for rate in grid
        ],
        "seeds": seeds,
        **_means(seeds),
        **_fallbacks(seeds),
        "steps": steps,
        "extra_forwards": extra,
        "forwards": forwards,
        "backwards": steps,
        "forward_equivalents": None if forwards is None else forwards + 2 * steps,
        "curve": _curve(cache, chosen),
    }


def differences(rows: Sequence[Results]) -> list[Results]:
    """FOGZO minus every other row, paired by seed, with 95% intervals."""
    fogzo = next((r for r in rows if (r["name"], r["budget"]) == ("fogzo", "steps")), None)
    found = []
    for row in rows:
        if fogzo is None or row is fogzo:
            continue
        entry: Results = {"name": row["name"], "budget": row["budget"]}
        for key in MORE_IS_BETTER:
            if not any(key in seed for seed in (*fogzo["seeds"], *row["seeds"])):
                continue
            pairs = zip(fogzo["seeds"], row["seeds"], strict=True)
            entry[key] = paired_interval([_gap(a.get(key), b.get(key)) for a, b in pairs])
        found.append(entry)
    return found


def _means(seeds: Sequence[Results]) -> Results:
    found = {}
    for key in (*MORE_IS_BETTER, "seconds"):
        values = [seed.get(key) for seed in seeds]
        if any(value is not None for value in values):
            found[key] = {"mean": mean(values), "sd": spread(values)}
    return found


def _fallbacks(seeds: Sequence[Results]) -> Results:
    """The refined steps of all seeds and those that fell back, by reason; nothing if none did."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        counts.update(seed.get("fallbacks", {}))
    refined = sum(seed.get("refined_steps", 0) for seed in seeds)
    return {"refined_steps": refined, "fallbacks": dict(counts)} if counts else {}


def _gap(a: float | None, b: float | None) -> float:
    return float("inf") if a is None or b is None else a - b


def _outcome(cache: RunCache, run: Run) -> Results:
    result = cache.result(run.path(cache))
    assert result is not None, f"{run.label} is not finished"
    return result


def _curve(cache: RunCache, runs: Sequence[Run]) -> list[Results]:
    """Metrics at the logged steps, averaged over seeds."""
    lines = zip(
        *(read_metrics(run.path(cache) / "metrics.jsonl") for run in runs),
        strict=False,  # a diverged seed ends early
    )
    keys = ("step", "loss", "seconds", "agreement", "flip_rate")
    return [
        {
            key: mean(line.get(key) for line in seeds)
            for key in keys
            if seeds[0].get(key) is not None
        }
        for seeds in lines
    ]
