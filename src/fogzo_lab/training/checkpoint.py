"""Checkpoints: tensors in safetensors, the rest in JSON; whole or absent; sharded or not.

A checkpoint is a folder, ``checkpoints/step-000123`` in the run's; `checkpoint_format` says what is
in it. A training loop saves everything that moves::

    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": rng_state(),
    }
    save_checkpoint(run_folder, step, state, keep=2)

and goes on from it, on as many ranks as it likes, whether FSDP2 shards the model or not::

    path = newest_checkpoint(run_folder)
    if path is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        like = {
            "model": model.state_dict(),
            "optimizer": {"state": dict(enumerate(parameters))},
        }
        state = load_checkpoint(path, like)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        restore_rng(state["rng"])

All ranks call `save_checkpoint`, `newest_checkpoint` and `rng_state` together.
"""

import errno
import importlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from fogzo.probing.rng import RngState
from fogzo_lab.system.devices import drawing_gpus
from fogzo_lab.system.json_files import checked
from fogzo_lab.training.checkpoint_format import (
    FORMAT,
    DamagedCheckpoint,
    Layout,
    Reader,
    own_piece,
    safetensors_chunks,
    step_of,
    write_file,
    write_json,
)

_LOG = logging.getLogger(__name__)

STRANGE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
"""The errors that loaders raise about a state that does not fit them."""


class CheckpointError(OSError):
    """A checkpoint could not be written. Earlier ones are as they were."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``checkpoints/step-N``, whole or not at all, then delete all but the newest.

    Tensors are copied to the CPU one at a time. Every rank writes its own part of each DTensor;
    everything else is taken from rank 0.

    Args:
        folder: Run folder.
        step: N. A checkpoint of the same step is replaced.
        state: Nested dicts (keys str or int), lists, tuples, None, bool, int, float, str and
            dense tensors. Subclasses (OrderedDict, numpy.float64) come back as their base class.
        keep: Number of checkpoints up to this step that stay.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If writing fails on any rank, which all ranks then raise.
        ValueError: If the state holds anything else.
    """
    rank, world = _rank_and_world()
    final = folder / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    name = f"tensors-{rank:05d}-of-{world:05d}.safetensors"
    layout = Layout()

    def prepare() -> None:
        layout.skeleton = layout.add(state, ())
        if rank == 0:
            partial.parent.mkdir(parents=True, exist_ok=True)
            clear_partial(folder)
            partial.mkdir()

    def write_own() -> dict[str, Any]:
        pieces = {key: p for key, t in layout.tensors.items() if (p := own_piece(t, rank))}
        if not pieces:
            return {"files": {}, "pieces": {}}
        located = {key: [name, p.offset, list(p.part.shape)] for key, p in pieces.items()}
        parts = {key: piece.part for key, piece in pieces.items()}
        written = write_file(partial / name, safetensors_chunks(parts))
        return {"files": {name: written}, "pieces": located}

    def finish() -> None:
        files: dict[str, Any] = {}
        for report in reports:
            files |= report["files"]
            for key, located in report["pieces"].items():
                layout.entries[key]["pieces"].append(located)
        files["state.json"] = write_json(partial / "state.json", layout.skeleton)
        manifest = {"format": FORMAT, "step": step, "files": files}
        write_json(partial / "manifest.json", manifest)
        _flush_folder(partial)
        _rename_over(partial, final)

    try:
        on_all_ranks(prepare)
        reports = on_all_ranks(write_own)
        on_all_ranks(finish if rank == 0 else lambda: None)
    except BaseException as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        newest = newest_checkpoint(folder)
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, None)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {error}; "
            + (f"the newest good one is {newest}" if newest else "there is no earlier one")
            + (f": free space under {folder}, then" if full else ": mend that, then")
            + f" run the same command with {'--resume' if newest else '--overwrite'}"
        ) from error
    if rank == 0:
        _delete_older(final, keep)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder in which every byte is as written, or None.

    Damaged ones stay where they are, with a warning in the log. The ranks share the reading.
    """
    return next(whole_checkpoints(folder), None)


def whole_checkpoints(folder: Path, damaged: list[str] | None = None) -> Iterator[Path]:
    """The same for the earlier ones too, newest first.

    Args:
        folder: Run folder.
        damaged: List to which the reasons for skipped checkpoints are added.
    """
    rank, world = _rank_and_world()
    names = [path.name for path in _checkpoints(folder / "checkpoints")]
    for name in exchange(names)[0]:  # rank 0's, should a shared file system lag behind
        path = folder / "checkpoints" / name
        reasons = [reason for reason in exchange(_why_invalid(path, rank, world)) if reason]
        if not reasons:
            yield path
            continue
        if damaged is not None:
            damaged += reasons
        if rank == 0:
            _LOG.warning("skipped a checkpoint that is not whole: %s", reasons[0])


def load_checkpoint(
    path: Path, like: Any = None, only: Collection[str] | None = None
) -> dict[str, Any]:
    """The state in a checkpoint, however many ranks wrote it and however many read it.

    Tensors are full and on the CPU, except where `like` has a DTensor: there, and anywhere below
    that place, a tensor of the same shape becomes a DTensor on the same mesh with the same
    placements, and only the rank's own slice is read. So a parameter stands for all of its
    optimizer state, as in the example above. Ranks need not call this together.

    Args:
        path: From `newest_checkpoint`.
        like: A nesting with the keys of the state, as far as it matters.
        only: Keys of the state that are read, such as ``["model"]``; by default all.

    Raises:
        ValueError: If a file that is read is not as it was written; a `DamagedCheckpoint`.
    """
    with Reader(path) as reader:
        return reader.load(like, only)


def rng_state() -> dict[str, Any]:
    """Every rank's global random streams (torch, CUDA, Python, NumPy) as plain lists."""
    return {"ranks": exchange(_streams().state_dict())}


