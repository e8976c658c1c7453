import math
from pathlib import Path

import pytest
import torch
from texts import PROSE, config, decode, rows, save_tokenizer, shards, tokenizer_of, write_jsonl

from fogzo_lab.data import text as module
from fogzo_lab.data.config import TextConfig
from fogzo_lab.data.text import Text, TextSplit, check_vocabulary, load_text, unigram_loss
from fogzo_lab.data.tokens import load_tokenizer
from fogzo_lab.training.tasks import TextTask

datasets = pytest.importorskip("datasets")

SHAKESPEARE = Path(__file__).parents[2] / "data/shakespeare/input.txt"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_pydoc_by_default():
    text = load_text(TextConfig())
    assert isinstance(text.train, TextSplit) and text.train.tokens.dtype == torch.uint8
    assert text.vocab_size == 256 and text.test.bytes_per_token == 1
    assert len(text.validation) <= 512 and len(text.test) <= 512
    assert 300_000 < len(text.train.tokens) < 600_000
    assert 2.5 < unigram_loss(text) < math.log(256)
    assert load_text(TextConfig()) is text
    sizes = [len(s.tokens) for s in (text.train, text.validation, text.test)]
    module._load.cache_clear()
    again = load_text(TextConfig())
    assert [len(s.tokens) for s in (again.train, again.validation, again.test)] == sizes


def test_a_file_is_cut_into_three_without_overlap(tmp_path):
    file = tmp_path / "test.txt"  # its name says nothing where it is the only file
    file.write_text("\ufeff" + PROSE, "utf-8", newline="\r\n")
    text = load_text(config(file, validation_fraction=0.2))
    said = decode(text.train) + decode(text.validation) + decode(text.test)
    prose = PROSE.replace("\n", "\r\n")
    assert said == prose
    assert decode(text.test) == prose[int(len(prose) * 0.9) :]
    assert len(decode(text.train)) == int(int(len(prose) * 0.9) * 0.8)


def test_at_most_so_many_blocks_are_evaluated(tmp_path):
    (tmp_path / "a.md").write_text(PROSE, "utf-8")
    whole, capped = (load_text(config(tmp_path / "a.md", max_eval_blocks=n)) for n in (512, 3))
    for name in ("validation", "test"):
        assert len(getattr(capped, name)) == 3 < len(getattr(whole, name))
        first = getattr(whole, name).batch(torch.arange(3))
        assert torch.equal(getattr(capped, name).batch(torch.arange(3)), first)
    assert torch.equal(capped.train.tokens, whole.train.tokens)


@pytest.mark.parametrize(("context", "at_once"), [(16, 256), (64, 256), (512, 32), (2**15, 1)])
def test_the_longer_the_blocks_the_fewer_are_evaluated_at_once(context, at_once):
    assert TextTask(TextConfig(context=context), None).evaluated_at_once == at_once


