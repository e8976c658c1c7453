"""A run goes on with the data that it began with, or not at all."""

import json
import os
from dataclasses import replace

import datasets
import pytest
from pictures import pictures, write, write_set
from texts import PROSE

from fogzo_lab.cli.main import main
from fogzo_lab.data import record as data_record
from fogzo_lab.data.config import ImagesConfig, TextConfig
from fogzo_lab.data.images import load_images
from fogzo_lab.data.record import check_unchanged, digest_data, stamp
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.evaluate import EvalConfig, evaluate_run
from fogzo_lab.training.loop import train
from fogzo_lab.training.model_config import LlamaConfig


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "set" / name).write_text(PROSE, "utf-8")
    return replace(
        RECIPES["pydoc-llama"](),
        model=LlamaConfig(width=16, depth=1, heads=2),
        data=TextConfig(dataset=str(tmp_path / "set"), context=16, max_eval_blocks=4),
        max_steps=2,
        batch_size=4,
        output_dir=tmp_path / "run",
    )


def longer(config):
    """What a user does who edits max_steps in config.json to train on: here, to resume at all."""
    path = config.output_dir / "config.json"
    path.write_text(path.read_text().replace('"max_steps": 2', '"max_steps": 3'))
    return replace(config, max_steps=3, resume=True)


def test_resume_refuses_other_data_and_names_the_file(llama, tmp_path):
    train(llama)
    more = longer(llama)
    before = {p: p.read_bytes() for p in llama.output_dir.rglob("*") if p.is_file()}
    file = tmp_path / "set" / "b.txt"

    def refused(says):
        with pytest.raises(ValueError, match=rf"no longer what it began with: .*{says}"):
            train(more)
        assert {p: p.read_bytes() for p in llama.output_dir.rglob("*") if p.is_file()} == before

    file.write_text(PROSE.replace("text", "txet"), "utf-8")  # as long as before
    refused("b.txt is changed")
    file.unlink()
    refused("b.txt is gone")
    file.write_text(PROSE, "utf-8")
    (tmp_path / "set" / "c.txt").write_text(PROSE, "utf-8")
    refused("c.txt is new")
    (tmp_path / "set" / "c.txt").unlink()
    (tmp_path / "set" / "README.md").write_text("Nobody trains on this.")
    os.utime(file)
    assert train(more)["steps"] == 3


def test_resume_refuses_other_images(tmp_path, capsys):
    folder = write_set(tmp_path / "set")
    command = ["train", "digits-mlp", "--output-dir", str(tmp_path / "run"), "--max-steps", "3"]
    command += ["--data.dataset", str(folder), "--batch-size", "8"]
    main(command)
    write(folder, "test", pictures(10, seed=9), [i % 3 for i in range(10)])
    with pytest.raises(SystemExit) as end:
        main([*command, "--resume"])
    assert end.value.code == 2
    assert "test-00000-of-00001.parquet is changed" in capsys.readouterr().err


def test_an_evaluation_on_other_data_says_so(llama, tmp_path, caplog):
    train(llama)
    evaluate_run(EvalConfig(run=llama.output_dir))
    assert "not those" not in caplog.text
    (tmp_path / "set" / "b.txt").write_text(PROSE + PROSE, "utf-8")
    evaluate_run(EvalConfig(run=llama.output_dir))
    assert "not those that" in caplog.text and "b.txt is changed" in caplog.text


def test_a_run_of_before_there_were_records_goes_on(llama):
    train(llama)
    (llama.output_dir / "data.json").unlink()
    assert train(longer(llama))["steps"] == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3"])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data.json is damaged: restore it, or delete it"):
        check_unchanged(tmp_path, {})


def test_what_a_run_reads_is_recorded_and_nothing_else(tmp_path):
    assert digest_data(ImagesConfig()) == {}
    assert digest_data(ImagesConfig(dataset="mnist")) == {}
    assert digest_data(TextConfig(dataset="allenai/c4", tokenizer="gpt2")) == {}
    assert set(digest_data(TextConfig())) == {"pydoc_data/topics.py"}
    for name in ("set/a.txt", "set/.git/x.txt", "set/LICENSE.txt", "bpe/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    data = TextConfig(dataset=str(tmp_path / "set"), tokenizer=str(tmp_path / "bpe"))
    expected = {str(tmp_path / name) for name in ("set/a.txt", "bpe/tokenizer.json")}
    assert set(digest_data(data)) == expected == {name for name, *_ in stamp(data)}


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_large_files_are_sampled_from_their_beginning_to_their_end(tmp_path, monkeypatch, place):
    monkeypatch.setattr(data_record, "_READ", 1600)
    content = bytearray(os.urandom(10_000))
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    data = TextConfig(dataset=str(file))
    before = digest_data(data)
    samples = [number * (10_000 - 100) // 15 for number in range(16)]
    content[samples[round(15 * place)] + 99] ^= 1
    file.write_bytes(content)
    assert digest_data(data) != before
    file.write_bytes(content + b"\n")
    assert digest_data(data) != before


def test_of_very_many_files_folders_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(data_record, "_MOST_NAMES", 3)
    for name in ("a/1.txt", "a/2.txt", "b/1.txt", "b/2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    data = TextConfig(dataset=str(tmp_path))
    before = digest_data(data)
    assert set(before) == {str(tmp_path / "a"), str(tmp_path / "b")}
    (tmp_path / "b/2.txt").write_text("other")
    (tmp_path / "data.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"/b is changed\."):
        check_unchanged(tmp_path, digest_data(data))


def test_changed_files_are_read_again_in_the_same_process(tmp_path):
    folder = write_set(tmp_path / "set")
    config = ImagesConfig(dataset=str(folder))
    first = load_images(config)
    assert load_images(config) is first
    write(folder, "test", pictures(12, seed=3), [i % 3 for i in range(12)])
    assert len(load_images(config).test) == 12