def restore_rng(state: dict[str, Any]) -> None:
    """Restore this rank's streams; a rank that the saved run did not have keeps its own.

    Raises:
        ValueError: If the state is not one of random streams.
    """
    rank, _ = _rank_and_world()
    ranks = checked(_RngState, state)["ranks"]
    if rank >= len(ranks):
        return
    streams = ranks[rank]
    try:
        if streams["numpy"] is not None:
            importlib.import_module("numpy.random")
        if isinstance(streams["numpy"], list):
            # NumPy takes any position at its word, and would read beyond its words.
            _, words, position, *_ = streams["numpy"]
            if not 0 <= position <= len(words):
                raise ValueError(f"{position} is no position in {len(words)} words")
        RngState.from_state_dict(streams).restore()
    except STRANGE as error:
        raise ValueError(
            f"the random streams of rank {rank} cannot be put back ({error})"
        ) from error


class _Streams(TypedDict):
    torch: list[int]
    accelerators: list[list[Any]]
    python: list[Any]
    numpy: list[Any] | dict[str, Any] | None


class _RngState(TypedDict):
    ranks: list[_Streams]


def _streams() -> RngState:
    return RngState(drawing_gpus())


def clear_partial(folder: Path) -> None:
    """Delete what a killed process left half written or half deleted.

    No other process may write to the folder at the same time.
    """
    for stale in (folder / "checkpoints").glob(".step-*.partial"):
        delete(stale)


def delete(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint, whole or not, newest first.

    One that is being replaced by another of the same step counts, so that a crash in between
    cannot lose both.
    """
    found = [path for path in folder.glob("*step-*") if step_of(path) is not None]
    return sorted(found, key=lambda path: (_step(path), path.name[0] != "."), reverse=True)


def _step(path: Path) -> int:
    step = step_of(path)
    assert step is not None
    return step


def _why_invalid(path: Path, rank: int, world: int) -> str | None:
    """The reason why this rank's share of a checkpoint's files is invalid, or None."""
    try:
        # A link that somebody names is theirs to give; one that lies there may lead anywhere.
        if path.is_symlink():
            return f"{path} is a symbolic link where a folder was expected"
        with Reader(path) as reader:
            reader.check_share(rank, world)
    except DamagedCheckpoint as error:
        return error.reason
    return None


def _rename_over(partial: Path, final: Path) -> None:
    if final.exists():
        replaced = final.with_name(f".{final.name}.replaced")
        if replaced.exists():
            delete(replaced)
        os.replace(final, replaced)
    os.replace(partial, final)
    _flush_folder(final.parent)


def _delete_older(final: Path, keep: int) -> None:
    """Delete what this checkpoint replaced, and earlier ones beyond the newest."""
    others = [path for path in _checkpoints(final.parent) if path != final]
    replaced = [path for path in others if path.name.startswith(".")]
    earlier = [p for p in others if p not in replaced and _step(p) < _step(final)]
    for path in replaced + earlier[max(keep - 1, 0) :]:
        # Renamed first, so that half a checkpoint is never seen.
        doomed = path.with_name(f".{path.name.lstrip('.')}.partial")
        try:
            os.replace(path, doomed)
            delete(doomed)
        except OSError as error:
            _LOG.warning("an old checkpoint could not be deleted: %s", error)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_all_ranks(action: Callable[[], Any]) -> list[Any]:
    """Run an action on every rank, wait for all, and raise on all if it failed on any.

    Returns:
        The results of all ranks, which must be JSON.
    """
    error: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    kinds = [kind.__name__ for kind in _SHARED if isinstance(error, kind)]
    text = getattr(error, "reason", str(error) or repr(error)) if error else None
    outcomes = exchange((result, text, kinds))
    failures = [(rank, text, kinds) for rank, (_, text, kinds) in enumerate(outcomes) if text]
    if not failures:
        return [result for result, *_ in outcomes]
    # Callers handle errors collectively too, so all ranks raise the same kind.
    for kind in _SHARED:
        if all(kind.__name__ in kinds for *_, kinds in failures):
            if error is not None:
                raise error
            raise kind(f"{failures[0][1]} (rank {failures[0][0]})")
    if error is not None and not kinds:
        raise error
    rank, text, _ = min(failures, key=lambda failure: len(failure[2]))  # the least expected
    raise RuntimeError(f"{text} (rank {rank})") from error


_SHARED: tuple[type[Exception], ...] = (DamagedCheckpoint, ValueError, OSError)


def exchange(value: Any) -> list[Any]:
    """Every rank's value, on every rank; as JSON, if there are several."""
    _, world = _rank_and_world()
    if world == 1:
        return [value]
    backends = dist.get_backend_config()
    device = "cpu" if "cpu:" in backends else backends.partition(":")[0]
    text = json.dumps(value).encode()
    size = torch.tensor(len(text), device=device)
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    texts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(texts, padded)
    return [json.loads(text.cpu().numpy().tobytes()) for text in texts]
