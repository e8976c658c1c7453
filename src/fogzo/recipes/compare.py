"""Comparing estimators: every row gets the same weights, data order, seeds and learning rates.

The learning rate of each row is chosen on validation loss, over one grid that all rows share, and
reported on test data. Rows that are cheaper than FOGZO also run for as long as FOGZO takes.
"""

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fogzo.recipes.config import QuantizerConfig, TrainConfig, to_json
from fogzo.recipes.environment import environment
from fogzo.recipes.run_folder import dumps, read_metrics, write_text
from fogzo.recipes.timing import run_seconds
from fogzo.recipes.train import DivergedError, train

RowName = Literal[
    "float",
    "ste",
    "ste-unmasked",
    "placebo",
    "lambda",
    "fogzo",
    "fogzo-paired",
    "control-variate",
    "spsa",
]
Budget = Literal["steps", "time"]
Results = dict[str, Any]

_GRID = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)


def _estimator(name: Any) -> Callable[[TrainConfig], TrainConfig]:
    return lambda base: replace(base, estimator=name)


def _float(base: TrainConfig) -> TrainConfig:
    plain = QuantizerConfig(preset="none")
    return replace(base, estimator="ste", quantizer=plain, activations=plain)


def _unmasked(base: TrainConfig) -> TrainConfig:
    quantizer = replace(base.quantizer, surrogate="identity_unmasked")
    return replace(base, estimator="ste", quantizer=quantizer)


