"""The commands: each selects a recipe, runs it and prints; errors become one line."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from fogzo.export import formats
from fogzo.wording import nearest
from fogzo_lab.cli import display, doctor, export
from fogzo_lab.cli.parsing import parse
from fogzo_lab.comparison import report
from fogzo_lab.comparison.compare import CompareConfig, compare, plan
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.options import deferred_checks
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.json_files import dumps
from fogzo_lab.training.config import USED_BY, TrainConfig
from fogzo_lab.training.evaluate import EvalConfig, evaluate_run
from fogzo_lab.training.loop import DivergedError, train
from fogzo_lab.training.run_folder import read_metrics

ConfigT = TypeVar("ConfigT", TrainConfig, CompareConfig)

USAGE = f"""usage: fogzo COMMAND RECIPE [options]

commands:
  train RECIPE      train one network, write its run folder; --resume continues it
  eval RUN_FOLDER   evaluate a run's newest checkpoint again
  compare RECIPE    tune and compare gradient estimators, write a table and a report;
                    --plan lists the runs without running them
  doctor RUN ...    what is wrong with a run, by layer, and which option answers it
  export RUN        write a run's network in the format of a program that serves it:
                    --format {", ".join(formats())}
  bench             measure the cost of FOGZO on this machine, without a recipe;
                    --suite quick takes about a minute

recipes: {", ".join(RECIPES)}
rows of compare: {", ".join(ROWS)}
options: fogzo COMMAND RECIPE --help"""


def run(arguments: Sequence[str]) -> None:
    """Run a command; exits with 2 on an error of the user or the data, without a traceback."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, *rest = arguments
    try:
        chosen = COMMANDS[_known("command", command, COMMANDS)]
        asks_for_help = command in ("train", "compare") and rest[:1] in (["-h"], ["--help"])
        if asks_for_help or (not rest and command != "bench"):
            print(USAGE)
            return
        chosen(rest)
    except BrokenPipeError:
        raise
    except (ValueError, DivergedError, OSError) as error:
        sys.exit(_fail(str(error)))
    except torch.OutOfMemoryError as error:
        sys.exit(_fail(f"{error} {_OF_A_FULL_GPU.get(command, _HIDE_IT)}"))


_SMALLER = "Use a smaller --batch-size"
_HIDE_IT = "End what else runs there, or use the CPU: CUDA_VISIBLE_DEVICES= fogzo ..."
_OF_A_FULL_GPU = {
    "train": f"{_SMALLER}, or --accumulation 2 for the same batches",
    "compare": f"{_SMALLER}, fewer --workers, or --accumulation 2 for the same batches",
    "eval": _SMALLER,
}
"""What to do about a full GPU, by the command, whose options differ."""


def _train(arguments: Sequence[str]) -> None:
    defaults = {
        name: lambda name=name, recipe=recipe: replace(recipe(), output_dir=Path("runs") / name)
        for name, recipe in RECIPES.items()
    }
    config = _parse("train", arguments, defaults)
    chosen = {f"--estimator {config.estimator}": config.estimator}
    _check_used(config, RECIPES[arguments[0]](), chosen)
    if config.inspect_every and not config.has_codes:  # which the rows of a comparison may be
        raise ValueError(
            "--inspect-every looks at the codes of quantized layers, of which this run has none: "
            "--inspect-every 0"
        )
    speaks = os.environ.get("RANK", "0") == "0"
    with display.progress(config.max_steps, "training", speaks) as advance:
        result = train(config, lambda m: advance(m["step"], config.max_steps, display.step_text(m)))
    if speaks:
        metrics = read_metrics(config.output_dir / "metrics.jsonl")
        display.train_result(result, report.write_train_report(config, metrics, result))


def _eval(arguments: Sequence[str]) -> None:
    config = parse(EvalConfig, arguments, "fogzo eval", EvalConfig.__doc__)
    numbers = evaluate_run(config)
    if config.json:
        print(dumps(numbers))
    else:
        display.eval_result(numbers)


