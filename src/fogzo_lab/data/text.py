"""Text for language models: its sources and splits."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from fogzo_lab.data.config import TextConfig
from fogzo_lab.data.record import stamp
from fogzo_lab.data.text_files import load_tables, plain_text
from fogzo_lab.data.tokens import (
    StreamedText,
    TextSplit,
    Tokenizer,
    TokenStream,
    encode_documents,
    load_tokenizer,
)

_LOG = logging.getLogger(__name__)

__all__ = [
    "StreamedText",
    "Text",
    "TextSplit",
    "TokenStream",
    "check_vocabulary",
    "load_text",
    "unigram_loss",
]


@dataclass(frozen=True, eq=False)
class Text:
    """Train, validation (to choose with) and test (to report on), as blocks of tokens."""

    train: TextSplit | StreamedText
    """In memory, or the start of a stream."""
    validation: TextSplit
    test: TextSplit
    vocab_size: int
    """Number of tokens of the tokenizer."""


def load_text(config: TextConfig) -> Text:
    """Load text and split it, the same way every time.

    Without splits of its own, the last tenth of the characters is the test part, and the last
    `validation_fraction` before it is for validation. A source with either a test or a validation
    split is tested on that split and validated on the end of its training split. In a stream, the
    first documents of the training split are held out instead of the last ones, and training skips
    documents equal to them.

    The content of pydoc depends on the version of Python. Unchanged files are not
    read again.

    Raises:
        ValueError: If the text or the tokenizer cannot be found or read, or the text is too short.
    """
    return _load(config, stamp(config))


@lru_cache(maxsize=2)
def _load(config: TextConfig, stamp: object) -> Text:
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
    return Text(
        test=_split("test", test, config, tokenizer),
        train=_split("train", train, config, tokenizer),
        validation=_split("validation", validation, config, tokenizer),
        vocab_size=tokenizer.vocab_size,
    )


def check_vocabulary(vocab_size: int | None, text: Text) -> int:
    """The number of rows of a model's embedding: as given or, by default, the number of tokens.

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
    """Cross entropy, in nats per token, of the test split under the training split's frequencies.

    Every token is counted once more than it occurs. A model that ignores the context can reach
    this loss; a uniform prediction has log(vocab_size). In a stream, as many blocks are counted as
    the test split has.
    """
    if isinstance(text.train, TextSplit):
        seen = text.train.tokens
    else:
        seen = text.train.stream().next_blocks(len(text.test))[:, 1:].flatten()
    counts = torch.bincount(seen, minlength=text.vocab_size).double() + 1
    # The first token is not a target of any block.
    targets = torch.bincount(text.test.tokens[1:], minlength=text.vocab_size).double()
    return -(targets / targets.sum() * (counts / counts.sum()).log()).sum().item()


def _streamed(config: TextConfig, tokenizer: Tokenizer) -> Text:
    if config.dataset == "pydoc" or plain_text(config.dataset) is not None:
        raise ValueError(
            f"{config.dataset!r} is plain text, which is read at once: leave --data.streaming out, "
            "or give a data set of `datasets`, as in --data.dataset allenai/c4"
        )
    tables = load_tables(config)
    # Read lazily, so that the second split begins where the first one ended.
    train = tables.texts("train")
    held_out: list[str] = []

    def documents(split: str | None) -> Iterable[str]:
        if split is None:
            return _noting(train, held_out)
        return tables.texts(split)

    own = [name for name in ("test", "validation") if name in tables.splits]
    tested, validated = (*own, None, None)[:2]
    test = _split("test", documents(tested), config, tokenizer)
    validation = _split("validation", documents(validated), config, tokenizer)
    return Text(
        train=StreamedText(tables, tokenizer, config.context, frozenset(held_out)),
        validation=validation,
        test=test,
        vocab_size=tokenizer.vocab_size,
    )


def _noting(documents: Iterator[str], noted: list[str]) -> Iterator[str]:
    for document in documents:
        noted.append(document)
        yield document


def _split(
    name: str, documents: Iterable[str], config: TextConfig, tokenizer: Tokenizer
) -> TextSplit:
    """Blocks of documents, limited in number unless for training."""
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
    return TextSplit(tokens, config.context, bytes_per_token)


def _cut(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Cut after a fraction of all characters, inside a document if necessary."""
    remaining = int(sum(map(len, documents)) * share)
    for index, document in enumerate(documents):
        if remaining < len(document):
            head, tail = document[:remaining], document[remaining:]
            return [*documents[:index], head], [tail, *documents[index + 1 :]]
        remaining -= len(document)
    return documents, []


def _read(config: TextConfig) -> dict[str, list[str]]:
    """The documents of every split of a source, including train."""
    if config.dataset == "pydoc":
        from pydoc_data.topics import topics

        plain: dict[str, list[str]] | None = {
            "train": ["\n\n".join(topics[name] for name in sorted(topics))]
        }
    else:
        plain = plain_text(config.dataset)
    if plain is not None:
        if (config.subset, config.column) != (None, "text"):
            raise ValueError(
                f"{config.dataset!r} is plain text, without subsets and columns: leave "
                "--data.subset and --data.column out"
            )
        return {"train": [], **plain}
    tables = load_tables(config)
    documents: dict[str, list[str]] = {}
    for name in ("train", "validation", "test"):
        if name in tables.splits:
            documents[name] = texts = list(tables.texts(name))
            if empty := texts.count(""):
                _LOG.warning(
                    "%d of the %d rows of the %s split of %s have no text in the column %r",
                    *(empty, len(texts), name, config.dataset, config.column),
                )
    return documents
