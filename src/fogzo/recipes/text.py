"""Text to train and evaluate language models on: where it comes from and how it is split."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fogzo.recipes.data_config import TextConfig
from fogzo.recipes.tokens import (
    StreamedText,
    TextSplit,
    Tokenizer,
    TokenStream,
    column_texts,
    encode_documents,
    load_tokenizer,
)

__all__ = [
    "StreamedText",
    "Text",
    "TextSplit",
    "TokenStream",
    "check_vocabulary",
    "load_text",
    "unigram_loss",
]

# Files that `datasets` parses; any other file is read as plain text.
_PARSERS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
# test.txt and val-0.txt, but not testament.txt.
_HELD_OUT_NAME = re.compile(r"(test|validation|valid|val)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Text:
    """Train, validation (to choose with) and test (to report on), as blocks of tokens."""

    train: TextSplit | StreamedText
    """In memory, or where to begin a stream."""
    validation: TextSplit
    test: TextSplit
    vocab_size: int
    """Tokens that the tokenizer knows."""
    bytes_per_token: float
    """UTF-8 bytes that a token of the test split stands for, on average: a loss in nats a token,
    over log(2) times this, is in bits per byte, which compares across tokenizers."""


@lru_cache(maxsize=2)
def load_text(config: TextConfig) -> Text:
    """Load text and split it, the same way every time.

    A source without splits of its own has its last tenth of characters as the test part, and the
    last `validation_fraction` before that for validation. One with either a test or a validation
    split is tested on that, and validated on the end of its training split. If it is streamed, the
    first documents of the training split take the place of the last ones, and training passes
    over documents equal to them.

    The content of pydoc depends on the version of Python.

    Raises:
        ValueError: If the text or the tokenizer cannot be found or read, or the text is too short.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.streaming:
        return _streamed(config, tokenizer)
    splits = _read(config)
    train, test = splits["train"], splits.get("test")
    validation = splits.get("validation")
    if test is None:
        test, validation = validation, None
    if test is None:
        train, test = _cut(train, 0.9)
    if validation is None:
        train, validation = _cut(train, 1 - config.validation_fraction)
    tested, bytes_per_token = _split("test", test, config, tokenizer)
    return Text(
        train=_split("train", train, config, tokenizer)[0],
        validation=_split("validation", validation, config, tokenizer)[0],
        test=tested,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=bytes_per_token,
    )


def check_vocabulary(vocab_size: int | None, text: Text) -> int:
    """Rows that a model's embedding needs: as many as given or, without a number, tokens.

    Raises:
        ValueError: If the tokenizer knows more tokens than the model.
    """
    if vocab_size is not None and vocab_size < text.vocab_size:
        raise ValueError(
            f"the tokenizer has {text.vocab_size} tokens, more than the model's vocabulary of "
            f"{vocab_size}: use --model.vocab-size {text.vocab_size}, or leave it out"
        )
    return vocab_size or text.vocab_size


def unigram_loss(text: Text) -> float:
    """Cross entropy, in nats a token, of the test split under the training split's frequencies.

    Every token is counted once more than it occurs. This is what a model that ignores the context
    can reach; one that knows nothing is at log(vocab_size). Of a stream, as many blocks are
    counted as the test split has.
    """
    if isinstance(text.train, TextSplit):
        seen = text.train.tokens
    else:
        seen = text.train.stream().next_blocks(len(text.test))[:, 1:].flatten()
    counts = torch.bincount(seen, minlength=text.vocab_size).double() + 1
    # Its first token is no block's target.
    targets = torch.bincount(text.test.tokens[1:], minlength=text.vocab_size).double()
    return -(targets / targets.sum() * (counts / counts.sum()).log()).sum().item()


def _streamed(config: TextConfig, tokenizer: Tokenizer) -> Text:
    if config.dataset == "pydoc" or isinstance(_local(config.dataset), list):
        raise ValueError(
            f"{config.dataset!r} is plain text, which is read at once: leave --data.streaming out, "
            "or give a data set of `datasets`, as in --data.dataset allenai/c4"
        )
    splits = _load_dataset(config)
    # Drawn from while they are tokenised, so that the second begins where the first ended.
    train = column_texts(splits["train"], config.column)
    held_out: list[str] = []

    def documents(split: str | None) -> Iterable[str]:
        if split is None:
            return _noting(train, held_out)
        return column_texts(splits[split], config.column)

    own = [name for name in ("test", "validation") if name in splits]
    tested, validated = (*own, None, None)[:2]
    test, bytes_per_token = _split("test", documents(tested), config, tokenizer)
    validation, _ = _split("validation", documents(validated), config, tokenizer)
    return Text(
        train=StreamedText(
            splits["train"], config.column, tokenizer, config.context, frozenset(held_out)
        ),
        validation=validation,
        test=test,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=bytes_per_token,
    )