def test_a_folder_is_one_text_in_the_order_of_its_paths(tmp_path):
    for name, content in {"b.txt": PROSE, "a/z.txt": "First.", "a/empty.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, "utf-8")
    (tmp_path / "note.md").write_text("not read")
    text = load_text(config(tmp_path))
    said = decode(text.train) + decode(text.validation) + decode(text.test)
    assert said == "First.\n\n" + PROSE


@pytest.mark.parametrize(
    ("names", "validated", "tested"),
    [
        (["train.txt", "val-0.txt", "test.txt"], "val-0.txt", "test.txt"),
        (["train/a.txt", "Validation/a.txt", "test/a.txt"], "Validation/a.txt", "test/a.txt"),
        (["train.txt", "valid.txt"], None, "valid.txt"),
        (["train.txt", "test_1.txt"], None, "test_1.txt"),
        (["train.txt", "testament.txt", "value.txt"], None, None),
    ],
)
def test_files_are_splits_by_their_names(tmp_path, names, validated, tested):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name + "\n" + PROSE, "utf-8")
    text = load_text(config(tmp_path, max_eval_blocks=9999))
    if tested:
        assert decode(text.test) == tested + "\n" + PROSE
    if validated:
        assert decode(text.validation) == validated + "\n" + PROSE
        assert decode(text.train) == names[0] + "\n" + PROSE
    else:
        rest = [name + "\n" + PROSE for name in sorted(names) if name != tested]
        said = decode(text.train) + decode(text.validation)
        assert said == "\n\n".join(rest)[: len(said)] and (not tested or said == rest[0])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_file_of_a_data_set(tmp_path, suffix):
    texts = [f"Document {n}, « quoted »\nwith two lines." for n in range(60)]
    table = datasets.Dataset.from_dict({"body": [*texts[:5], None, *texts[5:]]})
    file = tmp_path / f"some.{suffix}"
    {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[suffix](file)
    text = load_text(config(file, column="body"))
    said = [decode(split) for split in (text.train, text.validation, text.test)]
    assert "".join(said) in ("\n\n".join(texts), "\n\n".join(texts).replace("\n\n", ""))


def test_a_data_set_with_its_own_splits(tmp_path):
    for split in ("train", "validation", "test"):
        shards(tmp_path, split=split)
    text = load_text(config(tmp_path))
    for split in ("train", "validation", "test"):
        said = decode(getattr(text, split))
        assert said.startswith(f"{split} 0.0 \n\n{split} 0.1 abc\n\n")
        assert said.endswith(f"{split} 2.19 " + "abc" * 5)


def test_shakespeare():
    if not SHAKESPEARE.exists():
        pytest.skip("the data is not here")
    text = load_text(TextConfig(dataset=str(SHAKESPEARE), max_eval_blocks=10**6))
    assert [len(s.tokens) for s in (text.train, text.validation, text.test)] == [
        903468,
        100386,
        111540,
    ]
    assert 3.3 < unigram_loss(text) < 3.4


def test_a_tokenizer_of_transformers(tmp_path):
    name = save_tokenizer(tmp_path / "bpe", eos_token="<|end|>")
    documents = [f"{n} {PROSE[: 40 * n]}" for n in range(1, 30)]
    write_jsonl(tmp_path / "a.jsonl", rows(documents))
    text = load_text(config(tmp_path / "a.jsonl", tokenizer=name))
    tokenizer = load_tokenizer(name)
    assert text.vocab_size == tokenizer.vocab_size == 300
    assert text.train.tokens.dtype == torch.int32
    end = tokenizer.separator.item()
    parts = (text.train, text.validation, text.test)
    assert [part.tokens[0] == end for part in parts] == [False] * 3
    assert sum((part.tokens == end).sum() for part in parts) == len(documents) - 1
    assert unigram_loss(text) < math.log(300)

    # As many bytes as each split really holds: separators stand for none.
    for part in parts:
        said = tokenizer_of(name).decode(part.tokens.tolist(), skip_special_tokens=True)
        expected = len(said.encode()) / len(part.tokens)
        assert 1 < part.bytes_per_token < 10
        assert part.bytes_per_token == pytest.approx(expected, rel=0.01)


def test_bits_per_byte_are_those_of_the_split_itself(tmp_path):
    name = save_tokenizer(tmp_path / "bpe", eos_token="<|end|>")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text(PROSE, "utf-8")
    (folder / "test.txt").write_text("QXZ" * 400, "utf-8")  # which the tokenizer has not seen
    task = TextTask(config(folder, tokenizer=name), None)
    bits = {split: task.describe(split, math.log(2), 0.5)["bits_per_byte"] for split in task.splits}
    assert bits["test"] == pytest.approx(1, rel=0.01)  # a token each
    assert bits["train"] == pytest.approx(bits["validation"], rel=0.1)
    assert bits["train"] < 0.6


def test_the_vocabulary_is_the_tokenizers_or_larger():
    split = TextSplit(torch.arange(9), 4)
    text = Text(split, split, split, vocab_size=256)
    assert check_vocabulary(None, text) == 256
    assert check_vocabulary(256, text) == 256
    assert check_vocabulary(32000, text) == 32000
    with pytest.raises(ValueError, match=r"256 tokens.*of 255: use --model.vocab-size 256"):
        check_vocabulary(255, text)


def test_unigram_loss_by_hand():
    split = TextSplit(torch.tensor([0, 0, 1]), 1)
    test = TextSplit(torch.tensor([2, 0, 1]), 1)
    text = Text(split, test, test, vocab_size=3)
    assert unigram_loss(text) == pytest.approx(-(math.log(3 / 6) + math.log(2 / 6)) / 2)


# --- bad input


def test_plain_text_is_not_streamed(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE, "utf-8")
    for dataset in ("pydoc", tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"plain text.*leave --data.streaming out"):
            load_text(config(dataset, streaming=True))


@pytest.mark.parametrize("options", [{"subset": "en"}, {"column": "body"}])
def test_plain_text_has_no_subsets_and_columns(tmp_path, options):
    (tmp_path / "a.txt").write_text(PROSE, "utf-8")
    for dataset in ("pydoc", tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"plain text, without .*leave --data.subset and"):
            load_text(config(dataset, **options))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "no.txt", "no.csv"])
def test_nothing_there(name):
    with pytest.raises(ValueError, match=r"there is no file or folder.*--data.dataset pydoc"):
        load_text(config(name))


def test_no_such_data_set(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"could not load .*folder': .*it has no files"):
        load_text(config(tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"could not load 'no/such' with datasets"):
        load_text(config("no/such"))


def test_no_such_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder.*--data.tokenizer bytes"):
        load_text(TextConfig(tokenizer=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("module", ["datasets", "transformers"])
def test_a_library_is_missing(tmp_path, monkeypatch, module):
    write_jsonl(tmp_path / "a.jsonl", rows(["text"]))
    monkeypatch.setitem(__import__("sys").modules, module, None)
    tokenizer = "other" if module == "transformers" else "bytes"
    with pytest.raises(ValueError, match=r"pip install"):
        load_text(config(tmp_path / "a.jsonl", tokenizer=tokenizer))


def test_an_empty_file(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for dataset in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(ValueError, match=r"is empty: give a file with text"):
            load_text(config(dataset))


def test_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 at byte 3: .*iconv"):
        load_text(config(tmp_path))


def test_too_short(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 200)
    with pytest.raises(ValueError, match=r"test split has 20 tokens.*takes 129.*--data.context 19"):
        load_text(config(tmp_path, context=128))
    assert len(load_text(config(tmp_path, context=17)).test) == 1
    (tmp_path / "a.txt").write_text("x" * 5)
    with pytest.raises(ValueError, match=r"test split has 1 tokens.*use more text, or another"):
        load_text(config(tmp_path, context=16, max_eval_blocks=1))


def test_no_training_files(tmp_path):
    (tmp_path / "test.txt").write_text(PROSE, "utf-8")
    with pytest.raises(ValueError, match=r"the (train|validation) split has 0 tokens"):
        load_text(config(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_column(tmp_path, streaming):
    write_jsonl(tmp_path / "a.jsonl", [{"body": PROSE, "number": n} for n in range(9)])
    file = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=r"columns body, number but not 'text': .*column body"):
        load_text(config(file, streaming=streaming))
    with pytest.raises(ValueError, match=r"'number' holds int, not text"):
        load_text(config(file, streaming=streaming, column="number"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_without_a_training_split(tmp_path, streaming):
    shards(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"has the splits test but no train"):
        load_text(config(tmp_path, streaming=streaming))
