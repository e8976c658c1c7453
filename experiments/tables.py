"""Rewrite the tables and plots of docs/, and the reports, from the committed JSON.

With --check nothing is written, and tables that differ are an error.

    python experiments/tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is one of `TABLES`,
a folder of experiments/ with a results.json, or bench-FOLDER-SECTION of a folder of benchmarks/.
The folders of `fogzo compare` have a config.json too.

Either way it is an error if a comment is no such mark, a mark has no results, a table is empty, a
page of docs/ with generated tables has others too, a plot that a page shows does not exist, or
committed results or plots stand on no page.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any

from fogzo_lab.bench import plot as bench_plot
from fogzo_lab.bench import views
from fogzo_lab.comparison.compare import CompareConfig
from fogzo_lab.comparison.overview import (
    beside_table,
    differences_table,
    leaders_table,
    minus_table,
    rivals_table,
    tuning_table,
    verdict_table,
)
from fogzo_lab.comparison.report import write_compare_report
from fogzo_lab.comparison.results import Comparison
from fogzo_lab.comparison.tables import page_table, where
from fogzo_lab.table import Table
from fogzo_lab.training.config import from_dict

ROOT = Path(__file__).parent.parent
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
BEGIN = re.compile(r"<!-- table: ([\w.-]+) -->")
END = "<!-- end -->"
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)")

NETWORKS = {
    "MLP": {
        "fixed, identity, AdamW": "mnist-mlp-adamw",
        "fixed, identity, SGD": "mnist-mlp-sgd",
        "fixed, hardtanh": "mnist-mlp-hardtanh",
        "fixed, tanh": "mnist-mlp-tanh",
        "fixed, ApproxSign": "mnist-mlp-approx-sign",
        "LSQ, W2": "mnist-mlp-lsq-w2",
        "LSQ, W2A2": "mnist-mlp-lsq-w2a2",
        "QuEST, W2": "mnist-mlp-quest-w2",
        "QuEST, W2A2": "mnist-mlp-quest-w2a2",
    },
    "DeiT": {
        "fixed, identity": "cifar-deit-identity",
        "fixed, identity, kappa tuned": "cifar-deit-kappa",
        "fixed, hardtanh": "cifar-deit-hardtanh",
        "fixed, tanh": "cifar-deit-tanh",
        "fixed, ApproxSign": "cifar-deit-approx-sign",
        "LSQ, W2": "cifar-deit-lsq-w2",
    },
    "ResNet-18": {
        "fixed, identity": "cifar-resnet-identity",
        "fixed, hardtanh": "cifar-resnet-hardtanh",
        "fixed, tanh": "cifar-resnet-tanh",
        "fixed, ApproxSign": "cifar-resnet-approx-sign",
    },
    "LLaMA": {
        "fixed, identity": "shakespeare-llama-identity",
        "fixed, identity, kappa tuned": "shakespeare-llama-kappa",
        "fixed, tanh": "shakespeare-llama-tanh",
        "LSQ, W2A2": "shakespeare-llama-lsq-w2a2",
        "QuEST, W2A2": "shakespeare-llama-quest-w2a2",
    },
}
"""The folders of the comparisons with the paper's, by network and quantizer."""

LONG = {
    "LLaMA, 3,000 steps: fixed, identity": "long-llama-identity",
    "LLaMA, 3,000 steps: fixed, tanh": "long-llama-tanh",
    "LLaMA, 3,000 steps: LSQ": "long-llama-lsq-w2",
    "LLaMA, 3,000 steps: QuEST, W2A2": "long-llama-quest-w2a2",
    "DeiT, 4,000 steps: fixed, identity": "long-deit-identity",
    "DeiT, 4,000 steps: fixed, tanh": "long-deit-tanh",
    "DeiT, 4,000 steps: LSQ": "long-deit-lsq-w2",
    "DeiT, 4,000 steps: QuEST, W2A2": "long-deit-quest-w2a2",
    "ResNet-18, 4,000 steps: fixed, identity": "long-resnet-identity",
    "ResNet-18, 4,000 steps: fixed, tanh": "long-resnet-tanh",
    "ResNet-18, 4,000 steps: LSQ": "long-resnet-lsq-w2",
    "ResNet-18, 4,000 steps: QuEST, W2A2": "long-resnet-quest-w2a2",
}
"""Comparisons at the length where quantization decides, each with a plot, length.svg."""

