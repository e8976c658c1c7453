"""What a comparison found, from the runs to results.json and back: one type from run to report.

Only what was measured is held. Means, intervals and costs follow from it, are written to the file
for its readers, and are computed again when it is read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.metrics import METRICS, TEST_ACCURACY, TEST_PERPLEXITY, Metric
from fogzo_lab.comparison.rows import ROWS

Budget = Literal["steps", "time"]
BUDGETS: tuple[Budget, ...] = ("steps", "time")
EDGE = " (edge)"
Json = dict[str, Any]


def _value(stored: Json) -> float | None:
    """Of a row's own parameter, which was kappa alone in earlier versions."""
    found: float | None = stored["value"] if "value" in stored else stored["kappa"]
    return found


def row_title(name: str, budget: Budget) -> str:
    """A row's name for people, with its budget where that is not the usual one."""
    return ROWS[name].label + (" (equal time)" if budget == "time" else "")


@dataclass(frozen=True)
class Candidate:
    """A learning rate and a value of its own parameter that a row tried.

    Attributes:
        learning_rate: Of the run.
        value: Of the row's parameter; None in a row that has none.
        loss: Mean validation loss over the tuning seeds; infinite where one diverged.
    """

    learning_rate: float
    value: float | None
    loss: float


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """One row of a comparison at one budget: what it tried, and every seed of what it chose.

    Attributes:
        name: Key in `ROWS`.
        budget: Whether its steps are those of all rows or those that fit into equal seconds.
        steps: Training steps of a run.
        learning_rate: The one of lowest validation loss.
        value: That of the row's own parameter of lowest validation loss; None if it has none.
        extra_forwards: Forward passes over a batch beyond one per step; None if all seeds diverged.
        tuning: All candidates.
        tuning_runs: Runs that it took to try them.
        seeds: The result.json of every seed of the chosen candidate.
        curve: Logged metrics by step, means over seeds.
        refined_steps: Steps of all seeds whose gradient was refined; 0 if none fell back.
        fallbacks: How many of them fell back to STE's gradient, by reason.
    """

    name: str
    budget: Budget
    steps: int
    learning_rate: float
    value: float | None
    extra_forwards: float | None
    tuning: Sequence[Candidate]
    tuning_runs: int
    seeds: Sequence[Mapping[str, Any]]
    curve: Sequence[Mapping[str, float]]
    refined_steps: int = 0
    fallbacks: Mapping[str, int]

    @property
    def label(self) -> str:
        """Its name for people, whatever the budget."""
        return ROWS[self.name].label

    @property
    def parameter(self) -> str | None:
        """What its own parameter is called."""
        own = ROWS[self.name].parameter
        return None if own is None else own.name

    @property
    def chosen_rate(self) -> str:
        """Its learning rate, marked where a better one may lie beyond those that were tried."""
        return f"{self.learning_rate:g}" + (EDGE if self.at_edge_of_grid else "")

    @property
    def chosen_value(self) -> str:
        """Its own parameter, marked as the rate is; empty if it has none."""
        if self.value is None:
            return ""
        return f"{self.parameter} {self.value:g}" + (EDGE if self.value_at_edge else "")

    @property
    def title(self) -> str:
        """Its name for people, with the budget where it is not the usual one."""
        return row_title(self.name, self.budget)

    def values(self, key: str) -> list[float | None]:
        """A number of every seed; None where a seed diverged and has none."""
        return [seed.get(key) for seed in self.seeds]

    def summary(self, key: str) -> Summary | None:
        """Mean and spread of a number over seeds; None if no seed has it."""
        values = self.values(key)
        return None if all(value is None for value in values) else Summary.of(values)

    @property
    def best_loss(self) -> float:
        """The validation loss of what was chosen; infinite where all candidates diverged."""
        return min(candidate.loss for candidate in self.tuning)

    @property
    def loss_by_rate(self) -> dict[float, float]:
        """Lowest validation loss at each learning rate, in order."""
        rates = sorted({candidate.learning_rate for candidate in self.tuning})
        return {rate: min(c.loss for c in self.tuning if c.learning_rate == rate) for rate in rates}

    @property
    def at_edge_of_grid(self) -> bool:
        """Whether a better learning rate may lie beyond the grid; no, if all of it diverged."""
        rates = list(self.loss_by_rate)
        at_end = len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])
        return at_end and math.isfinite(self.best_loss)

    @property
    def value_at_edge(self) -> bool:
        """Whether a better value of its own parameter may lie beyond those that were tried."""
        tried = {candidate.value for candidate in self.tuning if candidate.value is not None}
        at_end = len(tried) > 1 and self.value in (min(tried), max(tried))
        return at_end and math.isfinite(self.best_loss)

    @property
    def forwards(self) -> float | None:
        """Forward passes of a run: every step has one, and probes theirs."""
        return None if self.extra_forwards is None else self.steps + self.extra_forwards

    @property
    def forward_equivalents(self) -> float | None:
        """Cost of a run in forward passes, a backward pass counted as two."""
        return None if self.forwards is None else self.forwards + 2 * self.steps

    @classmethod
    def from_dict(cls, stored: Json) -> "RowResult":
        """From results.json."""
        return cls(
            name=stored["name"],
            budget=stored["budget"],
            steps=stored["steps"],
            learning_rate=stored["learning_rate"],
            value=_value(stored),
            extra_forwards=stored["extra_forwards"],
            tuning=[
                Candidate(
                    tried["learning_rate"],
                    _value(tried),
                    math.inf if tried["loss"] is None else tried["loss"],
                )
                for tried in stored["tuning"]
            ],
            tuning_runs=stored["tuning_runs"],
            seeds=stored["seeds"],
            curve=stored["curve"],
            refined_steps=stored.get("refined_steps", 0),
            fallbacks=stored.get("fallbacks", {}),
        )

    def to_dict(self) -> Json:
        """For results.json, with what follows from the runs."""
        summaries = {key: self.summary(key) for key in (*METRICS, "seconds")}
        return {
            "name": self.name,
            "label": self.label,
            "budget": self.budget,
            "learning_rate": self.learning_rate,
            "parameter": self.parameter,
            "value": self.value,
            "at_edge_of_grid": self.at_edge_of_grid,
            "tuning_runs": self.tuning_runs,
            "tuning": [vars(candidate) for candidate in self.tuning],
            "validation_loss_by_learning_rate": [[*pair] for pair in self.loss_by_rate.items()],
            "seeds": list(self.seeds),
            **{key: vars(found) for key, found in summaries.items() if found is not None},
            **(
                {"refined_steps": self.refined_steps, "fallbacks": dict(self.fallbacks)}
                if self.fallbacks
                else {}
            ),
            "steps": self.steps,
            "extra_forwards": self.extra_forwards,
            "forwards": self.forwards,
            "backwards": self.steps,
            "forward_equivalents": self.forward_equivalents,
            "curve": list(self.curve),
        }


