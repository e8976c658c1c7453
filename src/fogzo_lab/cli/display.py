"""What the commands print: bars and tables on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from fogzo_lab.comparison import tables
from fogzo_lab.comparison.compare import Plan
from fogzo_lab.comparison.results import Comparison
from fogzo_lab.table import Table, in_digits
from fogzo_lab.training.run_folder import Metrics

Advance = Callable[[int, int, str], None]
"""Called with (done, total, what to say)."""


@contextmanager
def progress(total: int, description: str, speaks: bool = True) -> Iterator[Advance]:
    """A progress bar with time remaining, or a line every tenth of the way; rank 0 alone speaks."""
    if not speaks:
        yield lambda done, total, text: None
        return
    console = _Console()
    if not console.is_terminal:
        tenths = -1

        def advance_plainly(done: int, total: int, text: str) -> None:
            nonlocal tenths
            if 10 * done // total > tenths:
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
    error = metrics.get("agreement_error")
    spread = "" if error is None else f" ± {error:.2f}"
    shown = "" if agreement is None else f"  agreement {agreement:.2f}{spread}"
    return f"loss {metrics['loss']:.4f}{shown}  {in_digits(speed, 3)} steps/s"


def train_result(result: Metrics, report: Path) -> None:
    """The final numbers of one run."""
    _console().print(
        f"{tables.quality(result)} after {result['steps']} steps in {result['seconds']:.1f} s, "
        f"{result['extra_forwards']:,.10g} extra forward passes"
    )
    if said := tables.fallback_words(result.get("refined_steps", 0), result.get("fallbacks", {})):
        _console().print(said)
    print(f"report: {report}")  # in one piece, however long it is


def eval_result(numbers: Metrics) -> None:
    """An evaluation, as a table with one row per split."""
    splits = [name.removesuffix("_loss") for name in numbers if name.endswith("_loss")]
    kinds = [n.removeprefix(f"{splits[0]}_") for n in numbers if n.startswith(f"{splits[0]}_")]
    table = RichTable(title=f"{numbers['run']} at step {numbers['step']}")
    for heading in ("split", *kinds):
        table.add_column(heading.replace("_", " "), justify="right" if heading in kinds else "left")
    for split in splits:
        table.add_row(split, *(f"{numbers[f'{split}_{kind}']:.4f}" for kind in kinds))
    _console().print(table)


def compare_results(comparison: Comparison, report: Path) -> None:
    """The table of a comparison, and what it says."""
    table = tables.quality_table(comparison)
    print_table(table, f"{comparison.recipe}: mean ± standard deviation over seeds")
    for sentence in (*tables.findings(comparison), *tables.fallbacks(comparison)):
        _console().print(sentence)
    print(f"report: {report}")  # in one piece, however long it is


def compare_plan(plan: Plan) -> None:
    """What a comparison would run, and for how long."""
    table = tables.plan_table(plan)
    print_table(table, table.title)
    _console().print(
        f"{plan.to_run} runs, about {_duration(plan.seconds)} of training on {plan.workers} "
        f"process{'es' if plan.workers > 1 else ''}; loading and evaluation come on "
        "top. Nothing was run: leave --plan out to run it"
    )


def print_table(table: Table, title: str) -> None:
    """A table of text, names to the left and the rest to the right."""
    console = _console()
    # Where rich draws its boxes in ASCII, the text in them must do without the rest too.
    shown = _IN_ASCII if console.options.ascii_only else {}
    printed = RichTable(title=title.translate(shown))
    for number, heading in enumerate(table.heading):
        printed.add_column(heading.translate(shown), justify="right" if number else "left")
    for row in table.rows:
        printed.add_row(*(cell.translate(shown) for cell in row))
    console.print(printed)


_IN_ASCII = str.maketrans({"±": "+-", "–": "-", "−": "-"})


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{in_digits(seconds, 2)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Console(Console):
    def __init__(self, width: int | None = None) -> None:
        # Intervals and paths are no markup, though `[+1, +2]` and `runs/mlp[lr=0.1]` look like it.
        super().__init__(width=width, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise  # as `print` does; rich itself would exit with 1


def _console() -> Console:
    console = _Console()
    # rich wraps at 80 columns where there is no terminal to ask, which breaks tables in logs
    return console if console.is_terminal else _Console(width=160)