MASKS = {
    "MLP, 1 bit": "bits-1-mnist-mlp",
    "MLP, 2 bits": "methods-mnist-mlp",
    "MLP, 3 bits": "bits-3-mnist-mlp",
    "MLP, 4 bits": "bits-4-mnist-mlp",
    "MLP, 2 bits, six epochs": "mnist-mlp-adamw",
    "MLP, 2 bits, SGD": "mnist-mlp-sgd",
    "DeiT, 600 steps": "cifar-deit-identity",
    "DeiT, 4,000 steps": "long-deit-identity",
    "ResNet-18, 600 steps": "cifar-resnet-identity",
    "ResNet-18, 4,000 steps": "long-resnet-identity",
    "LLaMA, 450 steps": "shakespeare-llama-identity",
    "LLaMA, 3,000 steps": "long-llama-identity",
}
"""Step sizes that are kept, by network, bits and length: what a mask costs."""

ALONE = (
    "linear-mnist-mlp",
    "long-deit-quest-w2a2-inputs",
    "long-llama-quest-w2a2-inputs",
    "long-resnet-quest-w2a2-inputs",
)
"""Comparisons of one question."""

METHODS = {
    "MLP, methods: fixed, identity": "methods-mnist-mlp",
    "MLP, methods: LSQ, W2": "methods-mnist-mlp-lsq",
}
"""Those of the methods that a user would weigh."""

PAPER = {
    ("DeiT", "fixed, identity"): ("DeiT-Tiny", "62.72 → 70.06"),
    ("DeiT", "fixed, tanh"): ("DeiT-Tiny", "41.98 → 46.8"),
    ("DeiT", "LSQ, W2"): ("DeiT-Small", "79.55 → 80.06"),
    ("ResNet-18", "fixed, identity"): ("ResNet-18", "79.92 → 80.42"),
    ("ResNet-18", "fixed, tanh"): ("ResNet-18", "74.68 → 75.02"),
    ("LLaMA", "fixed, identity"): ("LLaMA-9M", "109.95 → 105.64"),
    ("LLaMA", "fixed, tanh"): ("LLaMA-9M", "123.97 → 121.51"),
    ("LLaMA", "LSQ, W2A2"): ("LLaMA-95M", "39.06 → 37.38"),
    ("LLaMA", "QuEST, W2A2"): ("LLaMA-95M", "37.75 → 37.37"),
}
"""What the paper reports for its own, larger, networks: STE, then FOGZO."""

RADII = {
    "half the radius": "radius-0.5-mnist-mlp",
    "the surrogate's radius": "laws-mnist-mlp",
    "twice the radius": "radius-2-mnist-mlp",
}
KAPPAS = {
    "DeiT, kappa tuned": "cifar-deit-kappa",
    "LLaMA, kappa tuned": "shakespeare-llama-kappa",
    "LLaMA, kappa 0.01": "shakespeare-llama-identity",
}
OPTIMIZERS = {"AdamW": "mnist-mlp-adamw", "SGD": "mnist-mlp-sgd"}
SETTINGS = {"1 thread": "full", "2 threads": "two-threads", "memory kept": "kept-memory"}
COLUMNS = 6
"""The most that a table has."""
SCRIPTS = (
    "agreement",
    "agreement-scatter",
    "doctor",
    "dynamics",
    "embedded",
    "executors",
    "few-numbers",
    "forgetting",
    "forwards",
    "latents",
    "masked-share",
    "prediction",
    "regression",
    "serving",
    "step-cost",
    "synthetic-law",
    "toy",
)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checks = parser.parse_args().check
    if not checks:
        redraw()  # first, as pages show the plots
    try:
        pages = rebuilt_pages(ROOT)
    except ValueError as error:
        sys.exit(str(error))
    for page, text in pages.items():
        if not checks:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.name} differs from the committed results: run make results")


def redraw() -> None:
    """Draw the plots and write the reports, from the committed JSON."""
    with chdir(ROOT):  # where the configs' output folders begin
        for path in Path("experiments").glob("*/config.json"):
            config = from_dict(CompareConfig, read(path))
            comparison = Comparison.from_dict(read(path.with_name("results.json")))
            write_compare_report(config, comparison)
        for folder in LONG.values():
            path = Path("experiments", folder)
            script("lengths").plot(read(path / "results.json"), path / "length.svg")
        for name in SCRIPTS:
            for plot in Path("experiments", name).glob("*.svg"):
                script(name).plot(read(plot.with_name("results.json")), plot)
        for plot in Path("benchmarks").glob("*/bench.svg"):
            bench_plot.plot(read(plot.with_name("results.json")), plot)
        steps = Results(ROOT).bench("full", "steps")
        bench_plot.plot(steps, Path("benchmarks/full/steps.svg"))


