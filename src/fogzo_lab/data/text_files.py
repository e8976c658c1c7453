"""Text in files: plain, or a column of a table that `datasets` reads."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fogzo_lab.data.config import TextConfig
from fogzo_lab.data.files import (
    DataFiles,
    declares_its_files,
    find_data_files,
    local_path,
    meant_files,
    suffixes,
)

_PARSERS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
_KINDS = {".txt": "text", **_PARSERS}

# First bytes of files that are not text, their kind, and how to convert them.
_SIGNATURES = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip -k {file}"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2 -k {file}"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with unxz -k {file}"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd {file}"),
    (b"PK\x03\x04", "a zip archive or an office document", "unpack it, or save it as plain text"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"%PDF", "a PDF document", "take its text out with pdftotext {file}"),
    (b"PAR1", "a parquet table", "name it so that it ends in .parquet"),
    (b"ARROW1", "an arrow table", "name it so that it ends in .arrow"),
    (b"SQLite format 3", "a database", "export a table of it as .csv"),
    (b"\xff\xfe", "UTF-16", "convert it with iconv -f utf-16 -t utf-8 {file}"),
    (b"\xfe\xff", "UTF-16", "convert it with iconv -f utf-16 -t utf-8 {file}"),
)


def plain_text(dataset: str) -> dict[str, list[str]] | None:
    """The documents of every split of a file or folder of plain text; None for anything else.

    Raises:
        ValueError: If there is no such file or folder, or it is not text.
    """
    root = _local(dataset)
    if root is None or (root.is_dir() and declares_its_files(root)):
        return None
    files = _find(root)
    if files.kind != "text":
        return None
    documents = {name: [_read(file) for file in group] for name, group in files.splits.items()}
    if not any(map(any, documents.values())):
        raise ValueError(f"{root} is empty: give a file with text as --data.dataset")
    return documents


@dataclass(frozen=True)
class Tables:
    """The splits of a data set of `datasets`, train among them, each a column of text.

    Attributes:
        splits: A `Dataset` or, streaming, an `IterableDataset` by name.
        column: Name of the column of text.
        files: The local files that are read, if any.
    """

    splits: dict[str, Any]
    column: str
    files: tuple[Path, ...]

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split."""
        return column_texts(self.splits[split], self.column, self.files)


def load_tables(config: TextConfig) -> Tables:
    """The column of text of a data set of `datasets`.

    Raises:
        ValueError: If it cannot be found or read, or has no such column or no train split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"reading {config.dataset!r} needs the datasets library: pip install 'fogzo[data]'"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    root = _local(config.dataset)
    found = None if root is None or declares_its_files(root) else _find(root)
    if found and config.subset is not None:
        raise ValueError(
            f"{config.dataset!r} has no subsets, as no README.md in it declares any: leave "
            f"--data.subset {config.subset} out, or give a folder inside as --data.dataset"
        )
    files = tuple(chain(*found.splits.values())) if found else ()
    source = (found.kind, None) if found else (config.dataset, config.subset)
    try:
        splits = datasets.load_dataset(
            *source, data_files=found and found.paths, streaming=config.streaming
        )
        # A stream may not know its columns before it is read.
        columns = {name: s.column_names or list(next(iter(s), {})) for name, s in splits.items()}
    except Exception as error:  # whatever the hub, the disk or a parser has to say
        raise _unreadable(config.dataset, files, error) from error
    if "train" not in splits:
        raise ValueError(
            f"{config.dataset!r} has the splits {', '.join(splits)} but no train: rename one in a "
            "copy of it, or use another --data.dataset"
        )
    for name, names in columns.items():
        if names and config.column not in names:
            raise ValueError(
                f"{config.dataset!r} has the columns {', '.join(names)} but not "
                f"{config.column!r}: {_advice(next(iter(splits[name]), {}))}"
            )
    texts = {name: split.select_columns([config.column]) for name, split in splits.items()}
    return Tables(texts, config.column, files)


def column_texts(
    rows: Iterable[dict[str, Any]], column: str, files: Sequence[Path] = ()
) -> Iterator[str]:
    """The texts of a column; empty strings where it has none.

    Args:
        rows: Rows with the column.
        column: Its name.
        files: The files of the rows, so that an error can name the broken one.

    Raises:
        ValueError: If a value is not text, or a row cannot be read.
    """
    for number, row in enumerate(_readable(rows, files)):
        value = row[column]
        if value is not None and not isinstance(value, str):
            kind, chats = type(value).__name__, _about_chats({column: value})
            if number and not chats:
                raise ValueError(
                    f"row {number} of the column {column!r} holds {kind}, where others hold text: "
                    "mend or remove it"
                )
            raise ValueError(
                f"the column {column!r} holds {kind}, not text: "
                + (chats or "give the name of a column of text, as in --data.column text")
            )
        yield value or ""


def _local(dataset: str) -> Path | None:
    """A file or folder, or None for a hub id.

    Raises:
        ValueError: If it looks like a path and does not exist.
    """
    path = local_path(dataset)
    if path is None and (dataset.startswith((".", "/")) or Path(dataset).suffix in _KINDS):
        raise ValueError(
            f"there is no file or folder {dataset!r}: give one, a hub id such as --data.dataset "
            "roneneldan/TinyStories, or --data.dataset pydoc"
        )
    return path


def _find(root: Path) -> DataFiles:
    # A file given by its own path is text, unless its name says that it is a table.
    if root.is_file() and root.suffix.lower() not in _PARSERS:
        return DataFiles("text", {"train": [root]})
    found = find_data_files(root, _KINDS)
    if found is None:
        files = meant_files(root)
        unpack = "unpack them" if any(_signature(file) for file in files) else "name text so"
        raise ValueError(
            f"could not load {str(root)!r}: only files of a folder are read that end in "
            f"{', '.join(_KINDS)}, and it has {suffixes(files)}: {unpack}, or give one file by its "
            "own path as --data.dataset"
        )
    return found


def _signature(file: Path) -> tuple[str, str] | None:
    """The kind of a file that is not text, and how to convert it."""
    with file.open("rb") as content:
        head = content.read(16)
    for begins, kind, advice in _SIGNATURES:
        if head.startswith(begins):
            return kind, advice.format(file=file)
    return None


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if found := _signature(file):
            raise ValueError(f"{file} is {found[0]}, not text: {found[1]}") from error
        raise ValueError(
            f"{file} is not UTF-8 at byte {error.start}: convert it, as with iconv -t utf-8, or "
            f"give a file of plain text or of {', '.join(_PARSERS)} as --data.dataset"
        ) from error


def _advice(row: dict[str, Any]) -> str:
    """Advice for a data set with such rows, whose column of text was not found."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if texts:
        return f"use --data.column {max(texts, key=lambda name: len(row[name]))}"
    return _about_chats(row) or "no column holds text: add one in a copy, written with to_json"


