"""README and docs/: their code runs, their commands parse, their lists are complete."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

import fogzo
import fogzo.export
from fogzo.quantizers import SURROGATE_NAMES
from fogzo_lab.cli import bench, commands, doctor, export, parsing
from fogzo_lab.comparison.rows import ROWS

ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
# A block that needs several ranks or a GPU says so, ```{.python .needs-ranks}, and only compiles.
BLOCK = re.compile(r"^```(?:(\w+)|\{\.(\w+) \.(needs-ranks|needs-gpu)\})\n(.*?)^```$", re.M | re.S)
FENCED = {name: [match.groups() for match in BLOCK.finditer(page)] for name, page in PAGES.items()}
COMMAND = re.compile(r"^ *(?:torchrun .* -m fogzo_lab\.cli\.main|fogzo) +(.*)", re.MULTILINE)


def blocks(name, language):
    """The code of a page in a language, and what each block needs, or None."""
    return [
        (code, needs) for plain, marked, needs, code in FENCED[name] if language in (plain, marked)
    ]


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name, "python")])
def test_python_code_runs_from_top_to_bottom(name, capsys):
    namespace = {"__name__": name}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for code, needs in blocks(name, "python"):
            compiled = compile(code, name, "exec")
            if needs is None:
                exec(compiled, namespace)
    if name == "README.md":
        agreement, *inspection = capsys.readouterr().out.splitlines()
        assert 0 < float(agreement) < 3
        assert inspection[0].startswith("layer")


@pytest.mark.parametrize("name", PAGES)
def test_every_fence_is_closed_and_of_a_known_language(name):
    assert PAGES[name].count("\n```") == 2 * len(FENCED[name])
    assert {plain or marked for plain, marked, _, _ in FENCED[name]} <= {"python", "sh"}


@pytest.mark.parametrize("name", PAGES)
def test_code_fits_the_width_of_the_site(name):
    code = [code for language in ("python", "sh") for code, _ in blocks(name, language)]
    lines = "".join(code).splitlines()
    assert not [line for line in lines if len(line) > 80]


def shell_lines():
    for name, page in PAGES.items():
        indented = "\n".join(re.findall(r"^    .*", page, re.MULTILINE))
        for code in [indented, *(code for code, _ in blocks(name, "sh"))]:
            whole = code.replace("\\\n", " ")
            yield from ((name, found[1]) for found in COMMAND.finditer(whole))


class Parsed(Exception):
    """A command's arguments are a config."""


def parse_only(parse, *arguments, **options):
    raise Parsed(parse(*arguments, **options))


@pytest.mark.parametrize(("name", "line"), sorted(set(shell_lines())))
def test_commands_parse(name, line, monkeypatch):
    for module in (commands, bench, doctor, export):
        monkeypatch.setattr(module, "parse", partial(parse_only, parsing.parse))
    arguments = shlex.split(line, comments=True)
    if arguments[-1] == "--help":
        arguments.pop()
    with pytest.raises(Parsed):
        commands.run(arguments)


def test_pages_with_commands_are_found():
    assert {name for name, _ in shell_lines()} >= {
        *("training.md", "comparing.md", "costs.md", "doctor.md", "exporting.md")
    }


def test_the_api_reference_holds_every_public_name():
    shown = set(re.findall(r"^::: fogzo\.(\w+)$", PAGES["api.md"], re.MULTILINE))
    assert shown == set(fogzo.__all__)


@pytest.mark.parametrize("room", [fogzo.methods, fogzo.export], ids=["methods", "export"])
def test_the_api_reference_holds_every_name_of_a_room(room):
    shown = set(re.findall(rf"^::: {room.__name__}\.(\w+)$", PAGES["api.md"], re.MULTILINE))
    assert shown == set(room.__all__)


def test_the_table_of_surrogates_is_complete():
    section = PAGES["quantizers.md"].partition("\n## Surrogates\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(SURROGATE_NAMES)


def test_the_table_of_rows_is_complete():
    section = PAGES["comparing.md"].partition("\n## Rows\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|(.*)", section, re.MULTILINE)
    listed = set()
    for names, meaning in cells:
        found = re.findall(r"`([\w-]+)`", names)
        listed |= {*found, *(f"{n}-published" for n in found if "also `-published`" in meaning)}
    assert listed == set(ROWS)


def test_contributing_names_every_room():
    rooms = {
        path.stem
        for package in ("fogzo", "fogzo_lab")
        for path in (ROOT / "src" / package).iterdir()
        if not path.name.startswith("_") and path.suffix in ("", ".py")
    }
    section = PAGES["CONTRIBUTING.md"].partition("\n## The rooms\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^- ((?:`\w+`(?:, )?)+):", section, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(listed))) == rooms