ROWS: dict[RowName, Callable[[TrainConfig], TrainConfig]] = {
    "float": _float,
    "ste": _estimator("ste"),
    "ste-unmasked": _unmasked,
    "placebo": _estimator("placebo"),
    "lambda": _estimator("lambda"),
    "fogzo": _estimator("fogzo"),
    "fogzo-paired": _estimator("fogzo-paired"),
    "control-variate": _estimator("control-variate"),
    "spsa": _estimator("spsa"),
}
"""What each row changes in the recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """A comparison of gradient estimators on one recipe."""

    base: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The recipe; its seed is the first one, its learning rate the centre of the grid."""
    rows: tuple[RowName, ...] = ("float", "ste", "ste-unmasked", "placebo", "fogzo")
    """What to compare."""
    learning_rates: tuple[float, ...] = ()
    """The grid for every row; by default half-decades around the recipe's learning rate."""
    num_seeds: int = 5
    """Seeds a row and learning rate."""
    equal_time: bool = True
    """Also give cheaper rows as many steps as fit into FOGZO's seconds."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes, each of one thread."""

    def __post_init__(self) -> None:
        unknown = [row for row in self.rows if row not in ROWS]
        if unknown or not self.rows:
            raise ValueError(
                f"no such row: {', '.join(unknown) or 'none given'}; choose from "
                f"{', '.join(ROWS)}, for example --rows ste fogzo"
            )
        for name in ("num_seeds", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more: --{name.replace('_', '-')} 2")
        if any(not lr > 0 for lr in self.learning_rates):
            raise ValueError(f"learning rates must be positive, got {self.learning_rates}")

    @property
    def grid(self) -> tuple[float, ...]:
        """The learning rates every row is tuned over."""
        centre = self.base.learning_rate
        return self.learning_rates or tuple(float(f"{centre * f:.3g}") for f in _GRID)


@dataclass(frozen=True)
class _Run:
    row: str
    budget: Budget
    config: TrainConfig


def compare(config: CompareConfig, on_run: Callable[[int, int], None] | None = None) -> Results:
    """Run a comparison and write results.json and config.json into its folder.

    Args:
        config: What to compare.
        on_run: Called after every finished run with (runs done, runs in all).

    Returns:
        The results, as in results.json.
    """
    folder = config.base.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", to_json(config))
    with ProcessPoolExecutor(
        config.workers, mp_context=get_context("spawn"), initializer=_start_worker
    ) as pool:
        # First and alone, so that nothing else runs on the machine meanwhile.
        base = replace(config.base, learning_rate=min(config.grid))
        seconds = pool.submit(
            run_seconds, {name: ROWS[name](base) for name in config.rows}
        ).result()
        runs = [run for name in config.rows for run in _runs(config, name, "steps")]
        if config.equal_time and "fogzo" in config.rows:
            runs += _equal_time_runs(config, seconds)
        outcomes = _execute(pool, runs, on_run)
    rows = [
        _summarise(name, budget, config.grid, _of(runs, outcomes, name, budget))
        for budget in ("steps", "time")
        for name in config.rows
        if _of(runs, outcomes, name, budget)
    ]
    results = {
        "recipe": config.base.recipe,
        "environment": environment(),
        "grid": config.grid,
        "run_seconds_measured_in_turns": seconds,
        "rows": rows,
        "differences": _differences(rows),
    }
    write_text(folder / "results.json", dumps(results, indent=1) + "\n")
    return results


def _runs(
    config: CompareConfig, name: RowName, budget: Budget, steps: int | None = None
) -> Iterable[_Run]:
    steps = steps or config.base.max_steps
    base = replace(config.base, checkpoint_every=-1, max_steps=steps, overwrite=True)
    for learning_rate in config.grid:
        for seed in range(base.seed, base.seed + config.num_seeds):
            run = f"{name}-{budget}-lr{learning_rate:g}-seed{seed}"
            folder = base.output_dir / "runs" / run
            changed = replace(base, learning_rate=learning_rate, seed=seed, output_dir=folder)
            yield _Run(name, budget, ROWS[name](changed))


def _equal_time_runs(config: CompareConfig, seconds: dict[str, float]) -> list[_Run]:
    """Each cheaper quantized row again, with as many steps as fit into FOGZO's seconds."""
    runs: list[_Run] = []
    for name in config.rows:
        ratio = seconds["fogzo"] / seconds[name]
        if name not in ("float", "fogzo") and ratio > 1.02:
            runs += _runs(config, name, "time", round(config.base.max_steps * ratio))
    return runs


def _of(
    runs: Sequence[_Run], outcomes: Sequence[Results], name: str, budget: str
) -> list[tuple[_Run, Results]]:
    pairs = zip(runs, outcomes, strict=True)
    return [(run, o) for run, o in pairs if run.row == name and run.budget == budget]


def _execute(
    pool: ProcessPoolExecutor,
    runs: Sequence[_Run],
    on_run: Callable[[int, int], None] | None,
) -> list[Results]:
    futures = {pool.submit(_one_run, run.config): i for i, run in enumerate(runs)}
    outcomes: list[Results] = [{}] * len(runs)
    for finished, future in enumerate(as_completed(futures), start=1):
        outcomes[futures[future]] = future.result()
        if on_run is not None:
            on_run(finished, len(runs))
    return outcomes


def _start_worker() -> None:
    torch.set_num_threads(1)


def _one_run(config: TrainConfig) -> Results:
    try:
        return train(config)
    except DivergedError:
        last = read_metrics(config.output_dir / "metrics.jsonl")[-1]
        # Infinite losses: this learning rate can never be chosen.
        scores = {f"{split}_loss": math.inf for split in ("train", "validation", "test")}
        scores |= {f"{split}_accuracy": 0.0 for split in ("train", "validation", "test")}
        return {"steps": last["step"], "seconds": last["seconds"], "extra_forwards": 0, **scores}


def _summarise(
    name: str, budget: str, grid: Sequence[float], pairs: Sequence[tuple[_Run, Results]]
) -> Results:
    """One row: its learning-rate curve, and the seeds at the learning rate of best validation."""
    by_rate = {
        rate: [(run, outcome) for run, outcome in pairs if run.config.learning_rate == rate]
        for rate in grid
    }
    validation = {rate: _mean(o["validation_loss"] for _, o in by_rate[rate]) for rate in grid}
    best = min(grid, key=lambda rate: validation[rate])
    outcomes = [outcome for _, outcome in by_rate[best]]
    return {
        "name": name,
        "budget": budget,
        "learning_rate": best,
        "at_edge_of_grid": len(grid) > 1 and best in (grid[0], grid[-1]),
        "validation_loss_by_learning_rate": [[rate, validation[rate]] for rate in grid],
        "seeds": outcomes,
        **{
            key: {"mean": _mean(o[key] for o in outcomes), "sd": _sd([o[key] for o in outcomes])}
            for key in ("train_loss", "test_loss", "test_accuracy", "seconds")
        },
        "steps": outcomes[0]["steps"],
        "extra_forwards": outcomes[0]["extra_forwards"],
        "curve": _curve([run.config.output_dir for run, _ in by_rate[best]]),
    }


def _curve(folders: Sequence[Path]) -> list[Results]:
    """Metrics at the logged steps, averaged over seeds."""
    lines = zip(*(read_metrics(folder / "metrics.jsonl") for folder in folders), strict=False)
    keys = ("step", "loss", "seconds", "agreement")
    return [
        {key: _mean(line[key] for line in seeds) for key in keys if seeds[0].get(key) is not None}
        for seeds in lines
    ]


def _differences(rows: Sequence[Results]) -> list[Results]:
    """FOGZO minus every other row, paired by seed, with 95% Student intervals."""
    fogzo = next((row for row in rows if row["name"] == "fogzo"), None)
    if fogzo is None:
        return []
    differences = []
    for row in rows:
        if row is fogzo:
            continue
        entry: Results = {"name": row["name"], "budget": row["budget"]}
        for key in ("test_accuracy", "train_loss"):
            gaps = [a[key] - b[key] for a, b in zip(fogzo["seeds"], row["seeds"], strict=True)]
            half = _half_interval(gaps)
            entry[key] = {
                "mean": _mean(gaps),
                "low": _mean(gaps) - half,
                "high": _mean(gaps) + half,
            }
        differences.append(entry)
    return differences


def _half_interval(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * _sd(values) / math.sqrt(len(values))


def _mean(values: Iterable[float]) -> float:
    numbers = [math.inf if value is None else value for value in values]
    return math.fsum(numbers) / len(numbers) if all(map(math.isfinite, numbers)) else math.inf


def _sd(values: Sequence[float]) -> float:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values)