def _noting(documents: Iterator[str], noted: list[str]) -> Iterator[str]:
    for document in documents:
        noted.append(document)
        yield document


def _split(
    name: str, documents: Iterable[str], config: TextConfig, tokenizer: Tokenizer
) -> tuple[TextSplit, float]:
    """Blocks of documents, all of them for training, and how many bytes a token stands for."""
    # A separator stands between documents here, not before the first.
    begin = len(tokenizer.separator)
    limit = None if name == "train" else begin + config.max_eval_blocks * config.context + 1
    tokens, bytes_per_token = encode_documents(documents, tokenizer, limit)
    tokens = tokens[begin:]
    if len(tokens) <= config.context:
        shorter = f"--data.context {len(tokens) - 1}" if len(tokens) > 1 else "another source"
        raise ValueError(
            f"the {name} split has {len(tokens)} tokens, but one block takes "
            f"{config.context + 1}: use more text, or {shorter}"
        )
    return TextSplit(tokens, config.context), bytes_per_token


def _cut(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Cut after a share of all characters, inside a document if need be."""
    remaining = int(sum(map(len, documents)) * share)
    for index, document in enumerate(documents):
        if remaining < len(document):
            head, tail = document[:remaining], document[remaining:]
            return [*documents[:index], head], [tail, *documents[index + 1 :]]
        remaining -= len(document)
    return documents, []


def _read(config: TextConfig) -> dict[str, list[str]]:
    """The documents of every split that a source has, train among them."""
    if config.dataset == "pydoc":
        from pydoc_data.topics import topics

        return {"train": ["\n\n".join(topics[name] for name in sorted(topics))]}
    files = _local(config.dataset)
    if not isinstance(files, list):
        splits = _load_dataset(config)
        return {
            name: list(column_texts(splits[name], config.column))
            for name in ("train", "validation", "test")
            if name in splits
        }
    documents: dict[str, list[str]] = {"train": []}
    root = Path(config.dataset).expanduser()
    for file in files:
        # A file given by its own path is the whole text, whatever it is called.
        held_out = _HELD_OUT_NAME.match(file.relative_to(root).parts[0]) if file != root else None
        name = {"t": "test", "v": "validation"}[held_out[1][0].lower()] if held_out else "train"
        documents.setdefault(name, []).append(_read_file(file))
    if not any(map(any, documents.values())):
        raise ValueError(f"{root} is empty: give a file with text as --data.dataset")
    return documents


def _read_file(file: Path) -> str:
    try:
        return file.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 at byte {error.start}: convert it, as with iconv -t utf-8, or "
            f"give a file of plain text or of {', '.join(_PARSERS)} as --data.dataset"
        ) from error


def _local(dataset: str) -> list[Path] | Path | None:
    """Files of plain text, a file or folder that `datasets` reads, or None for a hub id.

    Raises:
        ValueError: If this looks like a path and there is nothing.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*.txt") if file.is_file()) or path
    if path.is_file():
        return path if path.suffix in _PARSERS else [path]
    if dataset.startswith((".", "/", "~")) or path.suffix in (".txt", *_PARSERS):
        raise ValueError(
            f"there is no file or folder {dataset!r}: give one, a hub id such as --data.dataset "
            "roneneldan/TinyStories, or --data.dataset pydoc"
        )
    return None


def _load_dataset(config: TextConfig) -> dict[str, Any]:
    """Splits of a data set of `datasets`, of which only the column of text is read."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"reading {config.dataset!r} needs the datasets library: pip install 'fogzo[data]'"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = _local(config.dataset)
    try:
        if isinstance(path, Path) and path.is_file():
            splits = datasets.load_dataset(
                _PARSERS[path.suffix], data_files=str(path), streaming=config.streaming
            )
        else:
            splits = datasets.load_dataset(
                str(path or config.dataset), config.subset, streaming=config.streaming
            )
    except Exception as error:  # whatever the hub, the disk or a parser has to say
        raise ValueError(
            f"could not load {config.dataset!r} with datasets: {error}; give a file, a folder or "
            "a hub id as --data.dataset and, where it has several, a configuration as --data.subset"
        ) from error
    if "train" not in splits:
        raise ValueError(
            f"{config.dataset!r} has the splits {', '.join(splits)} but no train: rename one in a "
            "copy of it, or use another --data.dataset"
        )
    return {name: _only_column(splits[name], config) for name in splits}


def _only_column(split: Any, config: TextConfig) -> Any:
    # A stream may not know its columns before it is read.
    columns = split.column_names or list(next(iter(split), {config.column: None}))
    if config.column not in columns:
        raise ValueError(
            f"{config.dataset!r} has the columns {', '.join(columns)} but not {config.column!r}: "
            f"use --data.column {columns[0]}"
        )
    return split.select_columns([config.column])
