"""The files of a local data set that are data, and the split of each."""

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fogzo_lab.data.config import EMBEDDED, HUB_IDS

_LOG = logging.getLogger(__name__)

# Files that systems, editors, browsers and version control leave behind.
_LEFT_BEHIND = re.compile(
    r"\..*|__pycache__|__MACOSX|lost\+found|(eh)?thumbs\.db|desktop\.ini|~\$.*|#.*#|.*~"
    r"|.*\.(bak|crdownload|lock|orig|part|partial|rej|swo|swp|tmp)",
    re.IGNORECASE,
)
# Files that describe data or their licence, by the first word of their name.
_DESCRIPTION = re.compile(
    r"(licen[cs]e|copying|copyright|notice|readme|changelog|authors|contributors|contributing"
    r"|citation|requirements|version|checksums?|md5sums?|sha\d+sums?|code_of_conduct)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
_PROSE = ("", ".bib", ".cff", ".htm", ".html", ".md", ".rst", ".txt")
# Files that `datasets` writes beside data that it saves or caches.
_BOOKKEEPING = re.compile(r"dataset_(info|infos|dict)\.json|state\.json|cache-.*\.arrow")
# Files that hold nothing but data, so that prose or pictures beside them are no data.
_TABLES = ("parquet", "arrow")

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = "|".join(word for words in _SPLITS.values() for word in words)
_SPLIT_NAME = re.compile(rf"(?<![a-z])({_WORDS})(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class DataFiles:
    """The data files of a folder, all of one kind.

    Attributes:
        kind: Name of the format in `datasets`.
        splits: The files of train, validation and test, if there are any.
    """

    kind: str
    splits: dict[str, list[Path]]

    @property
    def paths(self) -> dict[str, list[str]]:
        """The same for `datasets`."""
        return {name: [str(file) for file in files] for name, files in self.splits.items()}


def local_path(dataset: str) -> Path | None:
    """The file or folder of a data set, or None for an embedded one or a hub id."""
    path = Path(dataset)
    return path if dataset not in (*EMBEDDED, *HUB_IDS) and path.exists() else None


def meant_files(root: Path) -> list[Path]:
    """The files of a folder that may be data, in the order of their paths; or the file itself.

    Hidden files and folders, backups, caches and licences never are; a README is included if it
    says which files are data.
    """
    if root.is_file():
        return [root]
    readme = root / "README.md" if declares_its_files(root) else None
    return [file for file in _walk(root) if not _is_description(file) or file == readme]


def find_data_files(root: Path, kinds: Mapping[str, str]) -> DataFiles | None:
    """The files of one kind in a folder, or a file by its own path; None if there are none.

    Names of folders and files assign them to splits. If some are named as training data, files that
    name no split are left out, except prose, which has arbitrary names.

    Args:
        root: The file or folder.
        kinds: Names of formats in `datasets`, by the suffix of their files.

    Raises:
        ValueError: If there are several kinds of data files.
    """
    files = meant_files(root)
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in kinds:
            by_kind.setdefault(kinds[file.suffix.lower()], []).append(file)
    kind = _only_kind(root, by_kind)
    if kind is None:
        return None
    splits: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "": []}
    for file in by_kind[kind]:
        splits[_named_split(file, root, kind)].append(file)
    unnamed = splits.pop("")
    if kind == "text" or not splits["train"]:
        splits["train"] = sorted([*splits["train"], *unnamed])
    splits = {name: group for name, group in splits.items() if group}
    meant = {*chain(*splits.values())}
    if rest := [file for file in files if file not in meant]:
        _LOG.warning("%s: reading %s and leaving %s", root, suffixes(meant), suffixes(rest))
    return DataFiles(kind, splits)


def declares_its_files(root: Path) -> bool:
    """Whether the README of a folder lists its data files, as on the hub."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    head = text.split("\n---", 1)[0]
    return head.startswith("---") and re.search(r"^configs:", head, re.MULTILINE) is not None


def suffixes(files: Collection[Path]) -> str:
    """The number of files per suffix, in words."""
    counts = Counter(file.suffix.lower() or file.name for file in files)
    shown = [f"{count} {suffix}" for suffix, count in counts.most_common(5)]
    more = len(counts) - len(shown)
    return ", ".join([*shown, *([f"{more} other kinds"] if more else [])]) or "no files"


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files that may be data, following links to folders, but never in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if _LEFT_BEHIND.fullmatch(path.name) or _BOOKKEEPING.fullmatch(path.name):
            continue
        if path.is_dir():
            if not _is_output(path):
                yield from _walk(path, (*above, real))
        elif path.is_file():
            yield path


def _is_output(folder: Path) -> bool:
    """Whether a folder holds a run or comparison of fogzo, or the cache of `datasets`."""
    if (folder / "config.json").exists():
        return any((folder / name).exists() for name in (".lock", "metrics.jsonl", "checkpoints"))
    library = sys.modules.get("datasets")
    return library is not None and folder.resolve() == Path(library.config.HF_DATASETS_CACHE)


def _is_description(file: Path) -> bool:
    return file.suffix.lower() in _PROSE and _DESCRIPTION.fullmatch(file.name) is not None


def _only_kind(root: Path, by_kind: Mapping[str, list[Path]]) -> str | None:
    tables = [kind for kind in _TABLES if kind in by_kind]
    kinds = set(by_kind) - {"text", "imagefolder"} if tables else set(by_kind)
    if len(kinds) > 1:
        examples = ", ".join(str(by_kind[kind][0]) for kind in sorted(kinds))
        raise ValueError(
            f"{root} holds data of several kinds ({suffixes([*chain(*by_kind.values())])}), and "
            f"nothing says which are meant: give a folder of one kind or one file of {examples} "
            "as --data.dataset"
        )
    return next(iter(kinds), None)


def _named_split(file: Path, root: Path, kind: str) -> str:
    """The split named by the first folder of a path that names one, or by the file; or none."""
    parts = file.relative_to(root).parts if file != root else ()
    for part in parts[:1] if kind == "text" else parts:
        # Prose is assigned by how its first name begins, tables and images by any word of a name.
        found = (_SPLIT_NAME.match if kind == "text" else _SPLIT_NAME.search)(part)
        if found:
            word = found[1].lower()
            return next(split for split, words in _SPLITS.items() if word in words)
    return ""
