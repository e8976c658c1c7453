import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import PROSE, config, decode, rows, save_tokenizer, shards, tokenizer_of, write_jsonl

from fogzo_lab.data.text import StreamedText, TextSplit, load_text, unigram_loss
from fogzo_lab.data.tokens import encode_documents, load_tokenizer

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def packed(split):
    """What the inputs of all blocks say one after another, and the last target."""
    blocks = split.batch(torch.arange(len(split)))
    assert blocks.dtype == torch.int64 and blocks.shape == (len(split), split.context + 1)
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1])
    return torch.cat([blocks[:, :-1].flatten(), blocks[-1, -1:]])


@given(st.integers(0, 60), st.integers(1, 9))
def test_blocks_say_the_text_and_drop_less_than_a_block(length, context):
    split = TextSplit(torch.arange(length, dtype=torch.int32), context)
    assert len(split) == max(length - 1, 0) // context
    if len(split):
        said = packed(split)
        assert torch.equal(said, torch.arange(len(said)))
        assert length - len(said) < context
    else:
        assert split.batch(torch.arange(0)).shape == (0, context + 1)


def test_blocks_in_any_order():
    split = TextSplit(torch.arange(41, dtype=torch.uint8), 4)
    assert split.batch(torch.tensor([3, 0, 3]))[:, 0].tolist() == [12, 0, 12]


# --- tokenizers


def test_without_an_end_of_text_token_documents_are_separated_by_an_empty_line(tmp_path):
    name = save_tokenizer(tmp_path / "bpe")
    tokens, _ = encode_documents(["One.", "", "Two."], load_tokenizer(name))
    assert tokenizer_of(name).decode(tokens.tolist()) == "\n\nOne.\n\nTwo."


def test_long_documents_are_tokenised_in_pieces(tmp_path, monkeypatch):
    from fogzo_lab.data import tokens as module

    monkeypatch.setattr(module, "_PIECE", 100)
    monkeypatch.setattr(module, "_BATCH", 1000)
    document = PROSE + "x" * 250 + "\n" + PROSE
    said, size = encode_documents([document, PROSE], load_tokenizer("bytes"))
    assert bytes(said.tolist()).decode() == "\n\n" + document + "\n\n" + PROSE
    assert size == 1
    name = save_tokenizer(tmp_path / "bpe", eos_token="<|end|>")
    said, size = encode_documents([document], load_tokenizer(name))
    assert tokenizer_of(name).decode(said[1:].tolist()) == document
    assert size == len(document.encode()) / len(said)


@pytest.mark.parametrize("limit", [1, 50, 700])
def test_no_more_is_read_than_a_limit_takes(limit):
    documents = iter([f"{n:04} " * 4 for n in range(1000)])
    tokens, size = encode_documents(documents, load_tokenizer("bytes"), limit)
    assert len(tokens) == limit and size == 1
    assert int(next(documents)[:4]) <= limit / 20 + 1


# --- streams


def stream_text(folder, **options):
    text = load_text(
        config(folder, streaming=True, **{"context": 8, "max_eval_blocks": 2, **options})
    )
    assert isinstance(text.train, StreamedText)
    return text


def stream_of(text, window=7, **options):
    return dataclasses.replace(text.train, window=window).stream(**options)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    return stream_text(shards(tmp_path_factory.mktemp("shards")))


def test_a_stream_says_every_document_once_an_epoch(streamed):
    stream = stream_of(streamed)
    said = ""
    while stream.state_dict()["epoch"] < 4:
        said += bytes(stream.next_blocks(1)[0, :-1].tolist()).decode()
    documents = said.split("\n\n")[1:]
    held_out = streamed.train.held_out
    count = 60 - len(held_out)
    epochs = [documents[n * count : (n + 1) * count] for n in range(3)]
    expected = {f"train {s}.{n} " + "abc" * (n % 7) for s in range(3) for n in range(20)}
    assert held_out < expected and 2 <= len(held_out) < 10
    for epoch in epochs:
        assert set(epoch) == expected - held_out and len(epoch) == count
    assert epochs[0] != epochs[1] != epochs[2]
    # Files come in another order too.
    assert len({tuple(dict.fromkeys(d[6] for d in epoch)) for epoch in epochs}) > 1