class Results:
    """The committed JSON below a folder, and which of it has been asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.used: set[str] = set()

    def experiment(self, name: str) -> dict[str, Any]:
        """The results of an experiment.

        Raises:
            ValueError: If there are none.
        """
        self.used.add(name)
        return self._read("experiments", name)

    def comparison(self, name: str) -> Comparison:
        """The results of an experiment that is a comparison.

        Raises:
            ValueError: If there are none, or they are of something else.
        """
        return Comparison.from_dict(self.experiment(name))

    def comparisons(self, folders: dict[str, str]) -> dict[str, Comparison]:
        """Several comparisons, by what the values of the dictionary name."""
        return {label: self.comparison(folder) for label, folder in folders.items()}

    def bench(self, folder: str, section: str) -> dict[str, Any]:
        """The results of one section of a benchmark.

        Raises:
            ValueError: If there are none.
        """
        results = self._read("benchmarks", folder)
        if section not in results["sections"]:
            known = ", ".join(results["sections"])
            raise ValueError(f"benchmarks/{folder} has no section {section!r}, but {known}")
        self.used.add(f"bench-{folder}-{section}")
        return {**results, "sections": {section: results["sections"][section]}}

    def unused(self) -> list[str]:
        """What was committed and not asked for."""
        names = {path.parent.name for path in self.root.glob("experiments/*/results.json")}
        for path in self.root.glob("benchmarks/*/results.json"):
            names |= {f"bench-{path.parent.name}-{section}" for section in read(path)["sections"]}
        return sorted(names - self.used)

    def _read(self, *parts: str) -> dict[str, Any]:
        path = self.root.joinpath(*parts, "results.json")
        if not path.is_file():
            raise ValueError(f"no results: {path.relative_to(self.root)} does not exist")
        return read(path)


def rebuilt_pages(root: Path) -> dict[Path, str]:
    """README.md and the pages of docs/, with their tables made anew.

    Raises:
        ValueError: If anything of a table is missing, or anything that is committed has no table.
    """
    results, shown = Results(root), set[Path]()
    pages: dict[Path, str] = {}
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        try:
            pages[page] = rebuilt(before, lambda name: table(name, results).markdown())
            if page.parent != root:
                check_all_generated(pages[page])
        except ValueError as error:
            raise ValueError(f"{page.name}: {error}") from None
        shown |= {(page.parent / link).resolve() for link in IMAGE.findall(before)}
    missing = sorted(str(path) for path in shown if not path.is_file())
    left = results.unused()
    left += [str(p) for p in root.glob("experiments/*/*.svg") if p.resolve() not in shown]
    if missing:
        raise ValueError(f"a page shows a plot that does not exist: {', '.join(missing)}")
    if left:
        raise ValueError(f"committed, but on no page: {', '.join(left)}")
    return pages


def rebuilt(text: str, make: Callable[[str], str]) -> str:
    """A page with what stands between its marks made anew.

    Raises:
        ValueError: If a comment is no mark or out of place, or a table cannot be made.
    """
    parts, start, name = [], 0, None
    for comment in COMMENT.finditer(text):
        mark, begin = comment[0], BEGIN.fullmatch(comment[0])
        line = text.count("\n", 0, comment.start()) + 1
        if name is None and begin:
            name = begin[1]
            parts.append(text[start : comment.end()] + "\n")
        elif name is not None and mark == END:
            try:
                parts.append(make(name))
            except ValueError as error:
                raise ValueError(f"line {line}: the table {name!r}: {error}") from None
            start, name = comment.start(), None
        else:
            expected = "<!-- table: NAME -->" if name is None else f"{END} of the table {name!r}"
            raise ValueError(f"line {line}: expected {expected}, got {mark[:80]!r}")
    if name is not None:
        raise ValueError(f"the table {name!r} has no {END}")
    return "".join(parts) + text[start:]


def check_all_generated(text: str) -> None:
    """Raise a `ValueError` if a page has a table of its own beside those between marks."""
    outside = rebuilt(text, lambda name: "")
    if outside == text:
        return  # no marks: a page of prose, whose tables hold no results
    for row in re.findall(r"^\|.*", outside, re.MULTILINE):
        raise ValueError(f"a table that no results make: {row[:80]!r}")


def table(name: str, results: Results) -> Table:
    """The table of that name.

    Raises:
        ValueError: If it has no results, or more columns than a page is wide.
    """
    found = unchecked_table(name, results)
    if len(found.heading) > COLUMNS:
        raise ValueError(f"{len(found.heading)} columns, where {COLUMNS} fit: {found.heading}")
    return found


def unchecked_table(name: str, results: Results) -> Table:
    """The table of that name, however wide."""
    if name in TABLES:
        return TABLES[name](results)
    if name.startswith("bench-"):
        folder, _, section = name.removeprefix("bench-").rpartition("-")
        found = results.bench(folder, section)
        return measured(views.tables(found)[0], found)
    if name in SCRIPTS:
        return script(name).table(results.experiment(name))
    return page_table(results.comparison(name))


def verdicts(results: Results) -> Table:
    """Every network in one table."""
    return verdict_table(results.comparisons(every_network()))


def leaders(results: Results) -> Table:
    """What led each comparison."""
    return leaders_table(results.comparisons(METHODS | LONG | every_network()))


def every_network() -> dict[str, str]:
    """The folders of all networks, by network and quantizer."""
    return {
        f"{network}: {quantizer}": folder
        for network, quantizers in NETWORKS.items()
        for quantizer, folder in quantizers.items()
    }


def paper(results: Results) -> Table:
    """The paper's figures beside those of the smaller networks here."""
    rows = []
    for (network, quantizer), (theirs, figures) in PAPER.items():
        found = results.comparison(NETWORKS[network][quantizer])
        ste, main = found.find("ste"), found.main_metric
        own = "" if ste is None else main.called(found.interval(ste, main))
        rows.append([f"{network}: {quantizer}", own, theirs, figures])
    heading = ["network here", "FOGZO − STE here", "network of the paper", "paper: STE → FOGZO"]
    caption = (
        "Test accuracy in % (more is better), perplexity for LLaMA (less is better); ours at equal "
        "steps. The paper's are of its own data, without intervals."
    )
    return Table("", heading, rows, caption)


