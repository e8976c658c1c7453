"""Folders as people have them: with what systems, editors and licences put beside the data."""

from pathlib import Path

import datasets
import pytest
from pictures import everything, pictures, write_set
from texts import PROSE, config, decode, rows, write_jsonl

from fogzo_lab.data import images, text
from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.data.files import find_data_files, meant_files
from fogzo_lab.data.images import load_images
from fogzo_lab.data.text import load_text

JUNK = (
    ".git/HEAD.txt",
    ".git/objects/ab/cd.parquet",
    ".ipynb_checkpoints/train-checkpoint.txt",
    "train/.ipynb_checkpoints/a-checkpoint.png",
    "__pycache__/x.txt",
    "__MACOSX/._train.txt",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".hidden.txt",
    ".hidden.jsonl",
    "train.txt~",
    "~$train.txt",
    "#train.txt#",
    "train.txt.bak",
    "train.parquet.part",
    "LICENSE",
    "LICENSE.txt",
    "licence-data.txt",
    "README.md",
    "readme.txt",
    "README_en.txt",
    "requirements.txt",
    "CITATION.cff",
    "NOTICE.txt",
    "SHA256SUMS.txt",
    "dataset_info.json",
    "state.json",
    "cache-0123.arrow",
)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def add(root, *names, content="SECRET junk, nobody's data.\n" * 200):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, "utf-8")


def said(found):
    return decode(found.train) + decode(found.validation) + decode(found.test)


@pytest.mark.parametrize("junk", JUNK)
def test_no_file_that_nobody_meant_is_listed(tmp_path, junk):
    add(tmp_path, junk, "train.txt", "sub/test.txt")
    assert meant_files(tmp_path) == [tmp_path / "sub/test.txt", tmp_path / "train.txt"]


@pytest.mark.parametrize("kind", ["txt", "parquet", "jsonl", "csv", "arrow"])
def test_text_is_read_without_what_lies_beside_it(tmp_path, kind):
    root = tmp_path / "set"
    root.mkdir()
    texts = [f"Document {n} of the data." for n in range(80)]
    table = datasets.Dataset.from_dict({"text": texts})
    if kind == "txt":
        (root / "some.txt").write_text("\n\n".join(texts))
    elif kind == "arrow":
        table.save_to_disk(root)
    else:
        write = {"parquet": table.to_parquet, "jsonl": table.to_json, "csv": table.to_csv}[kind]
        write(root / f"some.{kind}")
    alone = said(load_text(config(root)))
    assert alone.replace("\n\n", "") == "".join(texts)
    add(root, *(name for name in JUNK if not (root / name).exists()))
    text._load.cache_clear()
    assert said(load_text(config(root))) == alone


def test_prose_beside_tables_is_no_data_and_the_log_says_so(tmp_path, caplog):
    write_jsonl(tmp_path / "rows.jsonl", rows([f"row {n}" for n in range(90)]))
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"))["train"].to_parquet(
        tmp_path / "set" / "data.parquet"
    )
    add(tmp_path / "set", "notes.txt", "sources/urls.txt")
    assert "SECRET" not in said(load_text(config(tmp_path / "set")))
    assert "reading 1 .parquet and leaving 2 .txt" in caplog.text


@pytest.mark.parametrize("names", [("a.txt", "b.csv"), ("a.jsonl", "b.csv"), ("a.txt", "b.json")])
def test_which_kind_is_meant_is_not_guessed(tmp_path, names):
    add(tmp_path, *names)
    with pytest.raises(ValueError, match=r"several kinds \(1 .*, 1 .*give a folder of one kind"):
        load_text(config(tmp_path))


def test_a_file_by_its_own_path_is_always_meant(tmp_path):
    (tmp_path / "LICENSE.txt").write_text(PROSE, "utf-8")
    assert said(load_text(config(tmp_path / "LICENSE.txt"))) == PROSE
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.txt").write_text(PROSE, "utf-8")
    assert said(load_text(config(tmp_path / ".hidden"))) == PROSE


