"""The files of a run: config.json, metrics.jsonl, inspections.jsonl, checkpoints, result.json."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, NotRequired, Self, TypedDict, TypeVar

from fogzo.inspection import Inspection
from fogzo_lab.system.folder_lock import locked
from fogzo_lab.system.json_files import (
    check_regular,
    dumps,
    parse_json,
    read_json,
    write_text,
    writing,
)
from fogzo_lab.training.checkpoint import (
    clear_partial,
    delete,
    on_all_ranks,
    save_checkpoint,
    whole_checkpoints,
)
from fogzo_lab.training.checkpoint_format import DamagedCheckpoint, step_of
from fogzo_lab.training.config import TrainConfig, from_dict, to_json
from fogzo_lab.training.model_config import QuantizerConfig

Metrics = dict[str, Any]
T = TypeVar("T")

_LOG = logging.getLogger(__name__)

# Options that may differ when a run is resumed: none of them changes what is trained.
_MAY_DIFFER = {"output_dir", "resume", "overwrite", "device", "parallel", "data.workers"}
_MAY_DIFFER |= {"log_every", "checkpoint_every", "keep_checkpoints", "trackers", "inspect_every"}
_INSPECTIONS = "inspections.jsonl"
_FILES = ("config.json", "metrics.jsonl", "result.json")


class LogPosition(TypedDict):
    """Size and hash of metrics.jsonl when a checkpoint was written, which records them."""

    size: int
    sha256: str


class RunFolder(ExitStack):
    """Reads what is in a folder and writes a run into it. All ranks use it together.

    As a context it locks the folder. It changes nothing before `open`.

    Args:
        config: The run.
        writes: Whether this process writes; all processes write checkpoints.
    """

    def __init__(self, config: TrainConfig, writes: bool = True) -> None:
        super().__init__()
        self.path = config.output_dir
        self._config = config
        self._writes = writes
        self._resumed = False
        self._log: BinaryIO | None = None
        self._written = hashlib.sha256()

    def __enter__(self) -> Self:
        """Lock the folder.

        Raises:
            ValueError: If another process uses the folder, or it holds a run that this one would
                replace or, with ``resume``, a run of another config.
        """
        super().__enter__()
        try:
            on_all_ranks(self._claim)
        except BaseException:
            self.close()
            raise
        return self

    def _claim(self) -> None:
        if not self._writes:
            return
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            found = [name for name in (*_FILES, "checkpoints") if (self.path / name).exists()]
            if _holds_comparison(self.path):
                raise ValueError(
                    f"{self.path} is the folder of a comparison, whose config.json and report a "
                    f"run would replace: --output-dir {quote(f'{self.path}-run')}"
                )
            if found and self._config.resume:
                _check_same(self._config, read_config(self.path))
            elif found and not self._config.overwrite:
                raise ValueError(
                    f"{self.path} holds a run already: add --resume to go on with it, --overwrite "
                    "to replace it, or choose another --output-dir"
                )
            self.push(stack.pop_all())

    def begin(self, build: Callable[[Path | None], T]) -> T:
        """Build from the newest usable checkpoint, or from none.

        Args:
            build: Called with a checkpoint, or with None to start anew.

        Raises:
            ValueError: If there is a run to resume, but no usable checkpoint.
        """
        damaged: list[str] = []
        if self._config.resume:
            for checkpoint in whole_checkpoints(self.path, damaged):
                try:
                    built = build(checkpoint)
                    self._resumed = True
                    return built
                except DamagedCheckpoint as error:
                    damaged.append(error.reason)
                    if self._writes:
                        _LOG.warning("skipped a checkpoint that cannot be used: %s", error.reason)
            if not self._config.overwrite:
                on_all_ranks(lambda: self._check_nothing_to_lose(damaged))
        return build(None)

    def _check_nothing_to_lose(self, damaged: list[str]) -> None:
        """Raise unless the run was killed before its first checkpoint and its first step."""
        if not self._writes:
            return
        held = [path.name for path in sorted((self.path / "checkpoints").glob("step-*"))]
        held += [name for name in ("result.json",) if (self.path / name).exists()]
        held += [name for name in ("metrics.jsonl",) if _read_log(self.path / name)]
        if held or damaged:
            found = "; ".join(damaged) or f"it holds {', '.join(held)}"
            raise ValueError(
                f"there is no checkpoint in {self.path} to go on from ({found}). Nothing was "
                "changed: restore a checkpoint, add --overwrite to begin anew, or choose another "
                "--output-dir"
            )

    @contextmanager
    def open(self, step: int, position: LogPosition | None = None) -> Iterator[None]:
        """Let `log` append to what was logged up to a step.

        Args:
            step: Step of the checkpoint; a new run replaces what is there.
            position: From the checkpoint.
        """
        if not self._writes:
            yield
            return
        clear_partial(self.path)
        for name in _FILES:
            (self.path / f"{name}.partial").unlink(missing_ok=True)
        for name in ("result.json", "report.html"):  # of a run that had ended
            (self.path / name).unlink(missing_ok=True)
        path = self.path / "metrics.jsonl"
        if self._resumed:
            kept = _recovered(path, step, position)
        else:
            kept = b""
            for checkpoint in (self.path / "checkpoints").glob("*"):
                delete(checkpoint)
        write_text(self.path / "config.json", to_json(self._config))
        write_text(path, kept.decode())
        _cut_inspections(self.path, step if self._resumed else 0)
        self._written = hashlib.sha256(kept)
        with path.open("ab") as self._log:
            yield

    def log(self, metrics: Metrics) -> None:
        """Append one line, which survives a killed process."""
        if self._writes:
            assert self._log is not None, "log() before open()"
            line = (dumps(metrics) + "\n").encode()
            with writing(self.path / "metrics.jsonl"):
                self._log.write(line)
                self._log.flush()
            self._written.update(line)

    def log_inspection(self, inspection: Inspection) -> None:
        """Append a line to inspections.jsonl."""
        if self._writes:
            path = self.path / _INSPECTIONS
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(dumps(inspection.as_dict()) + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> Path:
        """Write checkpoints/step-N, whole or not at all, and delete the oldest ones."""
        position: LogPosition = {"size": 0, "sha256": ""}
        if self._log is not None:
            os.fsync(self._log.fileno())
            position = {"size": self._log.tell(), "sha256": self._written.hexdigest()}
        state = {**state, "log": position}
        return save_checkpoint(self.path, state["step"], state, self._config.keep_checkpoints)

    def set_aside_checkpoints(self, first: int) -> None:
        """Rename the checkpoints from a step on, whose weights have diverged."""
        if not self._writes:
            return
        for path in (self.path / "checkpoints").glob("step-*"):
            step = step_of(path)
            if step is not None and step >= first:
                aside = path.with_suffix(".diverged")
                if aside.exists():  # it was resumed, and has diverged again
                    delete(aside)
                os.replace(path, aside)

    def write_result(self, result: Metrics) -> None:
        """Write result.json: the run's final numbers."""
        if self._writes:
            write_text(self.path / "result.json", dumps(result, indent=2) + "\n")


