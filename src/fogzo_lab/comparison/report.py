"""Self-contained HTML reports: plots as inline SVG, no script, nothing to download."""

import dataclasses
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from fogzo_lab.comparison import tables
from fogzo_lab.comparison.compare import CompareConfig
from fogzo_lab.comparison.plots import comparison_plots, run_plots
from fogzo_lab.comparison.results import Comparison
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import write_text
from fogzo_lab.table import Table, in_digits
from fogzo_lab.training.config import TrainConfig, to_json
from fogzo_lab.training.run_folder import Metrics


def write_train_report(config: TrainConfig, metrics: Sequence[Metrics], result: Metrics) -> Path:
    """Write report.html of one run and return its path."""
    said_in_words = ("refined_steps", "fallbacks")
    fell_back = tables.fallback_words(result.get("refined_steps", 0), result.get("fallbacks", {}))
    said = [fell_back] if fell_back else []
    numbers = {name: in_digits(result[name], 5) for name in result if name not in said_in_words}
    how = "in float" if config.quantizer.preset == "none" else f"with {config.estimator}"
    sentences = [f"After {result['steps']} steps: {tables.quality(result)}."]
    return _write(
        config.output_dir,
        title=f"{config.recipe}: one run {how}",
        sentences=[*sentences, *said],
        tables=[Table("Result", ["number", "value"], [[*pair] for pair in numbers.items()])],
        plots=run_plots(metrics),
        configs={"Configuration": to_json(config)},
        facts=environment(),
    )


def write_compare_report(config: CompareConfig, comparison: Comparison) -> Path:
    """Write report.html of a comparison and return its path."""
    differences = tables.difference_table(comparison)
    shown = [
        tables.quality_table(comparison, differences=differences is None),
        differences,
        tables.cost_table(comparison),
    ]
    chosen = [
        dataclasses.asdict(
            ROWS[row.name].config(
                dataclasses.replace(
                    config.base, learning_rate=row.learning_rate, max_steps=row.steps
                ),
                row.value,
            )
        )
        | {"row": row.title}
        for row in comparison.rows
    ]
    return _write(
        config.base.output_dir,
        title=f"{config.base.recipe}: gradient estimators compared",
        sentences=[_QUESTION, *tables.story(comparison), *tables.fallbacks(comparison)],
        method=_method(config, comparison),
        tables=[table for table in shown if table is not None],
        plots=comparison_plots(comparison),
        configs={
            "The comparison": to_json(config),
            "The recipe of each row, at what was chosen": json.dumps(chosen, indent=2, default=str),
        },
        facts={**comparison.environment, "code": comparison.code["version"]},
    )


_QUESTION = (
    "Weights that may take only a few values cannot be trained by plain backpropagation: rounding "
    "is flat almost everywhere. The usual way out, the straight-through estimator (STE), pretends "
    "that rounding has slope 1. FOGZO also measures the loss of the rounded network at two nearby "
    "points in every step and corrects STE's gradient by what it finds. The other rows are the "
    "simpler explanations that any gain has to be held against."
)


def _method(config: CompareConfig, comparison: Comparison) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in comparison.grid)
    own = {
        f"{row.label} ({row.parameter} {', '.join(f'{value:g}' for value in tried)})": None
        for row in comparison.rows
        if (tried := list(dict.fromkeys(c.value for c in row.tuning if c.value is not None)))
    }
    also = f", each of them with every value of a parameter of its own: {'; '.join(own)}"
    said = [
        f"Every row tried the learning rates {rates} with {comparison.tuning_seeds} seeds"
        f"{also if own else ''}. The candidate of lowest mean validation loss was run with "
        f"{comparison.num_seeds} seeds and is reported on test data. All rows "
        "share initial weights, batches and seeds.",
        "The rows: "
        + "; ".join(f"{ROWS[name].label}, {ROWS[name].meaning}" for name in config.rows)
        + ".",
    ]
    if any(row.budget == "time" for row in comparison.rows):
        said.append(
            '"Equal time" gives a row as many steps as fit into the seconds of '
            f"{ROWS[comparison.time_of].label}, by interleaved timing of steps, with the learning "
            "rate tuned again and its schedule stretched or shortened."
        )
    return said


def _write(folder: Path, **values: Any) -> Path:
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("fogzo_lab.comparison").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    path = folder / "report.html"
    write_text(path, template.render({"method": []} | values))
    return path
