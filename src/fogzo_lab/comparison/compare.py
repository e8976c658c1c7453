"""Comparing estimators: every row gets the same weights, data order, seeds and learning rates.

The learning rate of each row, and a parameter of its own where it has one (such as kappa), is
chosen by mean validation loss over grids, and reported on test data. A second budget gives every
row the seconds that FOGZO took. Finished runs are kept and never repeated.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import tyro

from fogzo_lab.comparison.execution import (
    ExecutionConfig,
    execute,
    machines,
    measure_seconds,
    start_executor,
)
from fogzo_lab.comparison.results import Budget, Comparison
from fogzo_lab.comparison.rows import KAPPA, ROWS, check_rows
from fogzo_lab.comparison.run_cache import RunCache, code_version, config_hash
from fogzo_lab.comparison.runs import Run, missing
from fogzo_lab.comparison.summary import best_candidate, summarise, validation_losses
from fogzo_lab.executors.calls import Call, Executor
from fogzo_lab.options import (
    Example,
    NonNegativeFloat,
    Options,
    PositiveFloat,
    PositiveInt,
    deferred_checks,
)
from fogzo_lab.system.devices import find_device
from fogzo_lab.system.environment import environment, library_versions
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.training.config import TrainConfig, to_json
from fogzo_lab.training.optimizers import optimizer_class
from fogzo_lab.training.parq import check_installed
from fogzo_lab.training.state import find_weights

_GRID = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
# Step times closer than this are taken as equal.
_SAME_TIME = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(Options):
    """A comparison of gradient estimators on one recipe."""

    base: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The recipe; its seed is the first one, its learning rate the centre of the grid."""
    rows: tuple[str, ...] = ("float", "ste", "ste-unmasked", "float-then-ste", "placebo", "fogzo")
    """What to compare; `fogzo --help` lists the rows."""
    learning_rates: Annotated[tuple[PositiveFloat, ...] | None, Example((1e-3, 3e-3, 1e-2))] = None
    """The grid for every row; by default half-decades around the recipe's learning rate."""
    kappas: Annotated[tuple[NonNegativeFloat, ...] | None, Example((0.01, 0.1))] = None
    """The grid for every row that has a kappa; by default the recipe's alone."""
    tune_methods: bool = True
    """Tune the strength, or the like, of each method too; otherwise take the authors'."""
    num_seeds: PositiveInt = 5
    """Seeds of the candidate that is chosen."""
    tuning_seeds: Annotated[PositiveInt | None, Example(2)] = None
    """Seeds that the grids are tried with; by default all."""
    equal_time: bool = True
    """Also give every row as many steps as fit into the same seconds."""
    time_of: Annotated[str, Example("ste")] = "fogzo"
    """The row whose seconds those are. With ste, FOGZO is trained for fewer steps, instead of all
    others for more."""
    workers: PositiveInt = field(default_factory=lambda: os.cpu_count() or 1)
    """Runs at a time: processes, tasks or jobs."""
    execution: Annotated[ExecutionConfig, tyro.conf.arg(name="")] = field(
        default_factory=ExecutionConfig
    )
    """Where they are computed."""
    plan: bool = False
    """Only say what would run, and for how long."""
    mix_versions: bool = False
    """Use finished runs of other versions of the code, too."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` where options, each of which can be meant, do not go together."""
        check_rows(self.rows)
        if self.base.quantizer.preset == "none":
            self._check_rows_in_float()
        if self.tuning_seeds is not None and self.tuning_seeds > self.num_seeds:
            raise ValueError(
                f"the {self.tuning_seeds} tuning seeds are some of the {self.num_seeds} seeds: "
                f"--tuning-seeds {self.num_seeds} or fewer"
            )
        if self.equal_time and self.time_of not in (*self.rows, "fogzo"):
            raise ValueError(
                f"the seconds of {self.time_of} are not measured, as it is none of the rows "
                f"{' '.join(self.rows)}: --time-of {self.rows[0]}"
            )
        _check_grid("learning rates", self.learning_rates, 3e-3)
        _check_grid("kappas", self.kappas, 0.1)
        if self.kappas and not any(ROWS[name].parameter is KAPPA for name in self.rows):
            raise ValueError(
                f"none of the rows {' '.join(self.rows)} has a kappa to try: leave --kappas out, "
                f"or --rows {' '.join(self.rows)} fogzo"
            )

    def _check_rows_in_float(self) -> None:
        """Raise a `ValueError` if a row of a recipe in float would have nothing to quantize."""
        with deferred_checks():  # of what goes with quantized weights alone
            configs = {name: ROWS[name].config(self.base, None) for name in self.rows}
        in_float = [name for name, config in configs.items() if config.quantizer.preset == "none"]
        if named := [name for name in in_float if name != "float"]:
            raise ValueError(
                f"{' '.join(named)} would train in float, as the recipe quantizes no weights: "
                "--quantizer.preset lsq, or --rows float"
            )

    @property
    def grid(self) -> tuple[float, ...]:
        """The learning rates every row is tuned over."""
        centre = self.base.learning_rate
        return self.learning_rates or tuple(float(f"{centre * f:.3g}") for f in _GRID)

    def values(self, row: str) -> tuple[float | None, ...]:
        """The values of a row's own parameter that are tried; None where it has none."""
        parameter = ROWS[row].parameter
        if parameter is None:
            return (None,)
        if parameter.published is None:
            return self.kappas or (self.base.kappa,)
        return parameter.grid if self.tune_methods else (parameter.published,)

    def usual_value(self, row: str) -> float | None:
        """The value that step times are measured with, on which they do not depend."""
        parameter = ROWS[row].parameter
        if parameter is None:
            return None
        return self.base.kappa if parameter.published is None else parameter.published