class _Line(TypedDict):
    """A line of metrics.jsonl; all other values are numbers."""

    step: int
    loss: float | None
    seconds: float
    fallback: NotRequired[str | None]
    agreement: NotRequired[float | None]
    agreement_error: NotRequired[float | None]
    flip_rate: NotRequired[float | None]


class _Result(TypedDict):
    """The content of result.json; all other values are numbers."""

    steps: int
    seconds: float
    diverged: NotRequired[bool]
    run: NotRequired[str]  # which one of a comparison
    fallbacks: NotRequired[dict[str, int]]


def read_config(folder: Path) -> TrainConfig:
    """The config of the run in a folder.

    Raises:
        ValueError: If there is none, or another version wrote it.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"{folder} is not a run folder, as it has no config.json: restore it, or give the "
            "--output-dir of a run of fogzo train"
        )
    if _holds_comparison(folder):
        raise ValueError(
            f"{folder} is the folder of a comparison, not of one run: give one of those in "
            f"{folder / 'runs'}, or the --output-dir of a run of fogzo train"
        )
    way_out = "restore it, or train again"
    values = read_json(path, dict[str, Any], way_out)
    for name in ("quantizer", "activations"):
        given = values.get(name)
        if isinstance(given, dict) and given.get("preset") == "none":
            # Earlier versions kept a recipe's options, which say nothing in float, if they are any.
            with suppress(ValueError):
                from_dict(QuantizerConfig, given | {"preset": "fixed"})
                values[name] = dataclasses.asdict(QuantizerConfig())
    try:
        config: TrainConfig = from_dict(TrainConfig, values)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used ({error}): {way_out}") from error
    missing = sorted(flat(dataclasses.asdict(config)).keys() - flat(values).keys())
    if missing:
        _LOG.warning(
            "%s has no %s, as where an earlier version wrote it: the defaults are taken",
            path,
            ", ".join(missing),
        )
    return config


def _holds_comparison(folder: Path) -> bool:
    """Whether the config.json in a folder is one of `fogzo compare`, as far as it can be read."""
    with suppress(ValueError):
        return {"base", "rows"} <= read_json(folder / "config.json", dict[str, Any], "").keys()
    return False


def read_quantized_config(folder: Path, purpose: str) -> TrainConfig:
    """The config of the run in a folder, whose layers are to be quantized.

    Args:
        folder: Of the run.
        purpose: What is to be done with the codes, for messages.

    Raises:
        ValueError: If there is no such run, or it has no quantized layers.
    """
    config = read_config(folder)
    if config.quantizer.preset == "none":
        raise ValueError(
            f"{folder} was trained in float, and there are no codes to {purpose}: train it with "
            f"--quantizer.preset lsq --initial-weights {quote(str(folder))}"
        )
    if not config.has_codes:
        raise ValueError(
            f"{folder} was trained by PARQ, which has no quantized layers to {purpose} but weights "
            "on levels of torchao's: train it with --method.name cage, or use torchao_convert of "
            "its QuantOptimizer"
        )
    return config


def check_not_in_float(config: TrainConfig, run: Path, step: int) -> None:
    """Raise a `ValueError` if a run's network is still in float at that step.

    Args:
        config: Of the run.
        run: Its folder, or the checkpoint that was given.
        step: Of the checkpoint.
    """
    if config.in_float_at(step):
        raise ValueError(
            f"{run} is still in float at step {step}, before its quantization begins: go on, by "
            "the command that began it and --resume, or give a later checkpoint"
        )


def read_result(folder: Path) -> Metrics:
    """The final numbers of the run in a folder, from result.json.

    Raises:
        ValueError: If there are none, or they are damaged.
    """
    path, way_out = folder / "result.json", "run fogzo train with --resume to write it anew"
    result: Metrics = read_json(path, _Result, way_out)
    if result["steps"] < 0:
        raise ValueError(f"{path} is of {result['steps']} steps: {way_out}")
    return result


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics.jsonl, empty if there is no file; an unfinished last line is left out.

    Raises:
        ValueError: If a line is not of a training, or steps do not increase.
    """
    lines, bad = _parsed(_read_log(path))
    for number, why in bad:
        raise ValueError(f"{path}, line {number}, {why}: restore it, or delete the line by hand")
    return [metrics for metrics, _ in lines]


