"""One comparison in words and tables, for the terminal, the report and pages of results."""

from collections.abc import Mapping, Sequence
from typing import Any

from fogzo_lab.comparison.compare import Plan
from fogzo_lab.comparison.intervals import Interval, Verdict
from fogzo_lab.comparison.metrics import TRAIN_LOSS, Metric
from fogzo_lab.comparison.results import Comparison, Difference, RowResult, row_title
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.table import Table, in_digits


def quality(result: Mapping[str, Any]) -> str:
    """Test results of one run in words, and the training loss where it was measured."""
    words = [f"test loss {result['test_loss']:.4f} nats"]
    words += [f"test accuracy {result['test_accuracy']:.2%}"]
    if "test_perplexity" in result:
        words += [f"test perplexity {result['test_perplexity']:.2f}"]
        words += [f"{result['test_bits_per_byte']:.3f} bits per byte"]
    if "train_loss" in result:
        words += [f"train loss {result['train_loss']:.4f}"]
    return ", ".join(words)


def page_table(comparison: Comparison) -> Table:
    """What a page of results shows of a comparison, and where it was measured."""
    main = comparison.main_metric
    # Streamed text has no training loss.
    shown = [metric for metric in (main, TRAIN_LOSS) if metric in comparison.metrics]
    heading = ["gradient", "steps + extra forward passes"]
    for metric in shown:
        heading += [metric.heading, "FOGZO − row"]
    rows = []
    for row in comparison.rows:
        extra = "–" if row.extra_forwards is None else f"{row.extra_forwards:,g}"
        cells = [row.title, f"{row.steps:,} + {extra}"]
        for metric in shown:
            gap = metric.called(comparison.interval(row, metric))
            cells += [metric.spread(row.summary(metric.key)), gap]
        rows.append(cells)
    edges = [row.title for row in comparison.rows if row.at_edge_of_grid]
    caption = (
        f"Mean ± standard deviation over {comparison.num_seeds} seeds; differences paired by seed, "
        "with 95% intervals, bold where they exclude zero."
    )
    if edges:
        caption += f" Best learning rate at an edge of the grid: {'; '.join(edges)}."
    return Table("", heading, rows, f"{caption} {where(comparison.environment)}")


def quality_table(comparison: Comparison, differences: bool = True) -> Table:
    """What every row reached and, where `difference_table` is not shown, how far FOGZO is from it.

    There is no column of differences where there is none to show.
    """
    metrics, main = comparison.metrics, comparison.main_metric
    with_own = any(row.value is not None for row in comparison.rows)
    heading = ["row", *(metric.heading for metric in metrics), "learning rate"]
    heading += [*(["own parameter"] if with_own else []), "steps"]
    gaps = [comparison.interval(row, main) for row in comparison.rows]
    differences = differences and any(gap is not None and gap.exists for gap in gaps)
    if differences:
        heading += [f"FOGZO minus row, {main.unit or 'perplexity'} [95%]"]
    rows = []
    for row, gap in zip(comparison.rows, gaps, strict=True):
        cells = [row.title, *(metric.spread(row.summary(metric.key)) for metric in metrics)]
        cells += [row.chosen_rate, *([row.chosen_value] if with_own else [])]
        cells += [f"{row.steps:,}"]
        cells += [main.interval(gap)] if differences else []
        rows.append(cells)
    caption = (
        "Mean ± standard deviation over seeds, at the learning rate, and the row's own parameter, "
        'of lowest mean validation loss; "(edge)" marks an end of what was tried, where a better '
        "one may lie beyond."
    )
    return Table("Final quality", heading, rows, caption)


def difference_table(comparison: Comparison) -> Table | None:
    """The differences in every metric; None where there is no interval."""
    metrics = [
        metric
        for metric in comparison.metrics
        if any(metric.key in gap.intervals for gap in comparison.differences)
    ]
    if not any(gap.exists for found in comparison.differences for gap in found.intervals.values()):
        return None
    rows = [
        [gap.title, *(metric.interval(gap.intervals.get(metric.key)) for metric in metrics)]
        for gap in comparison.differences
    ]
    caption = (
        "FOGZO minus row, paired by seed, with Student's 95% interval. A difference is significant "
        "where its interval excludes zero."
    )
    heading = ["row", *(metric.heading for metric in metrics)]
    return Table("FOGZO minus every other row", heading, rows, caption)