def test_a_readme_that_names_the_data_is_believed(tmp_path):
    write_jsonl(tmp_path / "meant/part.jsonl", rows([f"meant {n}" for n in range(90)]))
    write_jsonl(tmp_path / "other/part.jsonl", rows([f"other {n}" for n in range(90)]))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: meant/*.jsonl\n---\nWords.\n"
    )
    prose = said(load_text(config(tmp_path, subset="en")))
    assert "meant" in prose and "other" not in prose
    (tmp_path / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no subsets.*leave --data.subset en out"):
        load_text(config(tmp_path, subset="en"))


@pytest.mark.parametrize(
    ("name", "kind", "split"),
    [
        ("train-00000-of-00001.parquet", "parquet", "train"),
        ("data/validation-0.parquet", "parquet", "validation"),
        ("dev.jsonl", "json", "validation"),
        ("my_eval_data.csv", "csv", "test"),
        ("test/train_station.png", "imagefolder", "test"),
        ("train/cat/test_1.png", "imagefolder", "train"),
        ("contest.jsonl", "json", "train"),
        ("a-final-test.txt", "text", "train"),
        ("VAL/x.txt", "text", "validation"),
    ],
)
def test_a_path_names_its_split(tmp_path, name, kind, split):
    add(tmp_path, name)
    found = find_data_files(tmp_path, {Path(name).suffix: kind})
    assert found.kind == kind
    assert found.splits == {split: [tmp_path / name]}


def test_files_that_name_no_split_are_for_training(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", rows([f"test {n}" for n in range(90)]))
    write_jsonl(tmp_path / "more.jsonl", rows([f"more {n}" for n in range(90)]))
    found = load_text(config(tmp_path))
    assert "more" in decode(found.train) and "test" not in decode(found.train)
    assert "more" not in decode(found.test)


def test_files_that_name_no_split_are_left_where_others_are_for_training(tmp_path, caplog):
    write_jsonl(tmp_path / "train.jsonl", rows([f"train {n}" for n in range(90)]))
    add(tmp_path, "vocab.json", "stats.json")
    assert "SECRET" not in said(load_text(config(tmp_path)))
    assert "reading 1 .jsonl and leaving 2 .json" in caplog.text


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoints/x.json", ".lock"])
def test_run_folders_among_the_data_are_no_data(tmp_path, file):
    add(tmp_path, "a.jsonl", "runs/first/config.json", "runs/first/result.json")
    add(tmp_path, f"runs/first/{file}")
    assert meant_files(tmp_path) == [tmp_path / "a.jsonl"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    add(tmp_path / "elsewhere", "train.txt")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "set")
    assert meant_files(tmp_path / "set") == [tmp_path / "set/link/train.txt"]


# --- images


def image_folder(root, classes=("cat", "dog"), splits=("train", "test"), count=4):
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(pictures(count, seed=number)):
                image.save(folder / f"{i}.png")
    return root


def images_of(root, **options):
    return load_images(ImagesConfig(dataset=str(root), validation_fraction=0.3, **options))


@pytest.mark.parametrize("layout", ["folders", "parquet"])
def test_images_are_read_without_what_lies_beside_them(tmp_path, layout):
    make = image_folder if layout == "folders" else write_set
    root = make(tmp_path / "set")
    before = images_of(root)
    add(root, *JUNK, "notes.txt", "train/cat/Thumbs.db", "train/cat/0.png~", "a.txt", "b.txt")
    pictures(1)[0].save(root / "preview.png" if layout == "parquet" else root / ".preview.png")
    hidden = root / "train" / "cat" / ".ipynb_checkpoints"
    hidden.mkdir(parents=True)
    pictures(1)[0].save(hidden / "0-checkpoint.png")
    images._load.cache_clear()
    after = images_of(root)
    assert (after.num_classes, len(after.test)) == (before.num_classes, len(before.test))
    for name in ("train", "validation", "test"):
        pairs = zip(
            everything(getattr(before, name)), everything(getattr(after, name)), strict=True
        )
        assert all(a.equal(b) for a, b in pairs)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["train/cat/0.png", "test/cat/1.png"], "all in one folder, 'cat'.*train/dog/2.png"),
        (["train/0.png", "test/1.png"], "all in one folder, 'train'.*train/cat/1.png"),
        (["train/a/0.png", "train/b/0.png", "test/0.png"], "at different depths, such as .*test/0"),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/c/0.png"],
            "the test images of .* have the class 'c', which no train image has",
        ),
        (["a/0.png", "b/0.png"], "has the splits train, but needs train and"),
    ],
)
def test_folders_that_are_no_classes_say_what_would_be(tmp_path, files, says):
    for name in files:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        pictures(1)[0].save(tmp_path / "set" / name)
    with pytest.raises(ValueError, match=says):
        images_of(tmp_path / "set")


def test_metadata_says_what_images_are_instead_of_folders(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        lines = []
        for i, image in enumerate(pictures(8)):
            image.save(tmp_path / split / f"{i}.png")
            lines.append({"file_name": f"{i}.png", "label": i % 2})
        write_jsonl(tmp_path / split / "metadata.jsonl", lines)
    data = images_of(tmp_path)
    assert (data.num_classes, len(data.test)) == (2, 8)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_truncated_picture_is_named(tmp_path, memory, monkeypatch):
    monkeypatch.setattr("fogzo_lab.data.image_files.MEMORY_LIMIT", memory)
    root = image_folder(tmp_path / "set")
    for broken, content in (("test/dog/2.png", None), ("train/cat/1.png", b"no image")):
        file = root / broken
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(ValueError, match=rf"image \d of the .*{broken}\) cannot be decoded"):
            data = images_of(root)
            for split in (data.train, data.validation, data.test):
                everything(split)
        file.write_bytes(whole)


# --- text that needs something first


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.txt.gz",
            b"\x1f\x8b\x08\x00\xff",
            "by gzip, not text: .*gunzip -k .*a.txt.gz",
        ),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00\xff", "gunzip"),
        ("a.txt", b"\x1f\x8b\x08\x00\xff", "compressed by gzip"),
        ("a.zst", b"\x28\xb5\x2f\xfd\xff", "unzstd"),
        ("a.zip", b"PK\x03\x04\xff", "zip archive"),
        ("a.docx", b"PK\x03\x04\xff", "office document, not text: .*plain text"),
        ("a.pdf", b"%PDF-1.7\n\xff", "PDF document, not text: .*pdftotext"),
        ("a.dat", b"PAR1\xff", "name it so that it ends in .parquet"),
        ("a.txt", "\ufeffprose".encode("utf-16-le"), "UTF-16, not text: .*iconv -f utf-16"),
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3: .*iconv"),
    ],
)
def test_a_file_that_is_no_text_says_how_to_make_it_one(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_text(config(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.md", "b.md"], "it has 2 .md: name text so, or give one file by its own path"),
        (["a.md", "b.rst", "c.md"], "it has 2 .md, 1 .rst"),
        (["README.md"], "it has no files"),
    ],
)
def test_a_folder_without_a_kind_that_is_read_says_which_are(tmp_path, names, says):
    add(tmp_path, *names)
    with pytest.raises(ValueError, match=rf"that end in .txt, .*{says}"):
        load_text(config(tmp_path))


def test_a_folder_of_compressed_files_is_to_be_unpacked(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(ValueError, match=r"it has 1 .gz: unpack them"):
        load_text(config(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "broken", "says"),
    [
        ("b.jsonl", '{"text": "cut o', r"b.jsonl, line 4: Unterminated string.* at column 10"),
        ("b.jsonl", '{"text": "a"},', r"b.jsonl, line 4: Extra data"),
        ("b.jsonl", "5", r"b.jsonl, line 4: no JSON object, but 5"),
        ("b.json", '{"text": cut}', r"b.json, line 4: Expecting value"),
    ],
)
def test_a_broken_line_of_json_is_named(tmp_path, name, broken, says, streaming):
    good = '{"text": "some words"}\n'
    (tmp_path / "a.jsonl").write_text(good * 100)
    (tmp_path / name).write_text(good * 3 + broken + "\n" + good * 3)
    with pytest.raises(ValueError, match=rf"{says}.*mend"):
        found = load_text(config(tmp_path, streaming=streaming, context=8, max_eval_blocks=2))
        found.train.stream().next_blocks(100)


def test_a_broken_file_of_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text": "a"},\n {"text": "b"\n')
    with pytest.raises(ValueError, match=r"a.json, line 4: Expecting ',' delimiter"):
        load_text(config(tmp_path))


CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_chat_is_to_be_made_text_by_its_template(tmp_path, column, streaming):
    write_jsonl(tmp_path / "chat.jsonl", [{column: CHAT}] * 50)
    for options in ({}, {"column": column}):
        with pytest.raises(ValueError, match=rf"{column} holds conv.*apply_chat_template\(row"):
            load_text(config(tmp_path, streaming=streaming, **options))


def test_the_column_to_use_is_one_of_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": 3, "lang": "en", "body": "words " * 9}] * 50)
    with pytest.raises(ValueError, match=r"use --data.column body"):
        load_text(config(tmp_path))
    for row in ({"id": 3}, {"answers": [{"start": 3, "answer": "yes"}]}):
        write_jsonl(tmp_path / "a.jsonl", [row] * 50)
        with pytest.raises(ValueError, match=r"no column holds text"):
            load_text(config(tmp_path))


def test_a_row_that_is_no_text_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*rows(["words"] * 9), {"text": 5}, *rows(["words"] * 9)])
    with pytest.raises(ValueError, match=r"row 9 of the column 'text' holds int, where others"):
        load_text(config(tmp_path))


def test_rows_without_text_are_counted(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", [*rows(["words"] * 90), *({"other": "x"} for _ in range(7))])
    load_text(config(tmp_path))
    assert "7 of the 97 rows of the train split" in caplog.text