@dataclass(frozen=True)
class _Cell:
    """A row with a budget."""

    row: str
    budget: Budget
    steps: int

    def tuning(self, config: CompareConfig) -> list[Run]:
        candidates = [(rate, own) for own in config.values(self.row) for rate in config.grid]
        seeds = config.tuning_seeds or config.num_seeds
        return [run for c in candidates for run in self.seeds(config, c, seeds)]

    def seeds(
        self, config: CompareConfig, candidate: tuple[float, float | None], count: int
    ) -> list[Run]:
        rate, own = candidate
        recipe = replace(_plain(config.base), max_steps=self.steps, learning_rate=rate)
        first = config.base.seed
        return [Run(self.row, replace(recipe, seed=first + i), own) for i in range(count)]

    def chosen(self, config: CompareConfig, cache: RunCache) -> list[Run]:
        """All seeds of the best candidate; the tuning must be finished."""
        candidate = best_candidate(validation_losses(cache, self.tuning(config)))
        return self.seeds(config, candidate, config.num_seeds)


def compare(config: CompareConfig, on_run: Callable[[int, int], None] | None = None) -> Comparison:
    """Run what is missing of a comparison and write results.json and config.json into its folder.

    Args:
        config: What to compare.
        on_run: Called after every finished run with (runs done, runs in all).

    Returns:
        What results.json holds.

    Raises:
        ValueError: If it cannot be run, the folder holds its runs by other code, or another
            comparison is at work there.
        ChildProcessError: If the process of a run dies, and dies again.
    """
    folder = config.base.output_dir
    cache = _open(config)
    executor = start_executor(config.execution, config.workers, folder)
    with cache.lock(), executor:
        write_text(folder / "config.json", to_json(config))
        # First and alone, so that nothing else runs on the machine meanwhile.
        seconds = _seconds(config, cache, executor)
        cells = _cells(config, seconds)
        tuning = [run for cell in cells for run in cell.tuning(config)]
        rest = len(cells) * (config.num_seeds - (config.tuning_seeds or config.num_seeds))
        known = _distinct(tuning)
        progress = _Progress(on_run, len(known) + rest, len(known) - len(missing(cache, known)))
        threads = config.execution.cpus_per_run
        execute(executor, cache, tuning, threads, progress.one_more)
        chosen = {cell: cell.chosen(config, cache) for cell in cells}
        reported = [run for runs in chosen.values() for run in runs]
        progress.total = len(_distinct([*tuning, *reported]))
        execute(executor, cache, reported, threads, progress.one_more)
    progress.finish()
    paths = {run.path(cache) for run in [*tuning, *reported]}
    found = Comparison(
        recipe=config.base.recipe,
        environment={**environment(), **library_versions(), **machines(sorted(paths))},
        code=_codes(cache, paths),
        grid=config.grid,
        kappas=config.kappas or (config.base.kappa,),
        num_seeds=config.num_seeds,
        tuning_seeds=config.tuning_seeds or config.num_seeds,
        run_seconds=seconds,
        time_of=config.time_of,
        rows=[summarise(cache, cell.budget, cell.tuning(config), chosen[cell]) for cell in cells],
    )
    text = dumps(found.to_dict(), indent=1) + "\n"
    write_text(folder / "results.json", text)
    return Comparison.from_dict(json.loads(text))


