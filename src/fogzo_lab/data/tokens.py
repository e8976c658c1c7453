"""Text as blocks of tokens: tokenizers, splits held in memory and endless resumable streams."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from fogzo_lab.data.text_files import Tables, column_texts

# Characters tokenised at once, and characters per piece of a long document: the memory of
# tokenizers, and the time of some, grow faster than the text.
_BATCH = 2**20
_PIECE = 2**16
# Number of characters at which a window of a stream ends early, so that books fit into memory.
_WINDOW = 2**24


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A way to turn text into numbers."""

    encode: Callable[[list[str]], list[Tensor]]
    """Returns the tokens of each text, without special tokens, in the dtype of `separator`."""
    vocab_size: int
    separator: Tensor
    """The separator of documents: the end-of-text token or, without one, an empty line."""
    separator_bytes: int
    """UTF-8 bytes of text in `separator`: none if it is a special token."""


def pretrained_tokenizer(name: str, option: str, otherwise: str) -> Any:
    """What AutoTokenizer finds under a hub id or in a folder.

    Args:
        name: Of the hub or of the folder.
        option: The option that it was given by.
        otherwise: What else the option takes.

    Raises:
        ValueError: If there is no such tokenizer.
    """
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ValueError(  # transformers would look for it on the hub, for a minute
            f"there is no folder {name!r}: give one with tokenizer.json, a hub id such as "
            f"{option} gpt2, or {option} {otherwise}"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"the tokenizer {name!r} needs transformers: pip install 'fogzo[lab]', or "
            f"{option} {otherwise}"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever the hub, the disk or a parser has to say
        raise ValueError(
            f"could not load the tokenizer {name!r} ({str(error).strip().partition(chr(10))[0]}): "
            f"give a hub id or a folder with tokenizer.json, as in {option} gpt2, or "
            f"{option} {otherwise}"
        ) from error


@lru_cache(maxsize=2)
def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer that AutoTokenizer finds under a hub id or in a folder.

    Raises:
        ValueError: If there is no such tokenizer.
    """
    if name == "bytes":
        return Tokenizer(_encode_bytes, 256, _encode_bytes(["\n\n"])[0], 2)
    tokenizer = pretrained_tokenizer(name, "--data.tokenizer", "bytes")
    tokenizer.model_max_length = 2**62  # or it warns of texts longer than some model's context

    def encode(texts: list[str]) -> list[Tensor]:
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [torch.tensor(row, dtype=torch.int32) for row in rows]

    end = tokenizer.eos_token_id
    separator = encode(["\n\n"])[0] if end is None else torch.tensor([end], dtype=torch.int32)
    # A vocabulary may skip numbers, so the highest one counts, not the number of tokens.
    size = max(tokenizer.get_vocab().values()) + 1
    return Tokenizer(encode, size, separator, 2 if end is None else 0)


def _encode_bytes(texts: list[str]) -> list[Tensor]:
    return [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for text in texts]


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, limit: int | None = None
) -> tuple[Tensor, float]:
    """Tokens of documents, a separator before each, and the mean UTF-8 bytes per token.

    Args:
        documents: Texts; empty ones are skipped.
        limit: Maximum number of tokens; little more text than needed is read.
    """
    parts = [tokenizer.separator[:0]]
    count = size = 0
    pieces = _pieces(documents)
    while limit is None or count < limit:
        # A token seldom has less than a character, so this many characters are seldom too many.
        batch = list(_upto(pieces, _BATCH if limit is None else min(_BATCH, limit - count)))
        if not batch:
            break
        encoded = tokenizer.encode([text for text, _ in batch])
        for (text, begins), tokens in zip(batch, encoded, strict=True):
            if begins:
                parts.append(tokenizer.separator)
                size += tokenizer.separator_bytes
            parts.append(tokens)
            size += len(text.encode())
            count += len(tokens) + begins * len(tokenizer.separator)
    tokens = torch.cat(parts)
    return tokens if limit is None else tokens[:limit].clone(), size / max(count, 1)


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents, long ones cut after line breaks, each piece with whether a document begins."""
    for document in documents:
        start = 0
        while start < len(document):
            end = start + _PIECE
            if end < len(document):
                end = document.rfind("\n", start, end) + 1 or end
            yield document[start:end], start == 0
            start = end


def _upto(pieces: Iterator[tuple[str, bool]], characters: int) -> Iterator[tuple[str, bool]]:
    """Pieces up to a number of characters; no further piece is drawn."""
    while characters > 0 and (piece := next(pieces, None)):
        yield piece
        characters -= len(piece[0])


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Tokens cut into consecutive blocks; the last token of one is also the first of the next."""

    tokens: Tensor
    context: int
    bytes_per_token: float = 1.0
    """Mean UTF-8 bytes per token. A loss in nats per token, divided by log(2) times this, is in
    bits per byte, which is comparable across tokenizers."""

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context

    def batch(self, indices: Tensor) -> Tensor:
        """Blocks of shape (n, context + 1): `[:, :-1]` are the inputs, `[:, 1:]` the targets."""
        offsets = torch.arange(self.context + 1, device=indices.device)
        return self.tokens[indices[:, None] * self.context + offsets].long()


@dataclass(frozen=True, eq=False)
class StreamedText:
    """Training text that is read while training, by any number of streams."""

    tables: Tables
    """The data set, whose training split is read."""
    tokenizer: Tokenizer
    context: int
    held_out: frozenset[str] = frozenset()
    """Documents that training skips."""
    window: int = 1024
    """Number of documents that are shuffled, tokenised and packed together."""

    def stream(self, seed: int = 0, rank: int = 0, world: int = 1) -> "TokenStream":
        """An endless stream from the start, of which every rank sees its own blocks."""
        return TokenStream(self, seed, rank, world)


class StreamState(TypedDict):
    """The position of a stream, as JSON. It is the same on every rank."""

    epoch: int
    """Epoch of the current window, as the next three."""
    shard: int
    """Position in the epoch's order of files."""
    row: int
    """First row of the window in that file."""
    carry: list[int]
    """Tokens left over from the previous window."""
    blocks: int
    """Blocks taken from the window, over all ranks."""


class TokenStream:
    """Endless blocks from documents in random order.

    An epoch reads the files of the data set in random order, and takes documents a window at a
    time: these are shuffled, tokenised with a separator before each, and packed without padding.
    Unlike a rolling shuffle buffer, a window is a function of the seed and of where it begins, so
    a few numbers resume a stream bit for bit at the price of one window (and of skipping to a row
    in a file). Every rank reads the same windows and keeps every world-th block of them: what all
    ranks together train on does not depend on how many they are, and one rank's state does for
    all. The price is that each tokenises the whole batch.

    Args:
        source: The text.
        seed: Orders files and documents, differently in every epoch.
        rank: Number of this rank.
        world: Number of ranks.
    """

    def __init__(self, source: StreamedText, seed: int, rank: int, world: int) -> None:
        self._source, self._seed, self._rank, self._world = source, seed, rank, world
        self._seek({"epoch": 0, "shard": 0, "row": 0, "carry": [], "blocks": 0})

    def next_blocks(self, n: int) -> Tensor:
        """This rank's next n blocks, of shape (n, context + 1).

        Raises:
            ValueError: If there are no documents.
        """
        parts: list[Tensor] = []
        missing = n * self._world
        while missing:
            if self._used == len(self._window):
                self._fill()
            count = min(missing, len(self._window) - self._used)
            parts.append(self._window.batch(torch.arange(self._used, self._used + count)))
            self._used += count
            missing -= count
        return torch.cat(parts)[self._rank :: self._world]

    def state_dict(self) -> StreamState:
        """The position of the stream."""
        epoch, shard, row = self._begin
        return {
            "epoch": epoch,
            "shard": shard,
            "row": row,
            "carry": self._carry.tolist(),
            "blocks": self._used,
        }

    def load_state_dict(self, state: StreamState) -> None:
        """Continue from a position in the same source with the same seed, on any number of ranks.

        Raises:
            ValueError: If the position is not one of this source.
        """
        self._seek(state)
        self._fill()
        numbers = state["epoch"], state["shard"], state["row"], state["blocks"]
        if min(numbers) < 0 or state["blocks"] > len(self._window):
            raise ValueError(f"no stream stands at epoch, shard, row and block {numbers}")
        self._used = state["blocks"]

    def _seek(self, state: StreamState) -> None:
        """Let the next window begin at the window of a state."""
        self._next = self._begin = (state["epoch"], state["shard"], state["row"])
        self._carry = carry = torch.tensor(
            state["carry"], dtype=self._source.tokenizer.separator.dtype
        )
        self._window = TextSplit(carry, self._source.context)
        self._used = 0
        self._reader = self._read(*self._next)

    def _fill(self) -> None:
        """Read, shuffle, tokenise and pack the next window, which does not go beyond the epoch."""
        last = self._window
        self._carry = last.tokens[len(last) * last.context :]
        self._begin = (epoch, shard, row) = self._next
        documents: list[str] = []
        characters = 0
        for text, place in self._reader:
            self._next = place
            documents.append(text)
            characters += len(text)
            if len(documents) == self._source.window or characters >= _WINDOW:
                break
        else:
            if not documents and (shard, row) == (0, 0):
                column = self._source.tables.column
                raise ValueError(
                    f"the column {column!r} of the training split holds no text "
                    "beyond what is held out: use another --data.column, or fewer "
                    "--data.max-eval-blocks"
                )
            self._next = (epoch + 1, 0, 0)
            self._reader = self._read(*self._next)
        random.Random(f"{self._seed} {epoch} {shard} {row}").shuffle(documents)
        tokens, _ = encode_documents(documents, self._source.tokenizer)
        self._window = TextSplit(torch.cat([self._carry, tokens]), last.context)
        self._used = 0

    def _read(self, epoch: int, shard: int, row: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """The documents of an epoch from a row on, each with the place after it."""
        tables = self._source.tables
        dataset = tables.splits["train"]
        order = list(range(dataset.num_shards))
        random.Random(f"{self._seed} {epoch}").shuffle(order)
        for place in range(shard, len(order)):
            rows = dataset.shard(num_shards=len(order), index=order[place]).skip(row)
            texts = column_texts(rows, tables.column, tables.files)
            for number, text in enumerate(texts, start=row + 1):
                if text and text not in self._source.held_out:
                    yield text, (epoch, place, number)
            row = 0
