"""The runs of a comparison on disk, so that none is ever trained twice.

A run's folder is named after what is in it, ``ste-lr0.003-steps500-seed0-CONFIG-CODE``: CONFIG is a
hash of everything in its config that changes its numbers, CODE one of the code that trains. The run
is finished when its result.json carries both.
"""

import ast
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from shlex import quote
from typing import NotRequired, TypedDict

import torch

import fogzo
import fogzo_lab
from fogzo_lab.data.config import DataConfig, ImagesConfig
from fogzo_lab.data.record import Digests, digest_data
from fogzo_lab.system.environment import library_versions, version_of
from fogzo_lab.system.folder_lock import locked
from fogzo_lab.system.json_files import dumps, read_json, write_text
from fogzo_lab.training.config import TrainConfig, to_json
from fogzo_lab.training.run_folder import Metrics, read_metrics
from fogzo_lab.training.state import find_weights

_LOG = logging.getLogger(__name__)

# What changes no number of a run.
_FREE = ("output_dir", "resume", "overwrite", "checkpoint_every", "keep_checkpoints", "trackers")
# The code that a run executes. Rows, statistics and reports only choose runs and read them.
_CHANGES_NUMBERS = (
    "fogzo/",
    "fogzo_lab/data/",
    "fogzo_lab/training/",
    "fogzo_lab/comparison/runs.py",
    "fogzo_lab/system/devices.py",
)
_DIGITS = 12


@cache
def code_version() -> str:
    """A hash of the code that can change a run's numbers, and of the libraries' versions.

    Comments, docstrings and layout cannot, nor can the version of Python.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for library, found in library_versions().items():
        digest.update(f"\0{library} {found}".encode())
    for package in (fogzo, fogzo_lab):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            name = f"{package.__name__}/{path.relative_to(root).as_posix()}"
            if name.startswith(_CHANGES_NUMBERS):
                digest.update(name.encode() + b"\0" + _statements(path).encode())
    return digest.hexdigest()[:_DIGITS]


def _statements(path: Path) -> str:
    """A module's code without comments and docstrings."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    return _written(tree)


def _written(node: object) -> str:
    """A part of a syntax tree as text, which `ast` itself writes otherwise in each Python."""
    if isinstance(node, list):
        return f"[{' '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # Later versions add fields, empty where a program does not use what is new.
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    said = " ".join(f"{name}={_written(value)}" for name, value in fields)
    return f"({type(node).__name__} {said})"


def config_hash(config: TrainConfig, then: str = "") -> str:
    """A hash of what a run trains, and of what is done with it then."""
    values = dataclasses.asdict(config)
    for name in _FREE:
        del values[name]
    if isinstance(config.data, ImagesConfig):
        values["data"]["workers"] = 0  # batches are the same, whoever loads them
    if config.initial_weights is not None:
        # The weights themselves, wherever they lie and whatever will lie there later.
        values["initial_weights"] = [_manifest(config.initial_weights)]
    if config.method.name == "parq":  # the one method that another library computes
        values["torchao"] = version_of("torchao")
    if files := _data_digests(config.data):
        values["data_files"] = files
    text = json.dumps(values, sort_keys=True, default=str) + then
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


@cache
def _data_digests(data: DataConfig) -> Digests:
    return digest_data(data)


@cache
def _manifest(run: Path) -> str:
    """Sizes and digests of the files whose weights a training would load."""
    return (find_weights(run) / "manifest.json").read_text(encoding="utf-8")


class RunCache:
    """Finished runs in ``output_dir/runs``.

    Args:
        folder: The comparison's folder.
        code: Version of the code that runs are to be of.
        mix_versions: Take finished runs of other versions too.
    """

    def __init__(self, folder: Path, code: str, mix_versions: bool = False) -> None:
        self.folder = folder
        self.code = code
        self.mix_versions = mix_versions
        for read in (_data_digests, _manifest):
            read.cache_clear()  # a comparison reads its data once, the next one anew

    def path(self, label: str, key: str) -> Path:
        """Where a run is, or will be."""
        own = self.folder / "runs" / f"{label}-{key}-{self.code}"
        if self.mix_versions and not _is_finished(own):
            return next(iter(self._others(key)), own)
        return own

    def result(self, path: Path) -> Metrics | None:
        """The result of a finished run; None where it is still to run.

        An entry that cannot be read is set aside, with a warning.
        """
        try:
            return _read(path)
        except (ValueError, OSError) as error:
            aside = _set_aside(path)
            _LOG.warning("%s cannot be read (%s) and runs again; it is now %s", path, error, aside)
            return None

    def check_versions(self, runs: Iterable[tuple[str, str]]) -> None:
        """Look for runs, given as (label, key), that only another version has finished.

        Raises:
            ValueError: If there are some and they are not to be mixed in.
        """
        if self.mix_versions:
            return
        found = {
            other.name.rpartition("-")[2]: other
            for label, key in runs
            if not (self.path(label, key) / "result.json").exists()
            for other in self._others(key)
        }
        if found:
            raise ValueError(
                f"{self.folder} holds runs of another version of the code or of its libraries "
                f"({', '.join(sorted(found))}; this is {self.code}), such as "
                f"{next(iter(found.values())).name}: compare in a fresh --output-dir "
                f"{quote(f'{self.folder}-{self.code[:4]}')}, or add --mix-versions to use them as "
                "they are"
            )

    def lock(self) -> AbstractContextManager[None]:
        """Keep other comparisons out of the folder; it ends with the process, however that ends.

        Raises:
            ValueError: If another one is at work there.
        """
        return locked(self.folder, "comparison")

    def timing(self) -> "Timing":
        """Measured step times."""
        return Timing(self)

    def _others(self, key: str) -> list[Path]:
        """The finished runs of other versions: nothing is ever trained into their folders."""
        found = sorted((self.folder / "runs").glob(f"*-{key}-*"))
        return [path for path in found if not path.name.endswith(self.code) and _is_finished(path)]