def _compare(arguments: Sequence[str]) -> None:
    defaults = {
        name: lambda name=name, recipe=recipe: CompareConfig(
            base=replace(recipe(), output_dir=Path("runs") / f"{name}-compare")
        )
        for name, recipe in RECIPES.items()
    }
    config = _parse("compare", arguments, defaults)
    recipe = RECIPES[arguments[0]]()
    for option, answer in _OF_ONE_RUN.items():
        if getattr(config.base, option) != getattr(recipe, option):
            raise ValueError(answer)
    rows = {name: ROWS[name].change(recipe).estimator for name in config.rows}
    _check_used(config.base, recipe, rows)
    if config.plan:
        display.compare_plan(plan(config))
        return
    try:
        with display.progress(1, "comparing") as advance:
            results = compare(config, lambda done, known: advance(done, known, "runs"))
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note("finished runs are kept: the same command goes on from there")
        raise
    path = report.write_compare_report(config, results)
    display.compare_results(results, path)


_OF_ONE_RUN = {
    "estimator": "compare runs several estimators: choose them with --rows ste fogzo",
    "overwrite": "compare keeps finished runs and repeats none: leave --overwrite out, or begin "
    "anew in another --output-dir",
    "trackers": "the runs of compare log to their metrics.jsonl alone: leave --trackers out",
    "checkpoint_every": "the runs of compare write no checkpoints, and one that is interrupted "
    "begins again: leave --checkpoint-every out",
}
"""What a comparison would ignore, and what to do instead."""


def _check_used(config: TrainConfig, recipe: TrainConfig, estimators: Mapping[str, str]) -> None:
    """Raise a `ValueError` for an option, other than the recipe's, that nothing here uses.

    Args:
        config: What would be trained.
        recipe: What it begins with.
        estimators: By the option that chose it.
    """
    in_float = config.quantizer.preset == "none"
    for option, users in USED_BY.items():
        given = getattr(config, option)
        unused = in_float or not set(users).intersection(estimators.values())
        if unused and given != getattr(recipe, option):
            said = f"--{option.replace('_', '-')}" + ("" if given is True else f" {given}")
            chosen = "--quantizer.preset none" if in_float else " ".join(estimators)
            raise ValueError(
                f"{said} is for {', '.join(users)}, and changes nothing with {chosen}: leave "
                f"{said} out, or {'--quantizer.preset lsq' if in_float else 'choose one of these'}"
            )


def _bench(arguments: Sequence[str]) -> None:
    from fogzo_lab.cli import bench  # here, as only this command needs it

    bench.run(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "doctor": doctor.run,
    "export": export.run,
    "bench": _bench,
}


def _parse(
    command: str, arguments: Sequence[str], defaults: Mapping[str, Callable[[], ConfigT]]
) -> ConfigT:
    name, *rest = arguments
    default = defaults[_known("recipe", name, RECIPES)]()
    with deferred_checks():  # a preset may go with other options only, such as --rows float
        default = _for_presets(default, rest)
    return parse(type(default), rest, f"fogzo {command} {name}", RECIPES[name].__doc__, default)


def _for_presets(default: ConfigT, arguments: Sequence[str]) -> ConfigT:
    """The recipe, with the presets in the arguments and their own options."""
    if isinstance(default, CompareConfig):
        return replace(default, base=_for_presets(default.base, arguments))
    named = dict(pairwise(arguments))
    named |= {option: value for option, _, value in (a.partition("=") for a in arguments) if value}
    return replace(
        default,
        quantizer=default.quantizer.for_preset(named.get("--quantizer.preset", "")),
        activations=default.activations.for_preset(named.get("--activations.preset", "")),
    )


def _known(kind: str, name: str, choices: Mapping[str, object]) -> str:
    if name in choices:
        return name
    close = nearest(name, choices)
    hint = f"did you mean {close}?" if close else f"choose from {', '.join(choices)}"
    raise ValueError(f"no {kind} {name!r}: {hint}")


def _fail(message: str) -> int:
    print(f"fogzo: {message}", file=sys.stderr)
    return 2
