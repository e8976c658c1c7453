"""Checkpoints made by strangers: hashes are right, and nothing else is taken at its word."""

import hashlib
import json
import logging
import os
import shutil
import signal
import struct

import pytest
import torch
from checkpoint_tools import same, state_of

from fogzo_lab.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    restore_rng,
    rng_state,
    save_checkpoint,
)

TENSORS = "tensors-00000-of-00001.safetensors"


@pytest.fixture(autouse=True)
def _nothing_waits():
    """A pipe or an endless device would be read for ever."""

    def give_up(*_):
        pytest.fail("waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Crafted:
    """A checkpoint that can be changed and signed anew."""

    def __init__(self, path):
        self.path = path
        self.manifest = json.loads((path / "manifest.json").read_text())
        self.state = json.loads((path / "state.json").read_text())

    def node(self, name):
        """The tensor of that name in state.json."""
        model = dict(self.state["dict"])["model"]
        return dict(model["dict"])[name.removeprefix("model.")]

    def sign(self, state=None):
        text = json.dumps(self.state) if state is None else state
        self.write("state.json", text.encode())

    def write(self, name, data):
        (self.path / name).write_bytes(data)
        self.manifest["files"][name] = {"size": len(data), "sha256": digest(data)}
        self.finish()

    def finish(self):
        (self.path / "manifest.json").write_text(json.dumps(self.manifest))


def digest(data):
    return hashlib.sha256(data).hexdigest()


def replaced(name, made):
    """A file that is replaced by something of size 0, which the manifest says."""

    def craft(it):
        (it.path / name).unlink()
        made(it.path / name)
        it.manifest["files"][name] = {"size": 0, "sha256": digest(b"")}
        if name != "manifest.json":
            it.finish()

    return craft


def link(name):
    def craft(it):
        outside = it.path.parent.parent / name
        shutil.move(it.path / name, outside)
        (it.path / name).symlink_to(outside)

    return craft


def named(name):
    """The tensors under another name, where there is such a file, with right size and hash."""

    def craft(it):
        target = it.path / name.replace("ABSOLUTE", str(it.path.parent.parent / "outside"))
        target.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(it.path / TENSORS, target)
        it.manifest["files"][str(target) if "ABSOLUTE" in name else name] = it.manifest[
            "files"
        ].pop(TENSORS)
        for tensor in ("model.weight", "model.bias"):
            for piece in it.node(tensor)["pieces"]:
                piece[0] = str(target) if "ABSOLUTE" in name else name
        it.sign()

    return craft


def node(changes, name="model.weight"):
    def craft(it):
        changes(it.node(name))
        it.sign()

    return craft


def two_pieces(low, high, size=(32,)):
    def change(tensor):
        tensor["pieces"] = [[TENSORS, [low], list(size)], [TENSORS, [high], list(size)]]

    return node(change)


def header(changes):
    """The tensors' file with a changed header."""

    def craft(it):
        data = (it.path / TENSORS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        text = json.dumps(changes(entries) or entries).encode()
        it.write(TENSORS, struct.pack("<Q", len(text)) + text + data[8 + length :])

    return craft


def state(text):
    return lambda it: it.sign(text)


def manifest(changes):
    def craft(it):
        changes(it.manifest)
        it.finish()

    return craft


DEEP = '{"dict": [["a", ' * 500 + "1" + "]]}" * 500
CRAFTED = {
    "a pipe as tensors": (replaced(TENSORS, os.mkfifo), TENSORS),
    "a pipe as state": (replaced("state.json", os.mkfifo), "state.json"),
    "a pipe as manifest": (replaced("manifest.json", os.mkfifo), "manifest.json"),
    "a device as tensors": (replaced(TENSORS, lambda p: p.symlink_to("/dev/zero")), TENSORS),
    "a device as manifest": (
        replaced("manifest.json", lambda p: p.symlink_to("/dev/zero")),
        "manifest.json",
    ),
    "a folder as state": (replaced("state.json", os.mkdir), "state.json"),
    "a link to tensors": (link(TENSORS), TENSORS),
    "a link to a state": (link("state.json"), "state.json"),
    "a link to a manifest": (link("manifest.json"), "manifest.json"),
    "a name above": (named("../outside"), "manifest.json"),
    "a name below": (named("inside/tensors"), "manifest.json"),
    "an absolute name": (named("ABSOLUTE"), "manifest.json"),
    "a hidden name": (named(".tensors"), "manifest.json"),
    "a name of another drive": (named("C:tensors"), "manifest.json"),
    "a device's name": (
        manifest(lambda m: m["files"].update({"/dev/zero": {"size": 0, "sha256": digest(b"")}})),
        "manifest.json",
    ),
    "the wrong step": (manifest(lambda m: m.update(step=3)), "manifest.json"),
    "a negative step": (manifest(lambda m: m.update(step=-4)), "manifest.json"),
    "a true format": (manifest(lambda m: m.update(format=True)), "manifest.json"),
    "a negative size": (manifest(lambda m: m["files"][TENSORS].update(size=-1)), "manifest.json"),
    "files in a list": (manifest(lambda m: m.update(files=["state.json"])), "manifest.json"),
    "another dtype": (node(lambda n: n.update(dtype="int32")), TENSORS),
    "a wider dtype": (node(lambda n: n.update(dtype="float64")), TENSORS),
    "no dtype": (node(lambda n: n.update(dtype="nn")), "state.json"),
    "a quantized dtype": (node(lambda n: n.update(dtype="qint8")), "state.json"),
    "a dtype in a list": (node(lambda n: n.update(dtype=["float32"])), "state.json"),
    "another shape": (node(lambda n: n.update(shape=[8, 8])), "state.json"),
    "a larger shape": (node(lambda n: n.update(shape=[65])), "state.json"),
    "an enormous shape": (node(lambda n: n.update(shape=[2**40] * 3)), "state.json"),
    "a negative shape": (node(lambda n: n.update(shape=[-64])), "state.json"),
    "a shape of many dimensions": (node(lambda n: n.update(shape=[1] * 100)), "state.json"),
    "no pieces": (node(lambda n: n.update(pieces=[])), "state.json"),
    "a piece of numbers": (node(lambda n: n.update(pieces=[1])), "state.json"),
    "a piece of too much": (node(lambda n: n["pieces"][0].append([0])), "state.json"),
    "a piece beyond": (two_pieces(0, 40), TENSORS),
    "a piece of a file of no tensors": (
        node(lambda n: n["pieces"][0].__setitem__(0, "state.json")),
        "state.json",
    ),
    "a piece of a file that is not named": (
        node(lambda n: n["pieces"][0].__setitem__(0, "other")),
        "state.json",
    ),
    "another name": (node(lambda n: n.update(tensor="other")), TENSORS),
    "one tensor twice": (
        node(lambda n: n.update(tensor="model.weight", shape=[64]), "model.bias"),
        "state.json",
    ),
    "another header": (
        header(lambda e: {k.replace("model.bias", "x"): v for k, v in e.items()}),
        TENSORS,
    ),
    "a header that overlaps": (
        header(lambda e: e["model.bias"].update(data_offsets=[0, 12])),
        TENSORS,
    ),
    "a header beyond": (
        header(lambda e: e["model.bias"].update(data_offsets=[256, 2**40])),
        TENSORS,
    ),
    "a header of nothing": (header(lambda e: [1]), TENSORS),
    "not a state": (state("[1, 2]"), "state.json"),
    "a state of one number": (state('{"float": "7ff8000000000000"}'), "state.json"),
    "a state with a strange node": (state('{"dict": [["a", {"b": 1}]]}'), "state.json"),
    "a float that is none": (state('{"dict": [["a", {"float": "xy"}]]}'), "state.json"),
    "a key that is a list": (state('{"dict": [[["a"], 1]]}'), "state.json"),
    "a key twice": (state('{"dict": [["a", 1], ["a", 2]]}'), "state.json"),
    "a name twice": (state('{"dict": [["a", 1]], "dict": []}'), "state.json"),
    "NaN": (state('{"dict": [["a", NaN]]}'), "state.json"),
    "beyond all floats": (state('{"dict": [["a", 1e999]]}'), "state.json"),
    "a number of many digits": (state('{"dict": [["a", 1' + "0" * 5000 + "]]}"), "state.json"),
    "deep": (state(DEEP), "state.json"),
    "deeper": (state("[" * 100_000 + "]" * 100_000), "state.json"),
    "not UTF-8": (lambda it: it.write("state.json", b'{"dict": "\xff"}'), "state.json"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_checkpoint_is_named_and_passed_over_for_the_one_before(tmp_path, caplog, name):
    craft, file = CRAFTED[name]
    run = tmp_path / "run"
    good = save_checkpoint(run, 1, state_of(1), keep=5)
    bad = save_checkpoint(run, 4, state_of(4), keep=5)
    craft(Crafted(bad))
    with pytest.raises(ValueError, match="use an earlier checkpoint") as told:
        load_checkpoint(bad)
    assert f"{bad / file} " in str(told.value)
    assert len(str(told.value)) < 1000
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(run) == good
    assert f"{bad / file} " in caplog.text


def test_pieces_that_overlap_leave_no_part_unread(tmp_path):
    bad = save_checkpoint(tmp_path, 4, {"model": {"weight": torch.ones(32)}}, keep=5)
    it = Crafted(bad)
    it.node("model.weight").update(shape=[64])
    it.node("model.weight")["pieces"] = [[TENSORS, [n], [32]] for n in (0, 16)]
    it.sign()
    with pytest.raises(ValueError, match="pieces that overlap"):
        load_checkpoint(bad)
    it.node("model.weight")["pieces"] = [[TENSORS, [n], [32]] for n in (0, 32)]
    it.sign()
    assert load_checkpoint(bad)["model"]["weight"].tolist() == [1.0] * 64


def test_a_folder_of_another_step_is_passed_over_and_a_copy_under_another_name_is_not(tmp_path):
    good = save_checkpoint(tmp_path, 1, state_of(1), keep=5)
    shutil.copytree(good, good.with_name("step-000009"))
    (good.with_name("step-000008")).symlink_to(good)
    assert newest_checkpoint(tmp_path) == good
    copy, pointer = tmp_path / "best", tmp_path / "latest"
    shutil.copytree(good, copy)
    pointer.symlink_to(good)
    for path in (copy, pointer):
        assert same(load_checkpoint(path), state_of(1))


@pytest.mark.parametrize("place", ["step-000003", ".step-000003.partial"])
@pytest.mark.parametrize("made", [os.mkfifo, lambda path: path.symlink_to("/")], ids=["pipe", "/"])
def test_what_lies_among_checkpoints_is_neither_followed_nor_in_the_way(tmp_path, made, place):
    good = save_checkpoint(tmp_path, 1, state_of(1), keep=5)
    made(good.with_name(place))
    assert newest_checkpoint(tmp_path) == good
    later = save_checkpoint(tmp_path, 4, state_of(4), keep=1)
    assert os.listdir(later.parent) == ["step-000004"]
    assert os.path.isdir("/usr")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(torch=[1, 2]),
        lambda s: s.update(torch=None),
        lambda s: s.update(python=[3]),
        lambda s: s.update(python=None),
        lambda s: s.update(accelerators=[["nowhere", []]]),
        lambda s: s.update(accelerators=[[]]),
        lambda s: s.update(numpy=["MT19937", [1], 0, 0, 0.0]),
        lambda s: s["numpy"].__setitem__(2, 10**6),  # NumPy would read there
        lambda s: s["numpy"].__setitem__(2, -1),
        lambda s: s.pop("torch"),
    ],
)
def test_random_streams_that_are_none_are_refused(change):
    import numpy.random  # noqa: F401 -- so that there is a stream of NumPy

    state = json.loads(json.dumps(rng_state()))
    before = torch.get_rng_state()
    change(state["ranks"][0])
    with pytest.raises(ValueError, match=r"random streams|ranks\[0\]"):
        restore_rng(state)
    torch.set_rng_state(before)


def test_a_state_that_contains_itself_is_refused(tmp_path):
    state = {}
    state["again"] = state
    with pytest.raises(ValueError, match="does the state contain itself"):
        save_checkpoint(tmp_path, 1, state, keep=1)


def test_dtypes_are_those_of_torch_alone():
    from fogzo_lab.training.checkpoint_format import _DTYPES

    assert _DTYPES["float32"] is torch.float32
    assert not {"nn", "save", "qint8", "half"} & set(_DTYPES)