def read_inspections(folder: Path) -> list[Inspection]:
    """The inspections of the run in a folder, in order; an unfinished last line is left out.

    Raises:
        ValueError: If a line is none of an inspection.
    """
    path, found = folder / _INSPECTIONS, []
    for number, line in enumerate(_read_log(path).splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):  # else cut short by a kill
            try:
                found.append(Inspection.from_dict(parse_json(line, dict)))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}: delete the line by hand"
                ) from error
    return found


def _cut_inspections(folder: Path, step: int) -> None:
    """Leave the inspections up to a step, and no file where there are none."""
    path = folder / _INSPECTIONS
    if not path.exists():
        return
    kept = [i for i in read_inspections(folder) if (i.step or 0) <= step] if step else []
    if kept:
        write_text(path, "".join(dumps(inspection.as_dict()) + "\n" for inspection in kept))
    else:
        path.unlink()


def _read_log(path: Path) -> bytes:
    """The bytes of a log of lines, empty if there is no file."""
    if not path.exists():
        return b""
    try:
        check_regular(path, largest=None)
    except ValueError as error:
        raise ValueError(f"{path} {error}: move it out of the run folder") from error
    return path.read_bytes()


def _parsed(data: bytes) -> tuple[list[tuple[Metrics, bytes]], list[tuple[int, str]]]:
    """The valid lines, each with its bytes, and number and fault of the others."""
    good: list[tuple[Metrics, bytes]] = []
    bad: list[tuple[int, str]] = []
    last = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue  # cut short by a kill
        try:
            metrics: Metrics = parse_json(line, _Line)
            if metrics["step"] <= last:
                raise ValueError(f"is of step {metrics['step']} after step {last}")
        except ValueError as error:
            bad.append((number, str(error)))
        else:
            good.append((metrics, line))
            last = metrics["step"]
    return good, bad


def _recovered(path: Path, step: int, position: LogPosition | None) -> bytes:
    """The lines that were logged up to a step.

    A log that has changed since the checkpoint is set aside, and its readable lines are kept: it is
    the history of the run, which does not depend on it.
    """
    data = _read_log(path)
    if position is not None:
        kept = data[: position["size"]]
        if hashlib.sha256(kept).hexdigest() == position["sha256"]:
            return kept
    good, bad = _parsed(data)
    lines = [line for metrics, line in good if metrics["step"] <= step]
    if position is None and not bad:  # an earlier version wrote the checkpoint
        return b"".join(lines)
    last = max((metrics["step"] for metrics, _ in good if metrics["step"] <= step), default=0)
    aside = ""
    if path.exists():
        name = path.with_name(f"{path.name}.damaged")
        while name.exists():
            name = name.with_name(f"{name.name}-again")
        os.replace(path, name)
        aside = f"; the file itself is now {name}"
    _LOG.warning(
        "%s is not what it was when the checkpoint of step %d was written: of it %d lines are "
        "kept, up to step %d, and other lines are lost%s",
        *(path, step, len(lines), last, aside),
    )
    return b"".join(lines)


def _check_same(config: TrainConfig, stored: TrainConfig) -> None:
    """Raise a `ValueError` that names what differs, unless a run can go on under this config."""
    given, kept = (flat(dataclasses.asdict(c)) for c in (config, stored))
    differing = [
        f"{name.replace('_', '-')} ({kept.get(name)} there, {given.get(name)} here)"
        for name in sorted({*given, *kept})
        if name not in _MAY_DIFFER and given.get(name) != kept.get(name)
    ]
    if differing:
        raise ValueError(
            f"the run in {config.output_dir} has another config: {', '.join(differing)}. Give the "
            "same options to resume it, or choose another --output-dir"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found