def _about_chats(row: dict[str, Any]) -> str | None:
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and {"role", "from"} & first.keys():
            return (
                f"{name} holds conversations, and a chat template makes text of them: write rows "
                f'{{"text": tokenizer.apply_chat_template(row["{name}"], tokenize=False)}} to '
                "chats.jsonl, and give --data.dataset ./chats.jsonl"
            )
    return None


def _readable(rows: Iterable[dict[str, Any]], files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows; what a parser raises on the way, as in a stream, is turned into a `ValueError`."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:  # whatever a parser has to say
            raise ValueError(f"a row cannot be read: {_place(files, error)}; mend it") from error
        if row is None:
            return
        yield row


def _unreadable(dataset: str, files: Sequence[Path], error: Exception) -> ValueError:
    """The error of a data set that cannot be read, with the place in a local one."""
    what = f"could not load {dataset!r} with datasets: {_place(files, error)}; "
    if files:
        return ValueError(what + "mend or remove it, or give another --data.dataset")
    return ValueError(
        what + "give a file, a folder or a hub id as --data.dataset and, where it has several, a "
        "configuration as --data.subset"
    )


def _place(files: Sequence[Path], error: Exception) -> str:
    """The file and line at fault, or the message of the error."""
    jsons = [file for file in files if file.suffix.lower() in (".json", ".jsonl")]
    return next(filter(None, map(_fault, jsons)), None) or _reason(error)


def _fault(file: Path) -> str | None:
    """The first fault in a file of JSON: one object per line, or a single value."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = _signature(file)
        return f"{file} is {found[0]}" if found else f"{file} is not UTF-8 at byte {error.start}"
    whole = _not_json(text)
    lines = text.split("\n")
    by_line = file.suffix == ".jsonl" or (whole is not None and _not_json(lines[0]) is None)
    if not by_line:
        return (
            f"{file}, line {whole.lineno}: {whole.msg} at column {whole.colno}" if whole else None
        )
    for number, line in enumerate(lines, start=1):
        if line.strip():
            if fault := _not_json(line):
                return f"{file}, line {number}: {fault.msg} at column {fault.colno}"
            if not isinstance(json.loads(line), dict):
                return f"{file}, line {number}: no JSON object, but {line.strip()[:40]}"
    return None


def _not_json(text: str) -> json.JSONDecodeError | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    return None


def _reason(error: BaseException) -> str:
    """The cause of an error in one line; `datasets` hides most behind an error of its own."""
    hides = str(error).strip() == "An error occurred while generating the dataset"
    shown = error.__cause__ if hides and error.__cause__ is not None else error
    return " ".join(str(shown).split())[:400] or type(shown).__name__
