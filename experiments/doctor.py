"""Healthy and sick runs under the doctor: are its thresholds between them, and what does it cost?

    python experiments/doctor.py [--quick] [--output-dir FOLDER]

Every run is a recipe of the laboratory, or a linear regression whose codes oscillate, with an
inspection every 25 steps. Of each number that a finding depends on the run's worst layer is kept,
as the finding takes it, and which findings there were. Then the time that a watch adds to a step
is measured in turns. Writes results.json.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.inspection import THRESHOLDS, LayerInspection
from fogzo_lab.interleaved import take_turns
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.environment import environment
from fogzo_lab.table import Table
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.loop import training_step
from fogzo_lab.training.model_config import LlamaConfig, QuantizerConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.state import Training, own_random_streams

FOLDER = Path(__file__).parent / "doctor"
CPU = Ranks(torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run.

    Attributes:
        seeds: Of every run.
        steps: Of a run on digits, and of the regression.
        llama_steps: Of a run of the small LLaMA.
        cases: Names in `CASES`.
        rounds: Turns of the timing.
        timed: Recipes whose steps are timed, and how many of them make a turn.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    llama_steps: int = 75
    cases: tuple[str, ...] = ()
    rounds: int = 15
    timed: dict[str, int] = field(default_factory=lambda: {"digits-mlp": 20, "pydoc-llama": 1})


QUICK = Config(
    seeds=(0,), steps=50, llama_steps=0, cases=("lsq",), rounds=1, timed={"digits-mlp": 1}
)


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        label: What it is.
        expected: Kind of the finding that should come first, empty on a healthy run; None where
            nobody knew before.
        changes: Of the recipe.
        prepare: What makes it sick after it is built.
        llama: Whether it is of the small LLaMA and not of digits-mlp.
    """

    label: str
    expected: str | None
    changes: dict[str, Any]
    prepare: Callable[[nn.Module], None] = lambda model: None
    llama: bool = False


def _preset(preset: Any, **options: Any) -> dict[str, Any]:
    return {"quantizer": QuantizerConfig(preset=preset, **options)}