def overheads(results: Results) -> Table:
    """Overheads of a step in several settings."""
    found = {name: results.bench(folder, "steps") for name, folder in SETTINGS.items()}
    return measured(views.overheads_table(found), found["1 thread"], threads=False)


def peers(results: Results) -> Table:
    """Layers beside those of other libraries."""
    found = results.bench("full", "layers")
    return measured(views.peers_table(found), found)


def measured(table: Table, results: dict[str, Any], threads: bool = True) -> Table:
    """A table of a benchmark that says where it was measured."""
    count = results["threads"]
    said = f" {count} thread{'' if count == 1 else 's'}." if threads else ""
    caption = f"{table.caption}{said} {where(results['environment'])}"
    return Table(table.title, table.heading, table.rows, caption)


TABLES: dict[str, Callable[[Results], Table]] = {
    "verdicts": verdicts,
    "leaders": leaders,
    **{
        folder: lambda results, folder=folder: beside_table(results.comparison(folder))
        for folder in (*METHODS.values(), *LONG.values(), *ALONE)
    },
    **{
        f"network-{network.lower()}": lambda results, own=own: differences_table(
            results.comparisons(own)
        )
        for network, own in NETWORKS.items()
    },
    "masks": lambda results: minus_table(
        results.comparisons(MASKS), ("ste-unmasked", "placebo", "fogzo")
    ),
    "long-beside-unmasked": lambda results: minus_table(
        results.comparisons(LONG), ("ste", "placebo", "fogzo"), base="ste-unmasked"
    ),
    "radius": lambda results: differences_table(results.comparisons(RADII), "radius"),
    "kappa": lambda results: tuning_table(results.comparisons(KAPPAS)),
    "mixture": lambda results: rivals_table(
        results.comparison(NETWORKS["LLaMA"]["fixed, identity"]), "ste-then-fogzo"
    ),
    "regression-theory": lambda results: script("regression_views").theory_table(
        results.experiment("regression")
    ),
    "dynamics-sizes": lambda results: script("dynamics").sizes_table(
        results.experiment("dynamics")
    ),
    "paper": paper,
    **{
        f"forgetting-{task}": lambda results, task=task: script("forgetting").table(
            results.experiment("forgetting"), task
        )
        for task in ("graph-4", "graph-2", "digits-2")
    },
    "agreement-alone": lambda results: minus_table(
        results.comparisons(OPTIMIZERS), ("lambda", "placebo", "ste-unmasked")
    ),
    "linear-beside-placebo": lambda results: minus_table(
        {"MLP: fixed, identity": results.comparison("linear-mnist-mlp")},
        ("fogzo", "fogzo-linear", "ste-unmasked"),
        base="placebo",
    ),
    "agreement-scatter-short": lambda results: script("agreement_scatter").short_table(
        results.experiment("agreement-scatter")
    ),
    "latents-toy": lambda results: script("latents").toy_table(results.experiment("latents")),
    "overheads": overheads,
    "peers": peers,
    "doctor-codes": lambda results: script("doctor").codes_table(results.experiment("doctor")),
    "serving-rounding": lambda results: script("serving").rounding_table(
        results.experiment("serving")
    ),
    "serving-openvino": lambda results: script("serving").openvino_table(
        results.experiment("serving")
    ),
}
"""Tables of more or less than one folder's results."""


def script(name: str) -> ModuleType:
    """The script beside this one that measured an experiment."""
    return importlib.import_module(name.replace("-", "_"))


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
