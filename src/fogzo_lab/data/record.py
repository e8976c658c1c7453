"""Digests of the local data files of a run, so that it resumes on the same data only."""

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from fogzo_lab.data.config import DataConfig, TextConfig
from fogzo_lab.data.files import local_path, meant_files
from fogzo_lab.system.json_files import dumps, write_text

RECORD = "data.json"
"""The record's name in a run folder."""

# Files of more bytes in total are read in samples: the start, the end and parts in between.
_READ = 2**30
_SAMPLES = 16
# For more files than this, folders are recorded instead.
_MOST_NAMES = 10_000

Digests = dict[str, str]
"""Hash of each file, by its path."""


def digest_data(data: DataConfig) -> Digests:
    """Digests of the local files that a config reads; empty if all data are on the hub.

    For a gibibyte or more, they are of the sizes and of samples of the content.
    """
    files = _files(data)
    share = _READ // max(1, len(files))
    found: Digests = {}
    for name, file in files.items():
        state = file.stat()
        found[name] = _digest(file, state.st_size, state.st_mtime_ns, share)
    if len(found) <= _MOST_NAMES:
        return found
    folders: dict[str, list[str]] = {}
    for name, digest in found.items():
        folders.setdefault(str(Path(name).parent), []).append(f"{name}\0{digest}")
    return {name: sha256("\0".join(lines).encode()).hexdigest() for name, lines in folders.items()}


def stamp(data: DataConfig) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of these files; unchanged ones need not be read again."""
    states = [(name, file.stat()) for name, file in _files(data).items()]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def record_data(folder: Path, digests: Digests) -> None:
    """Record the digests in a run folder."""
    write_text(folder / RECORD, dumps(digests, indent=1) + "\n")


def check_unchanged(folder: Path, digests: Digests) -> None:
    """Check that a run resumes on the data it started with, as far as they are recorded.

    Raises:
        ValueError: If a file was changed, added or removed. It names the file.
    """
    if changes := changed_data(folder, digests):
        raise ValueError(
            f"the data of the run in {folder} are no longer what it began with: {changes}. Restore "
            "them to go on, or choose another --output-dir"
        )


def changed_data(folder: Path, digests: Digests) -> str:
    """The files that differ from those of a run, in words; empty if none do, or none are recorded.

    Raises:
        ValueError: If the record is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return ""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(
            f"{path} is damaged: restore it, or delete it if the data are those that the run "
            "began with"
        )
    changes = [
        f"{name} is {'gone' if name not in digests else 'changed' if name in stored else 'new'}"
        for name in sorted({*stored, *digests})
        if stored.get(name) != digests.get(name)
    ]
    more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
    return ", ".join(changes[:3]) + more


def _files(data: DataConfig) -> dict[str, Path]:
    if data.dataset == "pydoc":
        from pydoc_data import topics

        found = {"pydoc_data/topics.py": Path(topics.__file__)}  # of this version of Python
    else:
        found = _by_name(data.dataset)
    if isinstance(data, TextConfig) and data.tokenizer != "bytes":
        found |= _by_name(data.tokenizer)
    return found


def _by_name(source: str) -> dict[str, Path]:
    root = local_path(source)
    return {} if root is None else {str(file): file for file in meant_files(root)}


@lru_cache(maxsize=2 * _MOST_NAMES)
def _digest(file: Path, size: int, changed: int, share: int) -> str:
    digest = sha256(f"{size}\0".encode())
    with file.open("rb") as content:
        if size <= share:
            while block := content.read(2**20):
                digest.update(block)
            return digest.hexdigest()
        length = max(1, share // _SAMPLES)
        for number in range(_SAMPLES):
            content.seek(number * (size - length) // (_SAMPLES - 1))
            digest.update(content.read(length))
    return digest.hexdigest()