@dataclass(frozen=True)
class Difference:
    """FOGZO minus another row at the same budget, paired by seed.

    Attributes:
        row: The other row.
        budget: At equal time either may be a row of equal steps, if that takes as long.
        intervals: By the metric's key, those that any row has: a row that diverged has none.
    """

    row: RowResult
    budget: Budget
    intervals: Mapping[str, Interval]

    @property
    def title(self) -> str:
        """The other row's name for people, with the budget where it is not the usual one."""
        return row_title(self.row.name, self.budget)

    def to_dict(self) -> Json:
        """For results.json."""
        found = {key: vars(interval) for key, interval in self.intervals.items()}
        return {"name": self.row.name, "budget": self.budget, **found}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of a comparison, and under what circumstances they were run.

    Attributes:
        recipe: Name of the recipe.
        environment: Hardware, versions and date.
        code: Version of the code, and the versions of it that the runs are of.
        grid: Learning rates that every row tried.
        kappas: Kappas that every row that follows one tried.
        num_seeds: Seeds of the chosen candidate.
        tuning_seeds: Seeds that tried every candidate.
        run_seconds: Training seconds of a run of each row at equal steps, by interleaved timing.
        rows: At equal steps, then those at equal time.
        time_of: The row whose seconds are those of equal time.
    """

    recipe: str
    environment: Mapping[str, Any]
    code: Mapping[str, Any]
    grid: Sequence[float]
    kappas: Sequence[float]
    num_seeds: int
    tuning_seeds: int
    run_seconds: Mapping[str, float]
    rows: Sequence[RowResult]
    time_of: str = "fogzo"

    def seconds(self, row: RowResult) -> float | None:
        """Training seconds of a run of that row, by interleaved timing; None if not measured.

        Those that the runs themselves took depend on what else the machine did.
        """
        whole, equal = self.run_seconds.get(row.name), self.find(row.name)
        return None if whole is None or equal is None else whole * row.steps / equal.steps

    def find(self, name: str, budget: Budget = "steps") -> RowResult | None:
        """The row of that name.

        At equal time, a row as costly as `time_of` is that of equal steps, which is not run again.
        """
        budgets: tuple[Budget, ...] = ("steps",) if budget == "steps" else ("time", "steps")
        for wanted in budgets:
            for row in self.rows:
                if (row.name, row.budget) == (name, wanted):
                    return row
        return None

    @property
    def has_equal_time(self) -> bool:
        """Whether any row was run for equal seconds."""
        return any(row.budget == "time" for row in self.rows)

    @property
    def main_metric(self) -> Metric:
        """What rows are judged by: perplexity for text, accuracy for images."""
        text = any(row.summary(TEST_PERPLEXITY.key) is not None for row in self.rows)
        return TEST_PERPLEXITY if text else TEST_ACCURACY

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that were measured, the main one first."""
        main = self.main_metric
        others = [
            metric
            for metric in METRICS.values()
            if metric != main and any(row.summary(metric.key) is not None for row in self.rows)
        ]
        return [main, *others]

    @cached_property
    def differences(self) -> list[Difference]:
        """FOGZO minus every other row, in the rows' order; none without FOGZO."""
        names = dict.fromkeys(row.name for row in self.rows if row.name != "fogzo")
        measured = {metric.key for metric in self.metrics}
        found = []
        for budget in BUDGETS:
            fogzo = self.find("fogzo", budget)
            for row in filter(None, (self.find(name, budget) for name in names)):
                # What is at both budgets the same is said of one.
                if fogzo is not None and budget in (row.budget, fogzo.budget):
                    intervals = {
                        key: Interval.paired(fogzo.values(key), row.values(key))
                        for key in METRICS
                        if key in measured
                    }
                    found.append(Difference(row, budget, intervals))
        return found

    def interval(
        self, row: RowResult, metric: Metric, budget: Budget | None = None
    ) -> Interval | None:
        """FOGZO minus a row, at that row's budget or another.

        None for FOGZO itself, and where no row has the metric.
        """
        for wanted in (budget or row.budget, "steps"):
            for difference in self.differences:
                if difference.row is row and difference.budget == wanted:
                    return difference.intervals.get(metric.key)
        return None

    @classmethod
    def from_dict(cls, stored: Json) -> "Comparison":
        """From results.json, of this version or an earlier one.

        Raises:
            ValueError: If it is not of a comparison.
        """
        try:
            return cls(
                rows=[RowResult.from_dict(row) for row in stored["rows"]],
                time_of=stored.get("time_of", "fogzo"),
                run_seconds=stored["run_seconds_measured_in_turns"],
                **{key: stored[key] for key in _AS_STORED},
            )
        except KeyError as missing:
            raise ValueError(
                f"these are no results of a comparison: {missing} is missing, expected what "
                "`fogzo compare` writes to results.json"
            ) from missing

    def to_dict(self) -> Json:
        """For results.json."""
        return {
            **{key: getattr(self, key) for key in _AS_STORED},
            "time_of": self.time_of,
            "run_seconds_measured_in_turns": dict(self.run_seconds),
            "rows": [row.to_dict() for row in self.rows],
            "differences": [difference.to_dict() for difference in self.differences],
        }


_AS_STORED = ("recipe", "environment", "code", "grid", "kappas", "num_seeds", "tuning_seeds")