def cost_table(comparison: Comparison) -> Table:
    """What every row costs, in time and in passes that no machine changes."""
    times = comparison.run_seconds
    heading = ["row", "step time / STE's", "seconds", "steps", "forward passes"]
    heading += ["backward passes", "forward equivalents", "tuning runs"]
    rows = []
    for row in comparison.rows:
        ratio = f"{times[row.name] / times['ste']:.2f}" if "ste" in times else "–"
        seconds = comparison.seconds(row)
        counts = (row.forwards, row.steps, row.forward_equivalents)
        taken = "–" if seconds is None else in_digits(seconds, 3)
        cells = [row.title, ratio, taken, f"{row.steps:,}"]
        cells += ["–" if count is None else f"{count:,.10g}" for count in counts]
        rows.append([*cells, str(row.tuning_runs)])
    caption = (
        "Times are of training alone, by interleaved timing on one machine. Passes are over a "
        "whole batch, in one run; a backward pass counts as two forward passes."
    )
    if len({row.tuning_runs for row in comparison.rows}) > 1:
        caption += (
            " Rows of which a parameter of their own was tuned have tried more candidates than the "
            "others: tuning runs says so."
        )
    return Table("Cost", heading, rows, caption)


def plan_table(plan: Plan) -> Table:
    """What a comparison would run."""
    rows = []
    for row in plan.rows:
        counts = (row.steps, row.runs, row.runs - row.to_run, row.to_run)
        times = (in_digits(row.seconds_per_run, 3), in_digits(row.seconds, 3))
        rows.append([row_title(row.name, row.budget), *map(str, counts), *times])
    heading = ("row", "steps", "runs", "cached", "to run", "seconds per run", "seconds")
    return Table(f"{plan.recipe}: what would run", heading, rows)


def findings(comparison: Comparison) -> list[str]:
    """What the intervals allow one to say about FOGZO, in sentences, wins and losses alike."""
    begins: dict[Verdict, str] = {
        "better": "FOGZO's {} is significantly better than that of ",
        "worse": "FOGZO's {} is significantly worse than that of ",
        "not significant": "No significant difference in {}: ",
    }
    sentences = []
    for metric in comparison.metrics:
        verdicts = _verdicts(comparison, metric)
        for kind, begin in begins.items():
            labels = [difference.title for difference, _, found in verdicts if found == kind]
            if labels:
                sentences.append(f"{begin.format(metric.name)}{'; '.join(labels)}.")
    if sentences:
        sentences += _left_out(comparison, comparison.rows)
        return [*sentences, "Each by a 95% interval of differences paired by seed."]
    return [_no_interval(comparison)] if comparison.differences else []


def fallback_words(refined_steps: int, counts: Mapping[str, int]) -> str:
    """How many refined steps of a run, or of a row's runs, fell back and why; empty if none."""
    if not counts:
        return ""
    reasons = sorted(counts, key=counts.__getitem__, reverse=True)
    said = [reason if len(counts) == 1 else f"{reason} ({counts[reason]:,})" for reason in reasons]
    return (
        f"{sum(counts.values()):,} of {refined_steps:,} refined steps kept STE's "
        f"gradient: {'; '.join(said)}."
    )


def fallbacks(comparison: Comparison) -> list[str]:
    """A sentence for every row of which some steps fell back."""
    words = [
        (row.title, fallback_words(row.refined_steps, row.fallbacks)) for row in comparison.rows
    ]
    return [f"{title}: {said}" for title, said in words if said]


