"""The files of a run: config.json, metrics.jsonl, checkpoints, result.json."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fogzo.recipes.checkpoint import newest_checkpoint, save_checkpoint
from fogzo.recipes.config import TrainConfig, from_dict, to_json

Metrics = dict[str, Any]

# What a resumed run may be asked for differently: none of it changes what is trained.
_FREE = {"output_dir", "resume", "overwrite", "log_every", "checkpoint_every", "keep_checkpoints"}
_FREE |= {"trackers", "device", "parallel"}


class RunFolder:
    """Finds what a folder holds, and writes a run into it.

    Nothing is changed before `open`.

    Args:
        config: The run.
        writes: Whether this process is the one that writes; checkpoints are written by all.

    Raises:
        ValueError: If the folder holds a run that this one would replace, or, with ``resume``,
            one of another config.
    """

    def __init__(self, config: TrainConfig, writes: bool = True) -> None:
        self.path = config.output_dir
        self._config = config
        self._writes = writes
        self._metrics: TextIO | None = None
        #: The newest valid checkpoint, where the run is to go on.
        self.checkpoint = newest_checkpoint(self.path) if config.resume else None
        if self.checkpoint is not None:
            _check_same(config, read_config(self.path))
        elif not config.overwrite and not config.resume and _holds_a_run(self.path):
            raise ValueError(
                f"{self.path} holds a run already: add --resume to go on with it, --overwrite to "
                "replace it, or choose another --output-dir"
            )

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Let `log` write after what was logged up to a step, 0 for a new run."""
        if not self._writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lines = [m for m in read_metrics(self.path / "metrics.jsonl") if m["step"] <= step]
        if self._config.overwrite and step == 0:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        (self.path / "result.json").unlink(missing_ok=True)
        write_text(self.path / "config.json", to_json(self._config))
        write_text(self.path / "metrics.jsonl", "".join(dumps(line) + "\n" for line in lines))
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as self._metrics:
            yield

    def log(self, metrics: Metrics) -> None:
        """Append one line; it is on disk when this returns."""
        if self._writes:
            assert self._metrics is not None, "log() before open()"
            self._metrics.write(dumps(metrics) + "\n")
            self._metrics.flush()

    def save_checkpoint(self, state: dict[str, Any]) -> Path:
        """Write checkpoints/step-N, whole or not at all, and drop the oldest."""
        return save_checkpoint(self.path, state["step"], state, self._config.keep_checkpoints)

    def set_aside_checkpoint(self, step: int) -> None:
        """Rename a checkpoint whose weights turned out to give no finite loss."""
        path = self.path / "checkpoints" / f"step-{step:06d}"
        if self._writes and path.exists():
            os.replace(path, path.with_suffix(".diverged"))

    def write_result(self, result: Metrics) -> None:
        """Write result.json: the run's final numbers."""
        if self._writes:
            write_text(self.path / "result.json", dumps(result, indent=2) + "\n")


def read_config(folder: Path) -> TrainConfig:
    """The config of the run in a folder.

    Raises:
        ValueError: If there is none, or another version wrote it.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is not a run folder, as it has no config.json: give the --output-dir of a "
            "run of fogzo train"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or train again") from error
    return from_dict(TrainConfig, values)


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics.jsonl; none where there is no file, or no end to the last line."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text in which what is not finite is null, as JSON has no word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _holds_a_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def _check_same(config: TrainConfig, stored: TrainConfig) -> None:
    """Raise a `ValueError` that names what differs, unless a run can go on under this config."""
    given, kept = (_flat(dataclasses.asdict(c)) for c in (config, stored))
    differing = [
        f"{name.replace('_', '-')} ({kept.get(name)} there, {given.get(name)} here)"
        for name in sorted({*given, *kept})
        if name not in _FREE and given.get(name) != kept.get(name)
    ]
    if differing:
        raise ValueError(
            f"the run in {stored.output_dir} has another config: {', '.join(differing)}. Give the "
            "same options to resume it, or choose another --output-dir"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
