"""From the runs of a comparison to its rows: the tuning, the chosen candidate, the curves."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fogzo_lab.comparison.intervals import mean
from fogzo_lab.comparison.results import Budget, Candidate, RowResult
from fogzo_lab.comparison.run_cache import RunCache
from fogzo_lab.comparison.runs import Run
from fogzo_lab.training.loop import INSPECTED
from fogzo_lab.training.run_folder import Metrics, read_metrics


def best_candidate(validation: Mapping[Any, float]) -> Any:
    """The candidate of lowest mean validation loss; the first of equals."""
    return min(validation, key=lambda candidate: validation[candidate])


def validation_losses(
    cache: RunCache, runs: Sequence[Run]
) -> dict[tuple[float, float | None], float]:
    """The mean over seeds, for each candidate; infinite where one of them diverged."""
    losses: dict[tuple[float, float | None], list[float]] = {}
    for run in runs:
        loss = _outcome(cache, run).get("validation_loss")
        losses.setdefault(run.candidate, []).append(math.inf if loss is None else loss)
    return {candidate: mean(values) for candidate, values in losses.items()}


def summarise(
    cache: RunCache, budget: Budget, tuning: Sequence[Run], chosen: Sequence[Run]
) -> RowResult:
    """One row: what was tried, and every seed of what was chosen.

    Args:
        cache: Where the runs are.
        budget: steps or time.
        tuning: The runs that tried every candidate.
        chosen: All runs of the best one.
    """
    name = chosen[0].row
    learning_rate, value = chosen[0].candidate
    seeds = [_outcome(cache, run) for run in chosen]
    whole = [seed for seed in seeds if not seed.get("diverged")]
    fallbacks: Counter[str] = Counter()
    for seed in seeds:
        fallbacks.update(seed.get("fallbacks", {}))
    return RowResult(
        name=name,
        budget=budget,
        steps=chosen[0].recipe.max_steps,
        learning_rate=learning_rate,
        value=value,
        extra_forwards=next((s["extra_forwards"] for s in whole if "extra_forwards" in s), None),
        tuning=[
            Candidate(rate, tried, loss)
            for (rate, tried), loss in validation_losses(cache, tuning).items()
        ],
        tuning_runs=len(tuning),
        seeds=seeds,
        curve=_curve(cache, chosen),
        refined_steps=sum(seed.get("refined_steps", 0) for seed in seeds) if fallbacks else 0,
        fallbacks=fallbacks,
    )


def _outcome(cache: RunCache, run: Run) -> Metrics:
    result = cache.result(run.path(cache))
    assert result is not None, f"{run.label} is not finished"
    return result


def _curve(cache: RunCache, runs: Sequence[Run]) -> list[dict[str, float]]:
    """Metrics at the logged steps, averaged over seeds."""
    lines = zip(
        *(read_metrics(run.path(cache) / "metrics.jsonl") for run in runs),
        strict=False,  # a diverged seed ends early
    )
    keys = ("step", "loss", "seconds", "agreement", "flip_rate", *INSPECTED)
    return [
        {
            key: mean([math.inf if line.get(key) is None else line[key] for line in seeds])
            for key in keys
            if seeds[0].get(key) is not None
        }
        for seeds in lines
        # A seed that diverged ends between two logged steps, where the others have no line.
        if len({line["step"] for line in seeds}) == 1
    ]