def story(comparison: Comparison) -> list[str]:
    """The findings with their numbers, for somebody who has not read the paper."""
    main, fogzo = comparison.main_metric, comparison.find("fogzo")
    if fogzo is None:
        return ["FOGZO is not among the rows, so nothing is compared with it."]
    if fogzo.summary(main.key) is None:
        return ["FOGZO's loss did not stay finite: there is nothing to compare."]
    unit = "%" if main.unit == "points" else ""
    lines = [f"FOGZO reached a {main.name} of {main.spread(fogzo.summary(main.key))}{unit}."]
    verdicts, diverged = _verdicts(comparison, main), _diverged(fogzo, main)
    if diverged:
        lines = [f"{diverged}."] if verdicts else []
    begins: dict[Verdict, str] = {
        "better": "significantly better than",
        "worse": "significantly worse than",
        "not significant": "not significantly different from",
    }
    whole = ROWS[comparison.time_of].label
    time = f"With equal time, each row taking as many steps as fit into {whole}'s seconds"
    for budget, when in (("steps", "With equal steps"), ("time", time)):
        parts = []
        for kind, words in begins.items():
            named = [
                f"{difference.row.label} ({_range(main, gap)})"
                for difference, gap, found in verdicts
                if found == kind and difference.budget == budget
            ]
            if named:
                parts.append(f"{words} {', '.join(named)}")
        if parts:
            lines.append(f"{when}, FOGZO was {'; '.join(parts)}.")
    if not verdicts:
        return [*lines, _no_interval(comparison)]
    lines += _left_out(comparison, [row for row in comparison.rows if row is not fogzo])
    direction = "more" if main.more_is_better else "less"
    lines.append(
        "In brackets: FOGZO minus the row, and its 95% interval over seeds; "
        f"{direction} is better. A difference is significant where the interval excludes zero, "
        "which chance alone makes happen about once in twenty rows."
    )
    return lines


def where(environment: Mapping[str, Any]) -> str:
    """Where and when something was measured, as the end of a caption."""
    if "machines" in environment:
        return f"{environment['machines']}; {environment['date']}."
    return (
        f"{environment['processor']}, {environment['cores']} cores, torch {environment['torch']}, "
        f"{environment['date']}."
    )


def _verdicts(
    comparison: Comparison, metric: Metric
) -> Sequence[tuple[Difference, Interval, Verdict]]:
    """Every quantized row with its difference in a metric, and what to call it."""
    found = []
    for difference in comparison.differences:
        gap = difference.intervals.get(metric.key)
        if gap is None or difference.row.name == "float":
            continue
        verdict = gap.verdict(metric.more_is_better)
        if verdict is not None:
            found.append((difference, gap, verdict))
    return found


def _no_interval(comparison: Comparison) -> str:
    """Why there is no verdict."""
    main, fogzo = comparison.main_metric, comparison.find("fogzo")
    others = [row for row in comparison.rows if row.name not in ("float", "fogzo")]
    if not others:
        return "No other quantized row stands beside FOGZO to be compared with: --rows ste fogzo."
    if all(len(row.seeds) == 1 for row in comparison.rows):
        return "With one seed no interval exists, and no winner is called: --num-seeds 5."
    if fogzo and _diverged(fogzo, main):
        why = _diverged(fogzo, main)
    elif all(_diverged(row, main) for row in others):
        why = "A run diverged in each of the other quantized rows"
    else:
        why = "All seeds differ by the same number, which tells no spread"
    return f"{why}, so no interval exists and no winner is called."


def _left_out(comparison: Comparison, rows: Sequence[RowResult]) -> list[str]:
    """A sentence on those of which no verdict tells, as a run diverged; none if all are whole."""
    main = comparison.main_metric
    said = [_diverged(row, main) for row in rows if row.name != "float"]
    named = "; ".join(filter(None, said))
    return [f"{named}, so no winner is called there."] if named else []


def _diverged(row: RowResult, metric: Metric) -> str:
    """How many runs of a row have diverged, and no such number, in words; empty if none."""
    count = row.values(metric.key).count(None)
    return f"{count} of {len(row.seeds)} runs of {row.title} diverged" if count else ""


def _range(metric: Metric, gap: Interval) -> str:
    ends = f"{metric.text(gap.low, '+')} to {metric.text(gap.high, '+')}"
    return f"{metric.text(gap.mean, '+')} {metric.unit}".rstrip() + f", {ends}"