def test_a_stream_holds_out_its_first_documents(streamed):
    said = decode(streamed.test), decode(streamed.validation)
    assert said[0] == "train 0.0 \n\ntrain"  # two blocks of 8, and a target
    assert all(len(part) == 17 for part in said)
    assert said[1].startswith("train 0.")
    assert said[1] != said[0]
    assert {text.split(" ")[1] for text in streamed.train.held_out} >= {"0.0", "0.1", "0.2"}
    assert streamed.test.bytes_per_token == 1 and streamed.vocab_size == 256
    assert unigram_loss(streamed) < math.log(256)


def test_a_stream_with_its_own_splits_holds_nothing_out(tmp_path):
    for split in ("train", "validation", "test"):
        shards(tmp_path, split=split)
    text = stream_text(tmp_path)
    assert not text.train.held_out
    assert decode(text.test).startswith("test 0.0")
    assert decode(text.validation).startswith("validation 0.0")


def test_a_stream_with_one_other_split_is_validated_on_its_own_documents(tmp_path):
    shards(shards(tmp_path), split="validation")
    text = stream_text(tmp_path)
    assert decode(text.test).startswith("validation 0.0")
    assert decode(text.validation).startswith("train 0.0")
    assert text.train.held_out


def test_seeds_differ_and_repeat(streamed):
    first, again, other = (stream_of(streamed, seed=seed).next_blocks(30) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[1:, 0], first[:-1, -1])


@settings(max_examples=25, deadline=None)
@given(
    before=st.lists(st.integers(1, 40), max_size=5),
    window=st.sampled_from([1, 7, 20, 1000]),
    seed=st.integers(0, 3),
)
def test_a_resumed_stream_goes_on_bit_for_bit(streamed, before, window, seed):
    stream = stream_of(streamed, window, seed=seed)
    for count in before:
        stream.next_blocks(count)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = stream_of(streamed, window, seed=seed)
    resumed.next_blocks(5)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    # An epoch has about 90 blocks, so that this goes through the ends of some.
    for count in (1, 13, 200):
        assert torch.equal(resumed.next_blocks(count), stream.next_blocks(count))
        assert resumed.state_dict() == stream.state_dict()


def test_ranks_share_the_stream_whatever_their_number(streamed):
    alone = stream_of(streamed)
    whole = alone.next_blocks(12)
    ranks = [stream_of(streamed, rank=rank, world=3) for rank in range(3)]
    parts = [rank.next_blocks(4) for rank in ranks]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
    # One process goes on where three stood, and two after it.
    pair = [stream_of(streamed, rank=rank, world=2) for rank in range(2)]
    for rank in pair:
        rank.load_state_dict(ranks[1].state_dict())
    parts = [rank.next_blocks(50) for rank in pair]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), alone.next_blocks(100))


def test_a_window_ends_early_where_documents_are_long(streamed, monkeypatch):
    from fogzo_lab.data import tokens

    monkeypatch.setattr(tokens, "_WINDOW", 1)
    short = stream_of(streamed, 1000).next_blocks(100)
    monkeypatch.undo()
    assert torch.equal(short, stream_of(streamed, 1).next_blocks(100))


def test_a_stream_with_a_tokenizer(tmp_path):
    name = save_tokenizer(tmp_path / "bpe", eos_token="<|end|>")
    text = stream_text(shards(tmp_path / "data"), tokenizer=name)
    blocks = stream_of(text).next_blocks(50)
    end = load_tokenizer(name).separator.item()
    assert blocks[0, 0] == end and (blocks == end).sum() > 10
    said = tokenizer_of(name).decode(blocks[:, :-1].flatten().tolist())
    documents = [document for document in said.split("<|end|>")[1:-1] if document]
    assert all(document.startswith("train ") for document in documents)


def test_parquet_streams_and_resumes_too(tmp_path):
    table = datasets.Dataset.from_dict({"text": [f"text {n} of many" for n in range(300)]})
    table.to_parquet(tmp_path / "a.parquet", batch_size=70)
    text = stream_text(tmp_path / "a.parquet")
    stream = stream_of(text)
    stream.next_blocks(200)
    resumed = stream_of(text)
    resumed.load_state_dict(stream.state_dict())
    assert torch.equal(resumed.next_blocks(700), stream.next_blocks(700))


def test_a_stream_of_which_everything_is_held_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(["the same text"] * 9))
    text = stream_text(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"'text'.*holds no text beyond.*--data.max-eval-blocks"):
        text.train.stream().next_blocks(1)