@dataclass(frozen=True)
class PlannedRow:
    """Runs of one row at one budget.

    Attributes:
        name: Key in `ROWS`.
        budget: steps or time.
        steps: Of a run.
        runs: In all.
        to_run: Those that are not finished.
        seconds_per_run: Training seconds of one.
        seconds: Those of all that are to be trained.
    """

    name: str
    budget: Budget
    steps: int
    runs: int
    to_run: int
    seconds_per_run: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a comparison would run."""

    recipe: str
    rows: Sequence[PlannedRow]
    workers: int

    @property
    def to_run(self) -> int:
        """Runs that are not finished."""
        return sum(row.to_run for row in self.rows)

    @property
    def seconds(self) -> float:
        """Training seconds, on all workers at once."""
        return math.fsum(row.seconds for row in self.rows) / self.workers


def plan(config: CompareConfig) -> Plan:
    """What `compare` would run: for every row and budget its runs, and the seconds they take.

    Nothing is trained or written; step times that were never measured are measured briefly.
    """
    cache = _open(config)
    with start_executor(config.execution, 1, config.base.output_dir) as executor:
        seconds = _seconds(config, cache, executor, rounds=3, keep=False)
    rows = []
    for cell in _cells(config, seconds):
        tuning = cell.tuning(config)
        waiting = missing(cache, tuning)
        runs, to_run = len(tuning), len(waiting)
        rest = config.num_seeds - (config.tuning_seeds or config.num_seeds)
        if rest:
            # The remaining seeds depend on which candidate wins.
            runs += rest
            to_run += rest if waiting else len(missing(cache, cell.chosen(config, cache)))
        each = seconds[cell.row] * cell.steps / config.base.max_steps
        trains = 0 if ROWS[cell.row].quantized_after and "float" in config.rows else to_run
        rows.append(
            PlannedRow(cell.row, cell.budget, cell.steps, runs, to_run, each, each * trains)
        )
    return Plan(config.base.recipe, rows, config.workers)


def _plain(base: TrainConfig) -> TrainConfig:
    """The recipe without what is not compared, and without kappa, which rows put in."""
    return replace(base, resume=False, overwrite=True, checkpoint_every=-1, trackers=(), kappa=0.0)


def _check_possible(config: CompareConfig) -> None:
    """Raise what every run would, before anything is written."""
    recipe = config.base
    if config.execution.on_this_machine:  # others may have a GPU where this one has none
        find_device(recipe.device)
    optimizer_class(recipe.optimizer)
    if recipe.initial_weights is not None:
        find_weights(recipe.initial_weights)


def _open(config: CompareConfig) -> RunCache:
    _check_possible(config)
    folder = config.base.output_dir
    for name in ("metrics.jsonl", "result.json", "checkpoints"):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} is the folder of one run, as it has {name}, and a comparison would "
                "replace its config.json and its report: "
                f"--output-dir {quote(f'{folder}-compare')}"
            )
    if "parq" in config.rows:
        check_installed()
    cache = RunCache(folder, code_version(), config.mix_versions)
    cells = [_Cell(name, "steps", config.base.max_steps) for name in config.rows]
    cache.check_versions((run.label, run.key) for cell in cells for run in cell.tuning(config))
    return cache


def _cells(config: CompareConfig, seconds: dict[str, float]) -> list[_Cell]:
    """Every row at equal steps, then every row at equal time whose steps are then others."""
    steps = config.base.max_steps
    cells = [_Cell(name, "steps", steps) for name in config.rows]
    if not config.equal_time or config.time_of not in config.rows:
        return cells
    whole = seconds[config.time_of]
    for name in config.rows:
        ratio = whole / seconds[name]
        if name == config.time_of or abs(ratio - 1) <= _SAME_TIME:
            continue
        if math.floor(steps * ratio) < 1:
            raise ValueError(
                f"the {whole:.3g} s of {steps} steps of {config.time_of} are too short for one "
                f"step of {name}: --max-steps {math.ceil(1 / ratio)}, or --no-equal-time"
            )
        cells.append(_Cell(name, "time", math.floor(steps * ratio)))
    return cells


def _seconds(
    config: CompareConfig,
    cache: RunCache,
    executor: Executor[Any],
    rounds: int = 15,
    keep: bool = True,
) -> dict[str, float]:
    """Training seconds of a run of each row, at equal steps.

    Rows that were measured before keep their times, or their runs at equal time would be others.
    """
    # A small rate, so that no weights diverge while they are timed; and the same for every grid.
    base = replace(_plain(config.base), learning_rate=config.base.learning_rate / 100)
    configs = {name: ROWS[name].config(base, config.usual_value(name)) for name in config.rows}
    keys = {name: config_hash(row) for name, row in configs.items()}
    by_key = {keys[name]: row for name, row in configs.items()}
    timing = cache.timing()
    found = {key: seconds for key in by_key if (seconds := timing.get(key)) is not None}
    if len(found) < len(by_key):
        reference = keys["fogzo" if "fogzo" in keys else config.rows[0]]
        unknown = {k: c for k, c in by_key.items() if k not in found or k == reference}
        steps = min(20, max(5, config.base.max_steps // rounds))
        call = Call(
            "the measurement of step times",
            measure_seconds,
            (unknown, rounds, steps, config.execution.cpus_per_run),
        )
        measured: dict[str, float]
        [measured] = executor.results([call])
        # Should the machine be busier than it was then, it is so for the reference too.
        pace = found.get(reference, measured[reference]) / measured[reference]
        found = {key: seconds * pace for key, seconds in measured.items()} | found
        if keep:
            timing.add({key: found[key] for key in measured})
    return {name: found[keys[name]] for name in config.rows}


def _distinct(runs: Iterable[Run]) -> list[Run]:
    """Each run once, and those that train networks which are quantized afterwards."""
    return list(dict.fromkeys(one for run in runs for one in (run.trained, run)))


def _codes(cache: RunCache, paths: Iterable[Path]) -> dict[str, object]:
    used = {path.name.rpartition("-")[2] for path in paths}
    return {"version": cache.code, "versions_of_runs": sorted(used)}


class _Progress:
    def __init__(self, on_run: Callable[[int, int], None] | None, total: int, done: int) -> None:
        self._on_run = on_run or (lambda done, total: None)
        self.total, self._done = total, done

    def one_more(self) -> None:
        self._done += 1
        self._on_run(self._done, self.total)

    def finish(self) -> None:
        """Say so even where nothing was left to run."""
        self._on_run(self.total, self.total)


def _check_grid(what: str, grid: Sequence[float] | None, example: float) -> None:
    if grid is None:
        return
    option = f"--{what.replace(' ', '-')}"
    if not grid:
        raise ValueError(f"the grid of {what} is empty: {option} {example:g}, or leave it out")
    if len(set(grid)) < len(grid):
        once = " ".join(f"{value:g}" for value in dict.fromkeys(grid))
        raise ValueError(f"one of the {what} is given twice: {option} {once}")
