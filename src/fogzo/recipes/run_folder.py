"""The files of a run: config.json, metrics.jsonl, checkpoints, result.json."""

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

import torch

from fogzo.recipes.config import TrainConfig, to_json

Metrics = dict[str, Any]


class RunFolder:
    """Creates the folder and writes into it; a context manager that closes metrics.jsonl."""

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.output_dir
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.json", to_json(config))
        self._metrics: TextIO = (self.path / "metrics.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._metrics.close()

    def log(self, metrics: Metrics) -> None:
        """Append one line; it is on disk when this returns."""
        self._metrics.write(dumps(metrics) + "\n")
        self._metrics.flush()

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> Path:
        """Write checkpoints/step-N.pt, whole or not at all."""
        path = self.path / "checkpoints" / f"step-{step:06d}.pt"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)
        return path

    def write_result(self, result: Metrics) -> None:
        """Write result.json: the run's final numbers."""
        write_text(self.path / "result.json", dumps(result, indent=2) + "\n")


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text in which what is not finite is null, as JSON has no word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