class Timing:
    """Seconds of a step by config, in timing.json: equal time stays what it was measured as."""

    def __init__(self, cache: RunCache) -> None:
        self._path = cache.folder / "timing.json"
        self._cache = cache
        self._stored: dict[str, float] = {}
        if self._path.exists():
            try:
                self._stored = _read_times(self._path)
            except ValueError as error:
                _LOG.warning("%s; step times are measured again", error)

    def get(self, key: str) -> float | None:
        """Seconds a step, or None if they were not measured."""
        own = self._stored.get(f"{key}-{self._cache.code}")
        if own is None and self._cache.mix_versions:
            return next((s for k, s in self._stored.items() if k.startswith(f"{key}-")), None)
        return own

    def add(self, seconds: Mapping[str, float]) -> None:
        """Keep what was measured."""
        self._stored |= {f"{key}-{self._cache.code}": value for key, value in seconds.items()}
        write_text(self._path, dumps(self._stored, indent=1) + "\n")


def finish(path: Path, config: TrainConfig, result: Metrics) -> None:
    """Mark a run as finished: the last thing that is written of it."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "config.json").exists():
        write_text(path / "config.json", to_json(config))
    marked = {**result, "run": _identity(path)}
    marked["log_lines"] = len(read_metrics(path / "metrics.jsonl"))
    write_text(path / "result.json", dumps(marked, indent=2) + "\n")


class _Finished(TypedDict):
    """What the summary needs of a result.json to be as it should."""

    run: NotRequired[str]
    log_lines: NotRequired[int]
    steps: int
    seconds: float
    diverged: NotRequired[bool]
    extra_forwards: NotRequired[float]
    refined_steps: NotRequired[int]
    fallbacks: NotRequired[dict[str, int]]
    validation_loss: NotRequired[float | None]
    train_loss: NotRequired[float | None]
    test_loss: NotRequired[float | None]
    test_accuracy: NotRequired[float | None]
    test_perplexity: NotRequired[float | None]


def _read_times(path: Path) -> dict[str, float]:
    times: dict[str, float] = read_json(path, dict[str, float], "it is written anew")
    bad = [value for value in times.values() if value <= 0]
    if bad:
        raise ValueError(f"{path} has a time of {bad[0]} seconds")
    return times


def _read(path: Path) -> Metrics | None:
    if not (path / "result.json").exists():
        return None
    result: Metrics = read_json(path / "result.json", _Finished, "it is trained again")
    if "run" not in result:
        return None  # killed between training and `finish`
    if result["run"] != _identity(path):
        raise ValueError(f"its result.json is of another run, {result['run']}")
    if not result.get("diverged") and "validation_loss" not in result:
        raise ValueError("its result.json has no validation_loss")
    metrics = read_metrics(path / "metrics.jsonl")
    if len(metrics) != result.get("log_lines", len(metrics)):
        raise ValueError(f"its metrics.jsonl has {len(metrics)} lines of {result['log_lines']}")
    if metrics and metrics[-1]["step"] != result["steps"]:
        raise ValueError(f"its metrics.jsonl ends at step {metrics[-1]['step']}")
    return result


def _is_finished(path: Path) -> bool:
    """Whether a run is there whole, and no damaged one or one that was killed."""
    try:
        return _read(path) is not None
    except (ValueError, OSError):
        return False


def _identity(path: Path) -> str:
    return "-".join(path.name.rsplit("-", 2)[1:])


def _set_aside(path: Path) -> Path:
    corrupt = path.parent.with_name("corrupt")
    corrupt.mkdir(exist_ok=True)
    names = (corrupt / f"{path.name}-{number}" for number in itertools.count())
    aside = next(name for name in names if not name.exists())  # some may have been deleted
    os.replace(path, aside)
    return aside
