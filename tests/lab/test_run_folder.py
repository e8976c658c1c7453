"""Run folders that were damaged or emptied: nothing is lost in silence, or taken as it is."""

import hashlib
import json
import logging
import os
import random
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoint_tools import files
from damage import CHANGES, damaged, places

from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from fogzo_lab.training.config import to_json
from fogzo_lab.training.loop import train, training_step
from fogzo_lab.training.model_config import MlpConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.run_folder import RunFolder, read_config, read_metrics, read_result
from fogzo_lab.training.state import Training

CPU = Ranks(torch.device("cpu"))

# So few weights that in some steps none flips.
pytestmark = pytest.mark.filterwarnings("ignore:(no weight rounds|the probes):RuntimeWarning")


def small(folder, **changes):
    recipe = replace(RECIPES["digits-mlp"](), model=MlpConfig(hidden=(4,)), batch_size=16)
    recipe = replace(recipe, max_steps=20, checkpoint_every=5, log_every=1)
    return replace(recipe, output_dir=folder, **changes)


@pytest.fixture
def config(tmp_path):
    return small(tmp_path / "run")


def snapshot(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def without_clock(values):
    return {name: value for name, value in values.items() if name != "seconds"}


def log_of(config):
    return config.output_dir / "metrics.jsonl"


def checkpoint(config, step):
    return config.output_dir / "checkpoints" / f"step-{step:06d}"


# What --resume may not replace


def delete_checkpoints(config):
    shutil.rmtree(config.output_dir / "checkpoints")


def damage_checkpoints(config):
    for path in (config.output_dir / "checkpoints").iterdir():
        os.truncate(path / "state.json", 10)


def set_checkpoints_aside(config):
    for path in (config.output_dir / "checkpoints").iterdir():
        path.rename(path.with_suffix(".diverged"))


def lose_result(config):
    delete_checkpoints(config)
    (config.output_dir / "result.json").unlink()


def lose_metrics(config):
    delete_checkpoints(config)
    log_of(config).unlink()


@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (delete_checkpoints, "it holds result.json, metrics.jsonl"),
        (lose_result, "it holds metrics.jsonl"),
        (lose_metrics, "it holds result.json"),
        (damage_checkpoints, r"step-000020.state.json has 10 bytes.*step-000015.state.json has 10"),
        (set_checkpoints_aside, "it holds step-000015.diverged, step-000020.diverged"),
    ],
)
def test_resuming_without_a_good_checkpoint_is_refused_and_leaves_every_byte(config, lose, named):
    train(config)
    lose(config)
    before = snapshot(config.output_dir)
    with pytest.raises(ValueError, match=f"no checkpoint in .*{named}.*--overwrite"):
        train(replace(config, resume=True))
    assert snapshot(config.output_dir) == before
    assert train(replace(config, resume=True, overwrite=True))["steps"] == 20


def test_no_report_of_a_replaced_run_is_left(config):
    train(config)
    report = config.output_dir / "report.html"
    report.write_text("of this run")
    train(replace(config, learning_rate=0.01, overwrite=True))
    assert not report.exists()


@pytest.mark.parametrize("options", [{"learning_rate": 0.01}, {"seed": 3}])
def test_resuming_a_finished_run_without_checkpoints_under_another_config_is_refused(
    config, options
):
    train(replace(config, checkpoint_every=-1))
    before = snapshot(config.output_dir)
    with pytest.raises(ValueError, match="another config"):
        train(replace(config, resume=True, **options))
    assert snapshot(config.output_dir) == before


