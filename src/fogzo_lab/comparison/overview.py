"""Many comparisons in one table: what the intervals say of FOGZO beside its rivals."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from fogzo_lab.comparison.intervals import Interval, Verdict
from fogzo_lab.comparison.results import BUDGETS, Budget, Comparison, RowResult
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.tables import where
from fogzo_lab.table import Table

RIVALS = ("ste", "ste-unmasked", "placebo")
"""Rows that every gradient should be compared with, none of which needs extra forward passes."""

Called = Verdict | Literal["no interval", "not run"]
SIGNS: Mapping[Called, str] = {
    "better": "+",
    "worse": "−",
    "not significant": "=",
    "no interval": "?",
    "not run": "·",
}
_WHEN: Mapping[Budget, str] = {"steps": "", "time": " at equal time"}


def verdict_table(comparisons: Mapping[str, Comparison]) -> Table:
    """A row per comparison, a sign per rival and budget.

    Args:
        comparisons: By what was trained, and how it was quantized.
    """
    rows, calls = [], Counter[Called]()
    for label, comparison in comparisons.items():
        cells = []
        for name in RIVALS:
            verdicts = [_verdict(comparison, name, budget) for budget in BUDGETS]
            calls.update(verdicts)
            cells.append(" / ".join(SIGNS[verdict] for verdict in verdicts))
        rows.append([label, *cells, _beside_the_best(comparison)])
    count = sum(calls[verdict] for verdict in get_args(Verdict))
    tuned = [row for comparison in comparisons.values() for row in comparison.rows]
    caption = (
        f"{count} signs in the first three columns: {calls['better']} are +, {calls['worse']} "
        f"are − and {calls['not significant']} are =; "
        f"chance alone would make about {count / 20:.0f} significant. Best learning rate at an "
        f"edge of the grid: {sum(row.at_edge_of_grid for row in tuned)} of {len(tuned)} tuned rows."
    )
    if any(SIGNS["no interval"] in cell for cells in rows for cell in cells[1:]):
        caption += (
            f" {SIGNS['no interval']}: run, but without an interval, as a run diverged or the "
            "seeds tell no spread."
        )
    heading = ["network: quantizer", *(ROWS[name].label for name in RIVALS)]
    return Table("Verdicts", [*heading, "best free rival"], rows, caption)


def differences_table(comparisons: Mapping[str, Comparison], varied: str = "quantizer") -> Table:
    """What FOGZO reached in every comparison, and its differences from the rivals.

    Args:
        comparisons: By what was varied; all of one main metric.
        varied: What that is.

    Raises:
        ValueError: If one lacks FOGZO or is judged by another metric.
    """
    rows, seeds = [], set()
    main = next(iter(comparisons.values())).main_metric
    for label, comparison in comparisons.items():
        seeds.add(comparison.num_seeds)
        fogzo = comparison.find("fogzo")
        if fogzo is None or comparison.main_metric != main:
            raise ValueError(
                f"{label} has rows {', '.join(row.name for row in comparison.rows)} and is judged "
                f"by {comparison.main_metric.name}: expected fogzo among the rows, and {main.name}"
            )
        for budget, gaps in _gaps(comparison):
            cells = [main.called(gap) for gap in gaps]
            own = comparison.find("fogzo", budget) or fogzo
            reached = main.spread(own.summary(main.key))
            rows.append([label, budget, reached, *cells])
    direction = "more" if main.more_is_better else "less"
    caption = (
        f"{main.heading[0].upper()}{main.heading[1:]}, {direction} is better: mean ± standard "
        f"deviation over {' or '.join(map(str, sorted(seeds)))} seeds; differences paired by seed, "
        "with 95% intervals, bold where they exclude zero."
    )
    heading = [varied, "at equal", "FOGZO", *(f"FOGZO − {ROWS[name].label}" for name in RIVALS)]
    return Table("FOGZO beside its rivals", heading, rows, caption)


def rivals_table(comparison: Comparison, name: str) -> Table:
    """One row beside the rivals at equal time.

    Args:
        comparison: It has the row and all rivals.
        name: The row that is compared with them.

    Raises:
        ValueError: If it lacks one of them.
    """
    main = comparison.main_metric
    own, *rivals = (comparison.find(row, "time") for row in (name, *RIVALS))
    rows = []
    for rival in rivals:
        if own is None or rival is None:
            raise ValueError(
                f"{comparison.recipe} lacks a row: expected {name}, {', '.join(RIVALS)}"
            )
        gap = Interval.paired(own.values(main.key), rival.values(main.key))
        cells = [main.spread(row.summary(main.key)) for row in (rival, own)]
        rows.append([rival.label, *cells, main.called(gap)])
    label = ROWS[name].label
    heading = ["rival", f"{main.name} of the rival", f"of {label}", "difference"]
    whole = ROWS[comparison.time_of].label
    caption = (
        f"All rows take the seconds of a whole run of {whole}. Differences are paired by seed."
    )
    return Table(label, heading, rows, caption)


def beside_table(comparison: Comparison, name: str = "ste") -> Table:
    """Every row minus one of them at each budget, what it was tuned to and what a step costs.

    Args:
        comparison: It has that row.
        name: The row that the others are compared with.

    Raises:
        ValueError: If it lacks the row.
    """
    main, base = comparison.main_metric, ROWS[name].label
    budgets = BUDGETS if comparison.has_equal_time else BUDGETS[:1]
    heading = ["method", main.heading, *(f"− {base}{_WHEN[budget]}" for budget in budgets)]
    heading += ["learning rate, own parameter", f"step time / {base}'s"]
    seconds, rows = comparison.run_seconds, []
    for row in comparison.rows:
        if row.budget != "steps":
            continue
        cells = [row.label, main.spread(row.summary(main.key))]
        for budget in budgets:
            found = comparison.find(row.name, budget) or row
            cells.append(main.called(_minus(comparison, found, name, budget)))
        cells += [", ".join(filter(None, (row.chosen_rate, row.chosen_value)))]
        rows.append([*cells, f"{seconds[row.name] / seconds[name]:.2f}"])
    whole = ROWS[comparison.time_of].label
    time = f"; at equal time each row takes as many steps as fit into {whole}'s seconds"
    caption = (
        f"Mean ± standard deviation over {comparison.num_seeds} seeds, differences paired by seed, "
        f"with 95% intervals, bold where they exclude zero{time if len(budgets) > 1 else ''}. "
        "Chosen by validation loss and shown as chosen at equal steps. "
        f"{where(comparison.environment)}"
    )
    return Table("", heading, rows, caption)


def minus_table(
    comparisons: Mapping[str, Comparison], names: Sequence[str], base: str = "ste"
) -> Table:
    """Some rows minus one in every comparison, at each budget.

    Args:
        comparisons: By what distinguishes them.
        names: The rows.
        base: The row that they are compared with; each comparison has it.
    """
    label, rows = ROWS[base].label, []
    for title, comparison in comparisons.items():
        main = comparison.main_metric
        for budget in BUDGETS if comparison.has_equal_time else BUDGETS[:1]:
            cells = []
            for name in (base, *names):
                row = comparison.find(name, budget)
                if row is None:
                    raise ValueError(f"{title} lacks the row {name}")
                gap = main.called(_minus(comparison, row, base, budget))
                cells.append(main.spread(row.summary(main.key)) if name == base else gap)
            rows.append([title, budget, *cells])
    heading = ["comparison", "equal", label, *(f"{ROWS[name].label} − {label}" for name in names)]
    caption = (
        "Test accuracy in % (more is better), or perplexity for text (less is better), mean ± "
        "standard deviation over seeds; differences paired by seed, with 95% intervals, bold where "
        "they exclude zero."
    )
    return Table("", heading, rows, caption)


def leaders_table(comparisons: Mapping[str, Comparison]) -> Table:
    """For every comparison and budget the row of lowest validation loss, and FOGZO, minus STE.

    Rows without quantized training cannot lead.

    Args:
        comparisons: By what was trained, and how it was quantized; each has STE and FOGZO.
    """
    rows = []
    for label, comparison in comparisons.items():
        main = comparison.main_metric
        for budget in BUDGETS if comparison.has_equal_time else BUDGETS[:1]:
            names = dict.fromkeys(row.name for row in comparison.rows)
            trained = [n for n in names if n != "float" and not ROWS[n].quantized_after]
            found = [row for name in trained if (row := comparison.find(name, budget)) is not None]
            leader = min(found, key=lambda row: row.best_loss)
            ste, fogzo = (comparison.find(name, budget) for name in ("ste", "fogzo"))
            if ste is None or fogzo is None:
                raise ValueError(f"{label} lacks a row: expected ste and fogzo")
            gaps = [_minus(comparison, row, "ste", budget) for row in (leader, fogzo)]
            reached = main.spread(ste.summary(main.key))
            led = leader.label if math.isfinite(leader.best_loss) else "diverged"
            rows.append([label, budget, reached, led, *map(main.called, gaps)])
    heading = ["network: quantizer", "equal", "STE", "lowest validation loss", "it − STE"]
    caption = (
        "Test accuracy in % (more is better), or perplexity for LLaMA (less is better), mean ± "
        "standard deviation over seeds; differences paired by seed, with 95% intervals, bold where "
        "they exclude zero. Comparisons differ in the rows that were in them."
    )
    return Table("Leaders", [*heading, "FOGZO − STE"], rows, caption)


def _minus(comparison: Comparison, row: RowResult, name: str, budget: Budget) -> Interval | None:
    """A row minus that of the name at the same budget; None for that row itself."""
    base = comparison.find(name, budget)
    if base is None:
        known = ", ".join(each.name for each in comparison.rows)
        raise ValueError(f"there is no row {name} at equal {budget}, only {known}")
    key = comparison.main_metric.key
    return None if row is base else Interval.paired(row.values(key), base.values(key))


def tuning_table(comparisons: Mapping[str, Comparison]) -> Table:
    """What tuning chose for every row at equal steps, and what it reached with that.

    Args:
        comparisons: By what distinguishes them.

    Raises:
        ValueError: If one lacks FOGZO or a rival.
    """
    rows = []
    for label, comparison in comparisons.items():
        main = comparison.main_metric
        for name in (*RIVALS, "fogzo"):
            row = comparison.find(name)
            if row is None:
                raise ValueError(
                    f"{label} lacks the row {name}: expected {', '.join(RIVALS)} and fogzo"
                )
            gap = main.called(comparison.interval(row, main))
            kappa = row.chosen_value.removeprefix("kappa ")
            reached = main.spread(row.summary(main.key))
            rows.append([label, row.label, row.chosen_rate, kappa, reached, gap])
    heading = ["comparison", "gradient", "learning rate", "kappa", "test metric", "FOGZO − row"]
    caption = (
        "Chosen by validation loss, at equal steps. Test accuracy in % (more is better), or "
        'perplexity for text (less is better); "(edge)" marks an end of what was tried.'
    )
    return Table("Tuning", heading, rows, caption)


def best_free_rival(comparison: Comparison, budget: Budget) -> RowResult | None:
    """The quantized row of lowest validation loss that needs no extra forward passes."""
    names = [
        row.name
        for row in comparison.rows
        if row.extra_forwards == 0 and row.name != "float" and not ROWS[row.name].quantized_after
    ]
    found = [row for name in names if (row := comparison.find(name, budget)) is not None]
    return min(found, key=lambda row: row.best_loss, default=None)


def _beside_the_best(comparison: Comparison) -> str:
    """The signs beside the best free rival at both budgets, and what that is."""
    signs, names = [], []
    for budget in BUDGETS:
        rival = best_free_rival(comparison, budget)
        verdict = "not run" if rival is None else _verdict(comparison, rival.name, budget)
        signs.append(SIGNS[verdict])
        if rival is not None and verdict != "not run":
            names.append(rival.label)
    return f"{' / '.join(signs)} ({' / '.join(dict.fromkeys(names))})"


def _verdict(comparison: Comparison, name: str, budget: Budget) -> Called:
    if budget == "time" and not comparison.has_equal_time:
        return "not run"
    if any(comparison.find(each, budget) is None for each in (name, "fogzo")):
        return "not run"
    gap = _gap(comparison, name, budget)
    verdict = None if gap is None else gap.verdict(comparison.main_metric.more_is_better)
    return verdict or "no interval"


def _gaps(comparison: Comparison) -> Iterator[tuple[Budget, Sequence[Interval | None]]]:
    """FOGZO minus each rival, at each budget."""
    for budget in BUDGETS if comparison.has_equal_time else BUDGETS[:1]:
        yield budget, [_gap(comparison, name, budget) for name in RIVALS]


def _gap(comparison: Comparison, name: str, budget: Budget) -> Interval | None:
    row = comparison.find(name, budget)
    return None if row is None else comparison.interval(row, comparison.main_metric, budget)
