"""What is shown of a benchmark: a table per section, of at most six columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fogzo_lab.bench.suite import Results
from fogzo_lab.table import Table, in_digits

CaseResults = Mapping[str, Any]
"""A case as results.json holds it."""


def tables(results: Results) -> list[Table]:
    """A table per section, with all cases, from what results.json holds."""
    return [_table(_VIEWS[name], section["cases"]) for name, section in results["sections"].items()]


def peers_table(results: Results) -> Table:
    """The section "layers" with a row per layer: the presets that have a counterpart beside it."""
    ratios: dict[tuple[str, str], dict[str, str]] = {}
    reasons: dict[str, None] = {}
    for case in results["sections"]["layers"]["cases"]:
        facts = case["facts"]
        row = ratios.setdefault((facts["layer"], facts["mode"]), {})
        row[facts["alternative"]] = _ratio_text(case, "over base")
        if case["skipped"]:
            reasons[case["skipped"]] = None
    rows = [
        [f"{layer}, {mode}", *(row.get(name) or "–" for name in _PEERS)]
        for (layer, mode), row in ratios.items()
    ]
    caption = "Time of forward and backward over that of the float layer. " + _QUARTILES
    if reasons:
        caption += f" –: {'; '.join(reasons)}."
    return Table("Layers beside other libraries", ["layer", *_PEERS], rows, caption)


def overheads_table(settings: Mapping[str, Results]) -> Table:
    """The section "steps" of several benchmarks side by side.

    Args:
        settings: The results of each, by what distinguishes it.
    """
    cases = [results["sections"]["steps"]["cases"] for results in settings.values()]
    rows = [
        [same[0]["name"], *(_ratio_text(case, "overhead") for case in same)]
        for same in zip(*cases, strict=True)
    ]
    heading = ["network", *(f"overhead, {name}" for name in settings)]
    return Table("Overhead by setting", heading, rows, _QUARTILES)


_PEERS = (
    "fogzo.abs_max(4), channel",
    "torchao, int4, channel",
    "fogzo.abs_max(2)",
    "brevitas, 2 bits",
    "fogzo.lsq(2)",
)
_QUARTILES = "Medians of ratios within a round, with quartiles."


@dataclass(frozen=True)
class _Column:
    heading: str
    text: Callable[[CaseResults], str]


@dataclass(frozen=True)
class _View:
    """What is shown of a section's cases."""

    title: str
    caption: str
    columns: Sequence[_Column]


def _table(view: _View, cases: Sequence[CaseResults]) -> Table:
    # Of what this version no longer measures, only earlier results have a column.
    columns = [c for c in view.columns if not cases or any(c.text(case) for case in cases)]
    if any(case["skipped"] for case in cases):
        columns.append(_Column("skipped", lambda case: case["skipped"] or ""))
    rows = [[column.text(case) for column in columns] for case in cases]
    return Table(view.title, [column.heading for column in columns], rows, view.caption)


def _fact(heading: str, name: str, form: str = "") -> _Column:
    def text(case: CaseResults) -> str:
        value = case["facts"].get(name)
        return "" if value is None else format(value, form)

    return _Column(heading, text)


def _mib(heading: str, name: str) -> _Column:
    def text(case: CaseResults) -> str:
        value = case["facts"].get(name)
        return "" if value is None else f"{value / 2**20:.2f}"

    return _Column(heading, text)


def _milliseconds(heading: str, name: str) -> _Column:
    def text(case: CaseResults) -> str:
        value = case["seconds"].get(name)
        return "" if value is None else in_digits(1e3 * value, 3)

    return _Column(f"{heading}, ms", text)


def _ratio(heading: str, name: str) -> _Column:
    return _Column(heading, lambda case: _ratio_text(case, name))


def _ratio_text(case: CaseResults, name: str) -> str:
    found = case["ratios"].get(name)
    if found is None:
        return ""
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _met(case: CaseResults) -> str:
    """Target, and whether it is met: beyond the quartiles, as medians vary between runs."""
    overhead, target = case["ratios"].get("overhead"), case["facts"].get("target")
    if overhead is None or target is None:
        return ""
    met = overhead["high"] <= target
    return f"{target:.2f}: {'yes' if met else 'no' if overhead['low'] > target else 'undecided'}"