def test_a_run_that_was_moved_is_called_by_where_it_is(config, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.json").write_text(to_json(config))
    with (
        pytest.raises(ValueError, match=rf"the run in {moved} has another config: seed"),
        RunFolder(replace(config, output_dir=moved, resume=True, seed=3)),
    ):
        pass


def test_a_run_goes_on_with_other_processes_that_load_its_data(config):
    train(config)
    more = replace(config, resume=True, data=replace(config.data, workers=3))
    with RunFolder(more):  # which refuses a run of another config
        pass


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(config):
    whole = train(config)
    delete_checkpoints(config)
    (config.output_dir / "result.json").unlink()
    log_of(config).write_text("")
    (config.output_dir / "checkpoints" / ".step-000000.partial").mkdir(parents=True)
    (config.output_dir / "metrics.jsonl.partial").write_text("stale")
    assert without_clock(train(replace(config, resume=True))) == without_clock(whole)
    assert not [name for name in files(config.output_dir) if "partial" in name]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_the_folder_of_a_comparison_is_left_alone(config, options):
    config = replace(config, output_dir=config.output_dir.with_name("my runs"))
    config.output_dir.mkdir()
    (config.output_dir / "config.json").write_text('{"base": {}, "rows": []}')
    before = snapshot(config.output_dir)
    with pytest.raises(ValueError, match=r"is the folder of a comparison.*--output-dir '.*-run'$"):
        train(replace(config, **options))
    after = snapshot(config.output_dir)
    assert {name: content for name, content in after.items() if name != ".lock"} == before
    with pytest.raises(ValueError, match=r"not of one run: give one of those in .*runs, or"):
        read_config(config.output_dir)


def test_overwriting_deletes_checkpoints_behind_a_link_too(config, tmp_path):
    train(config)
    scratch = tmp_path / "scratch"
    (config.output_dir / "checkpoints").rename(scratch)
    (config.output_dir / "checkpoints").symlink_to(scratch)
    log_of(config).write_text("not even JSON\n")
    train(replace(config, max_steps=7, overwrite=True))
    assert sorted(os.listdir(scratch)) == ["step-000005", "step-000007"]


def test_what_a_killed_deletion_left_is_cleared_when_a_finished_run_is_resumed(config):
    train(config)
    stale = checkpoint(config, 10).with_name(".step-000010.partial")
    shutil.copytree(checkpoint(config, 20), stale)
    train(replace(config, resume=True))
    assert not stale.exists()


def test_a_file_that_cannot_be_written_leaves_no_half(config, monkeypatch):
    train(config)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        train(replace(config, resume=True))
    assert not [name for name in files(config.output_dir) if "partial" in name]


def test_of_a_full_disk_the_file_is_named(config):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunFolder(config) as folder, folder.open(0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as a full disk
        try:
            for name, write in (
                ("metrics.jsonl", folder.log),
                ("result.json", folder.write_result),
            ):
                with pytest.raises(OSError, match=f"too large: '.*{name}'$"):
                    write({"step": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# A log that is not what it was


def cut(data):
    return b"".join(data.splitlines(keepends=True)[:7])


def garble(data):
    lines = data.splitlines(keepends=True)
    lines[3:5] = [b'{"step": "four"}\n', b"[]\n"]
    return b"".join(lines)


def repeat(data):
    lines = data.splitlines(keepends=True)
    return b"".join([*lines[:5], *lines[2:]])


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda data: b"", []),
        (lambda data: None, []),
        (cut, [*range(1, 8)]),
        (garble, [1, 2, 3, *range(6, 16)]),
        (repeat, [*range(1, 16)]),
        (lambda data: data.replace(b"loss", b"lost"), []),
        (lambda data: b"\xff\xfe\n" + data, [*range(1, 16)]),
        (lambda data: b"{" * 100_000 + b"\n" + data, [*range(1, 16)]),
    ],
    ids=["emptied", "deleted", "cut", "garbled", "repeated", "renamed", "bytes", "deep"],
)
def test_a_damaged_log_is_set_aside_and_told_and_the_run_goes_on(config, caplog, damage, kept):
    whole = train(config)
    shutil.rmtree(checkpoint(config, 20))
    before = log_of(config).read_bytes()
    after = damage(before)
    log_of(config).unlink() if after is None else log_of(config).write_bytes(after)
    with caplog.at_level(logging.WARNING):
        again = train(replace(config, resume=True))
    assert without_clock(again) == without_clock(whole)
    assert f"{log_of(config)} is not what it was" in caplog.text
    steps = [metrics["step"] for metrics in read_metrics(log_of(config))]
    assert steps == [*kept, *range(16, 21)]
    aside = log_of(config).with_name("metrics.jsonl.damaged")
    assert aside.exists() == (after is not None)
    if after is not None:
        assert aside.read_bytes() == after
        assert str(aside) in caplog.text


def test_a_log_that_is_as_it_was_is_kept_to_the_byte_whatever_follows(config, caplog):
    train(config)
    shutil.rmtree(checkpoint(config, 20))
    before = log_of(config).read_bytes()
    log_of(config).write_bytes(before + b'{"step": 21, "lo')
    train(replace(config, resume=True))
    lines = before.splitlines(keepends=True)
    assert log_of(config).read_bytes().splitlines(keepends=True)[:15] == lines[:15]
    assert len(read_metrics(log_of(config))) == 20
    assert not caplog.records


def test_checkpoints_of_an_earlier_version_are_resumed(config, caplog):
    whole = train(config)
    shutil.rmtree(checkpoint(config, 20))
    state = load_checkpoint(checkpoint(config, 15))
    shutil.rmtree(checkpoint(config, 15))
    del state["log"], state["first_loss"]
    save_checkpoint(config.output_dir, 15, state, keep=2)
    again = train(replace(config, resume=True))
    assert without_clock(again) == without_clock(whole)
    assert [m["step"] for m in read_metrics(log_of(config))] == [*range(1, 21)]
    assert not caplog.records


# The structure of every file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("finished") / "run", max_steps=4, checkpoint_every=2)
    train(config)
    return config


def kind(value):
    """What JSON calls it."""
    return "number" if type(value) in (int, float) else type(value).__name__


def at(value, place):
    for key in place:
        value = value[key]
    return value


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_no_damaged_structure_is_taken_or_ends_in_a_traceback(
    finished, tmp_path, caplog, name, change
):
    read = {
        "config.json": lambda: read_config(tmp_path),
        "result.json": lambda: read_result(tmp_path),
        "metrics.jsonl": lambda: read_metrics(tmp_path / name),
    }[name]
    path = tmp_path / name
    lines = (finished.output_dir / name).read_text().splitlines()
    if name != "metrics.jsonl":
        lines = ["".join(lines)]
    value = json.loads(lines[-1])
    changed = {place: damaged(value, place, change) for place in places(value)}
    for place, text in changed.items():
        if text is None:
            continue
        path.write_text("".join(line + "\n" for line in [*lines[:-1], text]))
        caplog.clear()
        try:
            read()
        except ValueError as error:
            assert str(path) in str(error)
            assert len(str(error)) < 2000
            continue
        # Taken is what has the same structure, or is not needed, or is told.
        if change == "missing":
            needed = {"step", "steps", "seconds", "loss"}
            assert str(place[-1]) in caplog.text or place[-1] not in needed
        else:
            kinds = {kind(at(nesting, place)) for nesting in (value, json.loads(text))}
            assert len(kinds - {"NoneType"}) <= 1
    assert any(changed.values())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"null", b"{}"])
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_what_is_not_json_is_refused_by_name(tmp_path, name, data):
    read = {"config.json": read_config, "result.json": read_result}[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} "):
        read(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    read = {"config.json": read_config, "result.json": read_result}
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        read.get(name, lambda folder: read_metrics(folder / name))(tmp_path)


def test_fields_that_are_not_there_have_their_defaults_and_are_told(finished, tmp_path, caplog):
    values = json.loads((finished.output_dir / "config.json").read_text())
    del values["radius"], values["quantizer"]["init"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        assert read_config(tmp_path).radius == 1.0
    assert "config.json has no quantizer.init, radius" in caplog.text


@pytest.mark.parametrize("change", CHANGES)
def test_no_damaged_state_is_trained_on(finished, tmp_path, caplog, change):
    """Signed anew, so that the structure alone can tell."""
    caplog.set_level(logging.CRITICAL)
    config = replace(finished, output_dir=tmp_path / "run", resume=True)
    shutil.copytree(finished.output_dir, config.output_dir)
    shutil.rmtree(checkpoint(config, 2))
    path = checkpoint(config, 4)
    manifest = json.loads((path / "manifest.json").read_text())
    value = json.loads((path / "state.json").read_text())

    def begun():
        newest = newest_checkpoint(config.output_dir)
        if newest is None:
            return None
        try:
            training = Training(config, CPU, newest)
        except ValueError as error:
            assert str(path) in str(error)
            return None
        loss, _ = training_step(training, training.next_window())
        return loss, [p.detach().clone() for p in training.model.parameters()]

    expected = begun()
    for place in random.Random(change).sample([*places(value)], 6):
        changed = damaged(value, place, change)
        if changed is None:
            continue
        (path / "state.json").write_text(changed)
        record = {"size": len(changed), "sha256": hashlib.sha256(changed.encode()).hexdigest()}
        manifest["files"]["state.json"] = record
        (path / "manifest.json").write_text(json.dumps(manifest))
        found = begun()
        if found is not None:
            assert found[0] == expected[0], place
            assert all(map(torch.equal, found[1], expected[1])), place
