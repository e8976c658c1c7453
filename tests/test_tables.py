"""`make results-check` fails on whatever a reader would miss: it reads the marks strictly."""

import json
import shutil
from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).parent.parent
PAGE = """# Results

<!-- table: radius-0.5-mnist-mlp -->
<!-- end -->

![curves](../experiments/regression/curves.svg)

<!-- table: regression -->
old
<!-- end -->
"""
README = "# fogzo\n\n| preset | levels |\n|---|---|\n"
COSTS = "# Costs\n\n<!-- table: bench-two-threads-steps -->\n<!-- end -->\n"


@pytest.fixture
def book(tmp_path):
    """A small copy of the pages and the committed results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    (tmp_path / "docs" / "costs.md").write_text(COSTS, encoding="utf-8")
    (tmp_path / "docs" / "results.md").write_text(PAGE, encoding="utf-8")
    for folder in ("experiments/radius-0.5-mnist-mlp", "experiments/regression",
                   "benchmarks/two-threads"):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(ROOT / folder / "results.json", tmp_path / folder)
    shutil.copy(ROOT / "experiments/regression/curves.svg", tmp_path / "experiments/regression")
    return tmp_path


def _replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def _edit_json(path, change):
    results = json.loads(path.read_text(encoding="utf-8"))
    change(results)
    path.write_text(json.dumps(results), encoding="utf-8")


def test_every_table_is_made_and_making_it_again_changes_nothing(book):
    pages = tables.rebuilt_pages(book)
    page = pages[book / "docs" / "results.md"]
    assert page.count("| gradient |") == 2 and "\nold\n" not in page
    assert page.startswith("# Results\n") and "![curves]" in page
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    assert tables.rebuilt_pages(book) == pages


MARK = "<!-- table: radius-0.5-mnist-mlp -->"
BROKEN = {
    "a mark misspelt": (
        lambda page, root: _replace(page, "table: radius", "tabel: radius"),
        r"results.md: line 3: expected <!-- table: NAME -->, got '<!-- tabel: radius-0.5",
    ),
    "a name that no mark can have": (
        lambda page, root: _replace(page, MARK, "<!-- table: radius 0.5 -->"),
        "line 3: expected <!-- table: NAME -->",
    ),
    "a mark without spaces": (
        lambda page, root: _replace(page, MARK, "<!--table: radius-0.5-mnist-mlp-->"),
        "line 3: expected",
    ),
    "no results of that name": (
        lambda page, root: _replace(page, MARK, "<!-- table: radius-0.7-mnist-mlp -->"),
        "'radius-0.7-mnist-mlp': no results: experiments/radius-0.7-mnist-mlp/results.json",
    ),
    "no benchmark of that name": (
        lambda page, root: _replace(root / "docs/costs.md", "two-threads-", "three-threads-"),
        "costs.md: .*benchmarks/three-threads/results.json does not exist",
    ),
    "no section of that name": (
        lambda page, root: _replace(root / "docs/costs.md", "threads-steps", "threads-memory"),
        "benchmarks/two-threads has no section 'memory', but steps",
    ),
    "a mark without an end": (
        lambda page, root: _replace(page, "old\n<!-- end -->\n", "old\n"),
        "the table 'regression' has no <!-- end -->",
    ),
    "a mark whose end is that of the next": (
        lambda page, root: _replace(page, f"{MARK}\n<!-- end -->", MARK),
        "expected <!-- end --> of the table 'radius-0.5-mnist-mlp', got '<!-- table: regression",
    ),
    "an end without a mark": (
        lambda page, root: _replace(page, MARK + "\n", ""),
        "line 3: expected <!-- table: NAME -->, got '<!-- end -->'",
    ),
    "results without rows": (
        lambda page, root: _edit_json(
            root / "benchmarks/two-threads/results.json",
            lambda results: results["sections"]["steps"].update(cases=[]),
        ),
        "'bench-two-threads-steps': it has no rows",
    ),
    "results of something else": (
        lambda page, root: _edit_json(
            root / "experiments/radius-0.5-mnist-mlp/results.json",
            lambda results: results.pop("rows"),
        ),
        "'radius-0.5-mnist-mlp': these are no results of a comparison: 'rows' is missing",
    ),
    "results on no page": (
        lambda page, root: _replace(page, f"{MARK}\n<!-- end -->", ""),
        "on no page: radius-0.5-mnist-mlp",
    ),
    "a benchmark on no page": (
        lambda page, root: (root / "docs/costs.md").write_text("# Costs\n"),
        "on no page: bench-two-threads-steps",
    ),
    "a plot on no page": (
        lambda page, root: _replace(page, "![curves](../experiments/regression/curves.svg)", ""),
        r"on no page: .*curves\.svg",
    ),
    "a page with a plot that is not there": (
        lambda page, root: _replace(page, "curves.svg", "curve.svg"),
        r"a plot that does not exist: .*curve\.svg",
    ),
    "a table written by hand among generated ones": (
        lambda page, root: _replace(page, "# Results\n", "# Results\n\n| row | loss |\n"),
        r"a table that no results make: '\| row \| loss \|'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_it_fails_on(name, book):
    breaks, message = BROKEN[name]
    breaks(book / "docs" / "results.md", book)
    with pytest.raises(ValueError, match=message):
        tables.rebuilt_pages(book)


def test_a_table_wider_than_a_page_is_refused(book, monkeypatch):
    monkeypatch.setattr(tables, "COLUMNS", 3)
    with pytest.raises(ValueError, match=r"the table '.*': \d columns, where 3 fit: "):
        tables.rebuilt_pages(book)


def test_the_committed_pages_are_what_the_results_make():
    pages = tables.rebuilt_pages(ROOT)
    assert {page.name for page in pages} >= {"README.md", "results.md", "costs.md"}
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run make results"