def _sizes(facts: Mapping[str, Any]) -> str:
    if "bytes" not in facts:
        return ""
    sizes = (facts["bytes"], facts["resident_bytes"])
    return " / ".join("?" if size is None else in_digits(size / 1e6, 3) for size in sizes)


def _speed(case: CaseResults, kind: str) -> str:
    """Tokens per second, and how many times those of the float network."""
    seconds = case["seconds"].get(kind)
    if seconds is None:
        return ""
    tokens = case["facts"]["prompt_tokens"] if kind == "prompt" else 1
    ratio = case["ratios"][f"{kind}, speed over float"]
    spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{tokens / seconds:,.0f} ({spread})"


_NAME = _Column("case", lambda case: case["name"])
_WEIGHTS = _fact("quantized weights", "quantized_weights", ",")

_VIEWS = {
    "steps": _View(
        "Steps: FOGZO beside STE",
        "Overhead is (FOGZO step − STE step) / two forward passes without gradients, 1 where "
        f"nothing else takes time. {_QUARTILES} A target between the quartiles is undecided.",
        (
            _NAME,
            _milliseconds("STE", "STE step"),
            _milliseconds("FOGZO", "FOGZO step"),
            _ratio("FOGZO / STE", "FOGZO / STE"),
            _ratio("overhead", "overhead"),
            _Column("target, met", _met),
        ),
    ),
    "memory": _View(
        "Memory: peak of a FOGZO step above an STE step's",
        "In copies of the quantized weights; over two steps, so that what the first leaves behind "
        "counts.",
        (
            _NAME,
            _WEIGHTS,
            _mib("STE peak, MiB", "ste_peak_bytes"),
            _fact("default", "default_copies", ".2f"),
            _fact("noise drawn twice", "redrawn_copies", ".2f"),
            _fact("lean", "lean_copies", ".2f"),
        ),
    ),
    "layers": _View(
        "Layers: forward and backward of one layer",
        f"Over the float layer. {_QUARTILES}",
        (
            _NAME,
            _milliseconds("pass", "step"),
            _ratio("over float", "over base"),
        ),
    ),
    "compiled": _View(
        "Compiled: whole steps with and without torch.compile",
        f"Compiled over eager. {_QUARTILES} Nothing was recompiled while it was timed.",
        (
            _NAME,
            _milliseconds("STE, compiled", "STE step, compiled"),
            _milliseconds("FOGZO, compiled", "FOGZO step, compiled"),
            _ratio("STE", "STE step, compiled / eager"),
            _ratio("FOGZO", "FOGZO step, compiled / eager"),
        ),
    ),
    "probes": _View(
        "Probes: kinds of probes, and n-SPSA in place",
        f"Over the row of the same comparison that has 1. {_QUARTILES} An n-SPSA row is a gradient "
        "without an optimizer step, the others are whole steps.",
        (
            _NAME,
            _milliseconds("time", "step"),
            _ratio("over base", "over base"),
        ),
    ),
    "scaling": _View(
        "Scaling: FOGZO step over STE step",
        "An MLP with one hidden layer, one thing varied at a time; each rank is a process on CPUs, "
        f"with a batch of its own. Memory in copies of the quantized weights. {_QUARTILES}",
        (
            _NAME,
            _milliseconds("STE", "STE step"),
            _milliseconds("FOGZO", "FOGZO step"),
            _ratio("FOGZO / STE", "FOGZO / STE"),
            _fact("memory, default", "default_copies", ".2f"),
            _fact("memory, lean", "lean_copies", ".2f"),
        ),
    ),
    "export": _View(
        "Export: a served LLaMA",
        "Every row is a process of its own, on CPUs. In memory: what the process grew by until it "
        "had answered once. Off by: the largest difference from the trained network's logits, over "
        "the largest of them. A token: a forward pass of one token without those before it, which "
        "is most of what generating the next one costs. Times are CPU time where there is one "
        "thread. In brackets the speed over that of the "
        "same reader's float network.",
        (
            _NAME,
            _Column("file / in memory, MB", lambda case: _sizes(case["facts"])),
            _fact("loaded in, s", "load_seconds", ".2f"),
            _fact("off by", "logits_difference", ".1g"),
            _Column("prompt, tokens/s", lambda case: _speed(case, "prompt")),
            _Column("a token, tokens/s", lambda case: _speed(case, "token")),
        ),
    ),
}