def _kill_channels(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("1.bias")[:8] = -100.0  # a ReLU follows, so they never fire


def _shrink_input_steps(model: nn.Module) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("input_step"):
                buffer.mul_(0.1)


_LSQ = _preset("lsq", bits=2)
_SMALL = {"model": LlamaConfig(width=32, depth=2, heads=2), "batch_size": 4}
CASES: dict[str, Case] = {
    "lsq": Case("LSQ, 2 bits", "", _LSQ),
    "lsq-fogzo": Case("LSQ, 2 bits, FOGZO", "", _LSQ | {"estimator": "fogzo"}),
    "lsq-w2a2": Case("LSQ, W2A2", "", _LSQ | {"activations": QuantizerConfig(preset="lsq")}),
    "lsq-4": Case("LSQ, 4 bits per channel", "", _preset("lsq", bits=4, granularity="channel")),
    "lsq-8": Case("LSQ, 8 bits", "", _preset("lsq", bits=8)),
    "quest": Case("QuEST, 2 bits", "", _preset("quest", bits=2)),
    "ternary": Case("ternary", "", _preset("ternary")),
    "float-fixed": Case(
        "fixed step sizes, half of the steps in float",
        "",
        _preset("fixed", bits=2) | {"quantize_from": 0.5},
    ),
    "sgd": Case("LSQ, SGD 0.1", "", _LSQ | {"optimizer": "sgd", "learning_rate": 0.1}),
    "constant": Case("LSQ, constant learning rate", "", _LSQ | {"schedule": "constant"}),
    "lr-0.01": Case("LSQ, learning rate 0.01", "", _LSQ | {"learning_rate": 0.01}),
    "llama": Case("LLaMA, QuEST", "", _preset("quest", bits=2) | _SMALL, llama=True),
    "llama-lsq": Case(
        "LLaMA, LSQ, learning rate 0.001", "", _LSQ | _SMALL | {"learning_rate": 1e-3}, llama=True
    ),
    "masked": Case("fixed step sizes, masked", "masked", {}),
    "unmasked": Case(
        "fixed step sizes, unmasked",
        "outgrown",
        _preset("fixed", bits=2, surrogate="identity_unmasked"),
    ),
    "sign": Case("sign, hardtanh", "masked", _preset("sign")),
    "dead": Case("LSQ, a quarter of the units dead", "dead", _LSQ, _kill_channels),
    "oscillating": Case("regression, SGD 0.3", "oscillating", {}),
    "lr-1": Case("LSQ, learning rate 1", "learning_rate", _LSQ | {"learning_rate": 1.0}),
    "lr-0.3": Case("LSQ, learning rate 0.3", "learning_rate", _LSQ | {"learning_rate": 0.3}),
    "still": Case("LSQ, learning rate 1e-6", "still", _LSQ | {"learning_rate": 1e-6}),
    "clipped": Case(
        "LSQ W2, inputs with a tenth of their step size",
        "clipped",
        _LSQ | {"activations": QuantizerConfig(preset="fixed", bits=2, surrogate="identity")},
        _shrink_input_steps,
    ),
    "llama-lsq-0.003": Case("LLaMA, LSQ, learning rate 0.003", None, _LSQ | _SMALL, llama=True),
}

NUMBERS: dict[str, Callable[[LayerInspection], float]] = {
    "learning_rate": lambda layer: (layer.moved or 0.0) / layer.levels,
    "masked": lambda layer: layer.stuck,
    "outgrown": lambda layer: layer.outgrown or 0.0,
    "dead": lambda layer: layer.dead,
    "oscillating": lambda layer: (layer.flips or 0.0) / layer.levels,
    "undone": lambda layer: layer.flips_back or 0.0,
    "levels": lambda layer: layer.bits_used,
    "clipped": lambda layer: layer.clipped or 0.0,
}
"""By the key of the threshold, the number that it is held against."""
WEIGHTS = {
    "learning_rate": "moved / range",
    "masked": "frozen",
    "dead": "dead",
    "levels": "bits used",
}
CODES = {
    "outgrown": "outgrown",
    "oscillating": "flips / levels",
    "undone": "undone",
    "clipped": "inputs clipped",
}
"""The columns of two tables, by threshold."""


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    results = measure(QUICK if arguments.quick else Config())
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(config: Config) -> dict[str, Any]:
    """All runs of all seeds, and the cost."""
    rows = []
    for name in config.cases or CASES:
        case = CASES[name]
        if case.llama and not config.llama_steps:
            continue
        runs = [outcome(list(inspections(name, config, seed))) for seed in config.seeds]
        rows.append({"name": name, "expected": case.expected, "runs": runs})
    return {
        "config": asdict(config),
        "environment": environment(),
        "thresholds": THRESHOLDS,
        "rows": rows,
        "costs": [cost(name, calls, config.rounds) for name, calls in config.timed.items()],
    }


def outcome(history: Sequence[fogzo.Inspection]) -> dict[str, Any]:
    """The numbers of one run's worst layers, and its findings."""
    late = history[-max(1, len(history) // 4) :]
    looked_at = {"learning_rate": history, "oscillating": late, "undone": late}
    numbers = {}
    for key, number in NUMBERS.items():
        worst = min if key == "levels" else max
        values = [
            worst(number(layer) for layer in inspection.layers)
            for inspection in looked_at.get(key, history[-1:])
        ]
        numbers[key] = max(values) if key == "learning_rate" else statistics.fmean(values)
    return numbers | {"findings": [finding.kind for finding in history[-1].findings]}


def inspections(name: str, config: Config, seed: int) -> Iterator[fogzo.Inspection]:
    """Those of one run."""
    if name == "oscillating":
        yield from regression(config.steps, seed)
        return
    case = CASES[name]
    settings = recipe(case, config, seed)
    with own_random_streams(seed):
        training = Training(settings, CPU)
        case.prepare(training.model)
        while training.step < settings.max_steps:
            loss, _ = training_step(training, training.next_window())
            if training.inspection is not None:
                yield training.inspection
                training.inspection = None
            if not math.isfinite(loss):
                return


def recipe(case: Case, config: Config, seed: int) -> TrainConfig:
    """What a case trains."""
    base = RECIPES["pydoc-llama" if case.llama else "digits-mlp"]()
    steps = config.llama_steps if case.llama else config.steps
    own = {"estimator": "ste", "seed": seed, "max_steps": steps, "inspect_every": 25}
    return replace(base, **(own | case.changes))


def regression(steps: int, seed: int) -> Iterator[fogzo.Inspection]:
    """A linear regression: the best weights lie between levels, and SGD goes to and fro."""
    generator = Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    target = torch.randn(64, 64, generator=generator) * 0.1
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.randn(64, 64, generator=generator) * 0.1)
    quantizer = fogzo.fixed(2, surrogate="identity_unmasked")
    fogzo.quantize_(model, quantizer, lambda module, name: True)
    watch = fogzo.Watch(model, every=25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        x = torch.randn(256, 64, generator=generator)
        optimizer.zero_grad()
        mse_loss(model(x), x @ target.T).backward()
        inspection = watch.update()
        if inspection is not None:
            yield inspection
        optimizer.step()


def cost(name: str, calls: int, rounds: int) -> dict[str, Any]:
    """What counting a step and inspecting take beside a recipe's step, by interleaved timing."""
    training = Training(replace(RECIPES[name](), estimator="ste", **_LSQ), CPU)
    window = training.next_window()
    watch = fogzo.Watch(training.model, every=10**9, window=10**9)  # always counts
    alternatives: dict[str, Callable[[], object]] = {
        "step": lambda: training_step(training, window),
        "count": watch.update,
        "inspect": lambda: fogzo.inspect(training.model),
    }
    for call in alternatives.values():
        call()
    turns = take_turns(
        {key: partial(timed, call) for key, call in alternatives.items()},
        dict.fromkeys(alternatives, calls),
        rounds,
    )
    shares = {key: asdict(turns.ratio(key, "step")) for key in ("count", "inspect")}
    return {"recipe": name, "milliseconds": 1e3 * turns.seconds()["step"]} | shares


def timed(call: Callable[[], object], count: int) -> float:
    """Seconds of so many calls."""
    began = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - began


def table(results: dict[str, Any]) -> Table:
    """The runs with their first finding, and the numbers of their weights beside the thresholds."""
    facts, config = results["environment"], results["config"]
    costs = "; ".join(
        f"{cost['recipe']} {cost['count']['median']:.1%} for a step that is counted and "
        f"{cost['inspect']['median']:.1%} for an inspection, of a step of "
        f"{cost['milliseconds']:.3g} ms"
        for cost in results["costs"]
    )
    caption = (
        f"Worst layer, lowest to highest of {len(config['seeds'])} seeds; digits-mlp, "
        f"{config['steps']} steps with STE, and a byte-level LLaMA of width 32, "
        f"{config['llama_steps']} steps. Cost of a watch, in turns on a busy machine: {costs}. "
        f"{facts['processor']}, torch {facts['torch']}, {facts['date']}."
    )
    findings = ["first finding", "", *(_first(row["runs"]) for row in results["rows"])]
    return _table(results, WEIGHTS, caption, findings)


def codes_table(results: dict[str, Any]) -> Table:
    """The numbers of the step sizes, codes and inputs of the same runs."""
    return _table(results, CODES, "The same runs: worst layer, lowest to highest.")


def _table(
    results: dict[str, Any], columns: dict[str, str], caption: str, second: Sequence[str] = ()
) -> Table:
    """A line for the thresholds and one per run.

    Args:
        results: What was measured.
        columns: Headings by the key of their threshold.
        caption: Of the table.
        second: A column after the runs' names, with its heading.
    """
    lines = [
        ["run", *columns.values()],
        ["*reported*", *(_bound(key, results["thresholds"][key]) for key in columns)],
    ]
    for row in results["rows"]:
        numbers = [_range([run[key] for run in row["runs"]]) for key in columns]
        lines.append([CASES[row["name"]].label, *numbers])
    for line, cell in zip(lines, second, strict=False):
        line.insert(1, cell)
    heading, *rows = lines
    return Table("", heading, rows, caption)


def _first(runs: Sequence[dict[str, Any]]) -> str:
    """The first finding of each run, counted where they differ."""
    kinds = [(*run["findings"], "none")[0].replace("_", " ") for run in runs]
    counted = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return kinds[0] if len(counted) == 1 else ", ".join(counted)


def _bound(key: str, threshold: float) -> str:
    return f"below {threshold:g}" if key == "levels" else f"{threshold:g} or more"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
