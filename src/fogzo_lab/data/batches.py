"""The order of the data: the same for every estimator and number of ranks, and resumable."""

import signal
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fogzo_lab.data.tokens import StreamState, TokenStream
from fogzo_lab.system.signals import ENDING

BatchT = TypeVar("BatchT", covariant=True)


class Split(Protocol[BatchT]):
    """Examples in memory or on disk, addressed by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> BatchT:
        """The examples at these indices, together."""
        ...


class ShuffledBatches(Iterator[list[BatchT]]):
    """Endless windows of micro-batches, one per step; reshuffled every epoch, short ends dropped.

    Every rank walks through the same order and takes its own slice of each batch, so any number
    of ranks and micro-batches sees the same batches.

    Args:
        split: The training examples.
        batch_size: Examples per step, over all ranks and micro-batches.
        seed: Seed of the order.
        rank: Number of this process, which selects its slice of a batch.
        ranks: Number of slices.
        accumulation: Micro-batches in a window.
        workers: Processes that load ahead; 0 loads in this process.

    Raises:
        ValueError: If a batch cannot be cut equally, or there are fewer examples than a batch.
    """

    def __init__(
        self,
        split: Split[BatchT],
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        workers: int = 0,
    ) -> None:
        check_divisible(batch_size, ranks, accumulation)
        if batch_size > len(split):
            fitting = len(split) - len(split) % (ranks * accumulation)
            raise ValueError(
                f"a batch of {batch_size} is more than the {len(split)} training examples: "
                + (f"--batch-size {fitting}" if fitting else "--accumulation 1")
            )
        self._split = split
        self._batch_size = batch_size
        self._seed = seed
        self._rank, self._ranks = rank, ranks
        self._accumulation = accumulation
        self._workers = workers
        self._step = 0
        self._loaded: Iterator[BatchT] | None = None

    def __next__(self) -> list[BatchT]:
        if self._loaded is None:
            self._loaded = self._load()
        self._step += 1
        return [next(self._loaded) for _ in range(self._accumulation)]

    def state_dict(self) -> dict[str, int]:
        """The position in the data: the number of windows taken."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the windows that had been taken when `state_dict` was called."""
        self._step, self._loaded = state["step"], None

    def close(self) -> None:
        """End the processes that load ahead; more batches would start others.

        They ignore what asks processes to end, so that a program with some left never exits.
        """
        self._loaded = None

    def _load(self) -> Iterator[BatchT]:
        mine = _rank_indices(
            len(self._split),
            self._batch_size,
            self._seed,
            self._step,
            self._rank,
            self._ranks,
            self._accumulation,
        )
        return load(self._split, mine, self._workers)


def _rank_indices(
    count: int, batch_size: int, seed: int, step: int, rank: int, ranks: int, accumulation: int
) -> Iterator[Tensor]:
    """The indices of every micro-batch of a rank, from a step on."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = count // batch_size
    skipped_epochs, skipped = divmod(step, per_epoch)
    for _ in range(skipped_epochs):
        torch.randperm(count, generator=generator)
    while True:
        order = torch.randperm(count, generator=generator)
        batches = order[: per_epoch * batch_size].split(batch_size)
        for batch in batches[skipped:]:
            yield from batch.chunk(ranks)[rank].chunk(accumulation)
        skipped = 0


def load(split: Split[BatchT], indices: Iterable[Tensor], workers: int = 0) -> Iterator[BatchT]:
    """The examples at each tensor of indices, in order; loaded ahead by workers, if any."""
    if not workers:
        return map(split.batch, indices)
    loader: DataLoader[Any] = DataLoader(
        _ByBatch(split),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        # Otherwise it would draw from the global stream.
        generator=torch.Generator(),
        prefetch_factor=4,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    return iter(loader)


def _leave_signals_to_the_parent(_: int) -> None:
    """Ignore signals, which reach whole process groups, while the parent ends its step."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


class StreamedBatches(Iterator[list[Tensor]]):
    """Endless windows of micro-batches from a stream of text, one per step.

    Args:
        stream: This rank's blocks.
        batch_size: Blocks per step, over all ranks and micro-batches.
        ranks: Number of ranks that share a batch.
        accumulation: Micro-batches in a window.

    Raises:
        ValueError: If a batch cannot be cut equally.
    """

    def __init__(
        self, stream: TokenStream, batch_size: int, ranks: int = 1, accumulation: int = 1
    ) -> None:
        check_divisible(batch_size, ranks, accumulation)
        self._stream = stream
        self._share = batch_size // ranks
        self._accumulation = accumulation

    def __next__(self) -> list[Tensor]:
        return list(self._stream.next_blocks(self._share).chunk(self._accumulation))

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""
        return dict(self._stream.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the blocks that had been taken when `state_dict` was called."""
        self._stream.load_state_dict(cast(StreamState, state))

    def close(self) -> None:
        """Nothing is loaded ahead."""


class _ByBatch(Dataset[Any]):
    """A data set for a DataLoader without batching: one item per tensor of indices."""

    def __init__(self, split: Split[Any]) -> None:
        self._split = split

    def __getitem__(self, indices: Tensor) -> Any:
        return self._split.batch(indices)


def check_divisible(batch_size: int, ranks: int, accumulation: int) -> None:
    """Raise a `ValueError` unless a batch can be cut into equal micro-batches."""
    pieces = ranks * accumulation
    if batch_size % pieces:
        fitting = max(pieces, batch_size - batch_size % pieces)
        raise ValueError(
            f"a batch of {batch_size} cannot be shared equally by {ranks} rank(s) of "
            f"{accumulation} micro-batch(es): --batch-size {fitting}"
        )
