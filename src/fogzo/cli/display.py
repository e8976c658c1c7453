"""What the commands print: bars and tables on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fogzo.recipes.compare import Results
from fogzo.recipes.run_folder import Metrics

Advance = Callable[[int, int, str], None]
"""Called with (done, total, what to say)."""

ROW_LABELS = {
    "float": "float",
    "ste": "STE",
    "ste-unmasked": "STE, unmasked",
    "placebo": "placebo",
    "lambda": "lambda only",
    "fogzo": "FOGZO",
    "fogzo-paired": "FOGZO, paired",
    "control-variate": "control variate",
    "spsa": "n-SPSA",
}

MEANINGS = {
    "float": "no quantization",
    "ste": "the recipe's straight-through estimator",
    "ste-unmasked": "STE with slope 1 everywhere",
    "placebo": "STE plus noise of FOGZO's law and size, no loss measured",
    "lambda": "STE times the measured agreement, no noise (beta = 1)",
    "fogzo": "the measured slopes along STE's direction plus noise",
    "fogzo-paired": "FOGZO with both signs of STE's direction for each noise",
    "control-variate": "STE plus what the measured slopes add to its prediction",
    "spsa": "the measured slopes along noise alone",
}


def row_label(row: Results) -> str:
    """A row's name for people, with its budget where it is not the usual one."""
    longer = ", as long as FOGZO" if row["budget"] == "time" else ""
    return ROW_LABELS[row["name"]] + longer


@contextmanager
def progress(total: int, description: str, speaks: bool = True) -> Iterator[Advance]:
    """A progress bar with time remaining, or a line every tenth of the way; rank 0 alone speaks."""
    if not speaks:
        yield lambda done, total, text: None
        return
    console = Console()
    if not console.is_terminal:
        tenths = -1

        def advance_plainly(done: int, total: int, text: str) -> None:
            nonlocal tenths
            if 10 * done // total > tenths or done == total:
                tenths = 10 * done // total
                print(f"{description} {done}/{total} {text}", flush=True)

        yield advance_plainly
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console
    ) as bar:
        task = bar.add_task(description, total=total, text="")

        def advance(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield advance


def step_text(metrics: Metrics) -> str:
    """Loss, agreement and speed of a step, in a few words."""
    speed = metrics["step"] / max(metrics["seconds"], 1e-9)
    agreement = metrics.get("agreement")
    shown = "" if agreement is None else f"  agreement {agreement:.2f}"
    return f"loss {metrics['loss']:.4f}{shown}  {speed:.3g} steps/s"


def train_result(result: Metrics, report: Path) -> None:
    """The final numbers of one run."""
    _console().print(
        f"{quality(result)} after {result['steps']} steps in {result['seconds']:.1f} s, "
        f"{result['extra_forwards']} extra forwards\nreport: {report}"
    )


def quality(result: Metrics) -> str:
    """Test results in words, and the training loss where it was measured."""
    words = [f"test loss {result['test_loss']:.4f} nats"]
    words += [f"test accuracy {result['test_accuracy']:.2%}"]
    if "test_perplexity" in result:
        words += [f"test perplexity {result['test_perplexity']:.2f}"]
        words += [f"{result['test_bits_per_byte']:.3f} bits a byte"]
    if "train_loss" in result:
        words += [f"train loss {result['train_loss']:.4f}"]
    return ", ".join(words)


def eval_result(numbers: Metrics) -> None:
    """An evaluation, as a table: a row a split."""
    splits = [name.removesuffix("_loss") for name in numbers if name.endswith("_loss")]
    kinds = [n.removeprefix(f"{splits[0]}_") for n in numbers if n.startswith(f"{splits[0]}_")]
    table = Table(title=f"{numbers['run']} at step {numbers['step']}")
    for heading in ("split", *kinds):
        table.add_column(heading.replace("_", " "), justify="right" if heading in kinds else "left")
    for split in splits:
        table.add_row(split, *(f"{numbers[f'{split}_{kind}']:.4f}" for kind in kinds))
    _console().print(table)


def compare_results(results: Results, report: Path) -> None:
    """The table of a comparison."""
    table = Table(title=f"{results['recipe']}: mean ± standard deviation over seeds")
    for heading in ("row", "test accuracy %", "train loss", "lr", "steps", "seconds"):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    table.add_column("extra forwards", justify="right")
    table.add_column("FOGZO minus row, points [95%]", justify="right")
    for row in results["rows"]:
        table.add_row(*table_cells(results, row))
    console = _console()
    console.print(table)
    for sentence in findings(results):
        console.print(sentence)
    console.print(f"report: {report}")


def table_cells(results: Results, row: Results) -> list[str]:
    """One row of the table, as text."""
    accuracy, loss = row["test_accuracy"], row["train_loss"]
    return [
        row_label(row),
        f"{100 * accuracy['mean']:.2f} ± {_spread(accuracy['sd'], 100):.2f}",
        f"{loss['mean']:.4f} ± {_spread(loss['sd'], 1):.4f}",
        f"{row['learning_rate']:g}" + (" (edge)" if row["at_edge_of_grid"] else ""),
        str(row["steps"]),
        f"{row['seconds']['mean']:.2f}",
        str(row["extra_forwards"]),
        _difference_text(_difference(results, row)),
    ]


def findings(results: Results) -> list[str]:
    """What the intervals allow one to say about FOGZO, in sentences, wins and losses alike."""
    sentences = []
    for key, name, sign in (
        ("test_accuracy", "test accuracy", 1),
        ("train_loss", "train loss", -1),
    ):
        verdicts: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
        for row in results["rows"]:
            difference = _difference(results, row)
            if difference is None or row["name"] == "float":
                continue
            low, high = difference[key]["low"], difference[key]["high"]
            better = low is not None and (low > 0 if sign > 0 else high < 0)
            worse = low is not None and (high < 0 if sign > 0 else low > 0)
            verdicts["better" if better else "worse" if worse else "open"].append(row_label(row))
        for verdict, begin in (
            ("better", f"FOGZO's {name} is better than that of "),
            ("worse", f"FOGZO's {name} is worse than that of "),
            ("open", f"These seeds do not tell FOGZO's {name} apart from that of "),
        ):
            if verdicts[verdict]:
                sentences.append(f"{begin}{'; '.join(verdicts[verdict])}.")
    return sentences and [*sentences, "Each by a 95% interval of differences paired by seed."]


def _difference(results: Results, row: Results) -> Any:
    for entry in results["differences"]:
        if entry["name"] == row["name"] and entry["budget"] == row["budget"]:
            return entry
    return None


def _difference_text(difference: Any) -> str:
    if difference is None or difference["test_accuracy"]["low"] is None:
        return ""
    gap = {key: 100 * value for key, value in difference["test_accuracy"].items()}
    return f"{gap['mean']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]"


def _spread(sd: float | None, factor: float) -> float:
    return float("nan") if sd is None else factor * sd


def _console() -> Console:
    console = Console()
    # rich wraps at 80 columns where there is no terminal to ask, which breaks tables in logs
    return console if console.is_terminal else Console(width=140)
