"""The files of a checkpoint: tensors in safetensors, their nesting in JSON.

- ``tensors-RANK-of-WORLD.safetensors`` has the pieces of tensors that one rank owned. Types that
  safetensors lacks (complex numbers, say) are bytes there, in one more dimension.
- ``state.json`` is the nesting. A JSON object in it has one of four tags: dict, tuple, float (one
  that is not finite) or tensor, which names a tensor and locates its pieces.
- ``manifest.json`` has the format's version, the step, and the size and SHA-256 of the others.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fogzo.collectives import is_sharded, local
from fogzo_lab.system.json_files import LARGEST, check_regular, checked, parse_json, read_regular

FORMAT = 1

Manifest = dict[str, tuple[int, str]]

_STEP = re.compile(r"step-(\d+)|\.step-(\d+)\.replaced", re.ASCII)
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)
# torch counts elements in 63 bits, and NumPy's tensors have 64 dimensions at most.
_MOST_ELEMENTS = 2**60
_MOST_DIMS = 64
_DEEPEST = 100

_NATIVE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}


class FileRecord(TypedDict):
    """The entry of a file in the manifest."""

    size: int
    sha256: str


class _TensorNode(TypedDict):
    """A tensor in state.json; a piece is a file, an offset and a size."""

    tensor: str
    dtype: str
    shape: list[int]
    pieces: list[list[Any]]


class Layout:
    """The state as JSON and its tensors by name, identical on every rank."""

    def __init__(self) -> None:
        self.skeleton: Any = None
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, dict[str, Any]] = {}

    def add(self, value: Any, path: tuple[str | int, ...]) -> Any:
        """The JSON form of a value at a path in the state.

        Raises:
            ValueError: If a checkpoint cannot hold the value.
        """
        if len(path) > _DEEPEST:
            raise ValueError(
                f"a checkpoint is nested {_DEEPEST} deep at most, got "
                f"state{_subscripts(path)[:60]}...: does the state contain itself?"
            )
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            # JSON has no word for these, and a NaN has bits of its own.
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if isinstance(value, Tensor):
            return self._add_tensor(value, path)
        if isinstance(value, list | tuple):
            items = [self.add(item, (*path, index)) for index, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str | int)]
            if odd:
                raise ValueError(
                    f"a checkpoint's keys are str or int, got {odd[0]!r} in "
                    f"state{_subscripts(path)}: str(key)"
                )
            # Pairs, as JSON's own keys are all strings.
            return {"dict": [[key, self.add(item, (*path, key))] for key, item in value.items()]}
        raise ValueError(
            "a checkpoint holds dict, list, tuple, None, bool, int, float, str and tensors, got "
            f"{type(value).__name__} in state{_subscripts(path)}: save its state_dict()"
        )

    def _add_tensor(self, tensor: Tensor, path: tuple[str | int, ...]) -> dict[str, Any]:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(
                f"a checkpoint holds dense tensors with data, got {tensor.layout}, {tensor.dtype} "
                f"on {tensor.device} in state{_subscripts(path)}: tensor.to_dense()"
            )
        name = ".".join(map(str, path)).encode(errors="replace").decode()
        while name in self.tensors or name == "__metadata__":  # {"a.b": t, "a": {"b": t}}
            name += "'"
        entry = {
            "tensor": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "pieces": [],
        }
        self.tensors[name], self.entries[name] = tensor, entry
        return entry


class Reader(contextlib.ExitStack):
    """Reads a checkpoint's files, each checked when it is first needed.

    A checkpoint may come from anywhere, so nothing in it is trusted.

    Args:
        path: The checkpoint.

    Raises:
        DamagedCheckpoint: If a file is not as it should be. All methods raise it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._manifest = read_manifest(path)
        self._open: dict[str, Any] = {}
        self._checked: set[str] = set()

    def check_share(self, rank: int, world: int) -> None:
        """Raise unless this rank's share of the files is as written; rank 0 looks into all."""
        for name in sorted(self._manifest)[rank::world]:
            self._check(name)
        if rank == 0:
            self._checked = set(self._manifest)  # the rest by the other ranks, meanwhile
            _, tensors = self._state()
            for node in tensors:
                self._check_pieces(node)

    def load(self, like: Any, only: Collection[str] | None) -> Any:
        """The state; see `load_checkpoint`."""
        root, _ = self._state()
        if only is not None:
            root = {"dict": [(key, node) for key, node in root["dict"] if key in only]}
        return self._build(root, like)

    def _check(self, name: str) -> None:
        """Raise unless a file's bytes are the manifest's; once is enough."""
        if name not in self._checked:
            check_file(self._path, name, self._manifest)
            self._checked.add(name)

    def _state(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The nesting, every node of which is one that `Layout.add` makes, and its tensors."""
        file = self._path / "state.json"
        self._check("state.json")
        try:
            root = parse_json(read_regular(file, links=False), dict[str, Any])
        except ValueError as error:
            raise invalid(file, str(error)) from error
        if "dict" not in root:
            raise invalid(file, "is not the state of anything")
        tensors = list(self._tensor_nodes(root, ()))
        if len({node["tensor"] for node in tensors}) < len(tensors):
            raise invalid(file, "has two tensors of one name")
        return root, tensors

    def _tensor_nodes(self, node: Any, place: tuple[str | int, ...]) -> Iterator[dict[str, Any]]:
        """Every tensor of a nesting, which is checked on the way."""
        if len(place) > _DEEPEST:
            raise invalid(self._path / "state.json", "is nested too deep")
        if isinstance(node, list):
            for index, item in enumerate(node):
                yield from self._tensor_nodes(item, (*place, index))
            return
        if not isinstance(node, dict):
            return
        value = next(iter(node.values()), None)
        match sorted(node):
            case ["dict"] if isinstance(value, list):
                keys = set()
                for pair in value:
                    if not (isinstance(pair, list) and len(pair) == 2):
                        raise self._odd(place, pair)
                    key, item = pair
                    if not isinstance(key, str | int) or key in keys:
                        raise self._odd(place, key)
                    keys.add(key)
                    yield from self._tensor_nodes(item, (*place, key))
            case ["tuple"] if isinstance(value, list):
                yield from self._tensor_nodes(value, place)
            case ["float"] if isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value):
                pass
            case ["dtype", "pieces", "shape", "tensor"]:
                yield self._tensor_node(node, place)
            case _:
                raise self._odd(place, node)

    def _tensor_node(self, node: Any, place: tuple[str | int, ...]) -> dict[str, Any]:
        """The same node, if it is one of a tensor."""
        try:
            checked(_TensorNode, node)
            boxes = [node["shape"]]
            for name, *box in node["pieces"]:
                if name not in self._manifest:
                    raise ValueError(f"the manifest names no {name!r}")
                low, size = checked(list[list[int]], box)
                boxes += low, size
            if any(len(box) != len(boxes[0]) or min(box, default=0) < 0 for box in boxes):
                raise ValueError("the shapes of its pieces do not fit")
            if len(boxes[0]) > _MOST_DIMS or math.prod(boxes[0]) >= _MOST_ELEMENTS:
                raise ValueError("no tensor is so large")
            if node["dtype"] not in _DTYPES:
                raise ValueError(f"torch {torch.__version__} has no dtype {node['dtype']!r}")
        except (ValueError, TypeError) as error:
            raise self._odd(place, node, f" ({error})") from error
        return cast(dict[str, Any], node)

    def _odd(self, place: tuple[str | int, ...], found: Any, why: str = "") -> "DamagedCheckpoint":
        what = f"has {found!r:.60} in state{_subscripts(place)}, which no checkpoint is made of"
        return invalid(self._path / "state.json", what + why)

    def _build(self, node: Any, like: Any) -> Any:
        """The value that `Layout.add` turned into JSON."""
        if isinstance(node, list):
            return [self._build(item, _child(like, key)) for key, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        if "dict" in node:
            return {key: self._build(item, _child(like, key)) for key, item in node["dict"]}
        if "tuple" in node:
            return tuple(self._build(node["tuple"], like))
        if "float" in node:
            return struct.unpack(">d", bytes.fromhex(node["float"]))[0]
        self._check_pieces(node)
        shape = node["shape"]
        if is_sharded(like) and list(like.shape) == shape:
            return self._read_shard(node, like)
        return self._read(node, [0] * len(shape), shape)

    def _check_pieces(self, node: dict[str, Any]) -> None:
        """Raise unless the pieces of a tensor are in their files, and make up the whole of it."""
        file, key, shape = self._path / "state.json", node["tensor"], node["shape"]
        dtype = _DTYPES[node["dtype"]]
        raw = [] if dtype in _NATIVE else [dtype.itemsize]
        lows, highs = [], []
        for name, offset, size in node["pieces"]:
            try:
                there = self._tensors(name).get_slice(key)
                found = there.get_dtype(), there.get_shape()
            except SafetensorError as error:
                raise invalid(self._path / name, f"has no tensor {key!r} ({error})") from error
            expected = _NATIVE.get(dtype, "U8"), size + raw
            if found != expected:
                raise invalid(
                    self._path / name,
                    f"has {key!r} as {found[0]} of shape {found[1]}, and state.json as "
                    f"{expected[0]} of shape {expected[1]}",
                )
            lows.append(offset)
            highs.append([a + n for a, n in zip(offset, size, strict=True)])
            if any(high > n for high, n in zip(highs[-1], shape, strict=True)):
                raise invalid(file, f"{key} has a piece outside of its shape")
        if sum(math.prod(size) for *_, size in node["pieces"]) != math.prod(shape):
            raise invalid(file, f"{key} has missing pieces, or more than one of a part")
        if len(lows) > 1 and math.prod(shape):
            low, high = torch.tensor(lows), torch.tensor(highs)
            common = (torch.minimum(high[:, None], high) > torch.maximum(low[:, None], low)).all(-1)
            if int(common.sum()) > int(common.diagonal().sum()):
                raise invalid(file, f"{key} has pieces that overlap")

    def _read_shard(self, node: dict[str, Any], like: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        chunk = like.__create_chunk_list__()[0]
        part = self._read(node, list(chunk.offsets), list(chunk.sizes))
        mesh, placements = like.device_mesh, like.placements
        return DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride())

    def _read(self, node: dict[str, Any], start: list[int], shape: list[int]) -> Tensor:
        """A box of a tensor, assembled from the pieces that it overlaps."""
        dtype = _DTYPES[node["dtype"]]
        raw = [] if dtype in _NATIVE else [dtype.itemsize]
        # Copied out of the file's memory map, so that nothing depends on the file any more.
        out = torch.empty([*shape, *raw], dtype=torch.uint8 if raw else dtype)
        for name, offset, size in node["pieces"]:
            low = [max(a, b) for a, b in zip(start, offset, strict=True)]
            high = [
                min(a + m, b + n) for a, m, b, n in zip(start, shape, offset, size, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            here = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            file, key = self._tensors(name), node["tensor"]
            out[here] = file.get_slice(key)[there] if there else file.get_tensor(key)
        return out.view(-1).view(dtype).view(shape) if raw else out

    def _tensors(self, name: str) -> Any:
        """A file of tensors, whose bytes are checked when it is opened."""
        if name not in self._open:
            self._check(name)
            try:
                opened = safe_open(self._path / name, framework="pt")
            except SafetensorError as error:
                raise invalid(self._path / name, f"holds no tensors ({error})") from error
            self._open[name] = self.enter_context(opened)
        return self._open[name]


class Piece(NamedTuple):
    """The part of a tensor that one rank writes, and where it begins in the whole."""

    part: Tensor
    offset: list[int]


def own_piece(tensor: Tensor, rank: int) -> Piece | None:
    """The piece of a tensor that this rank writes: exactly one rank writes each element."""
    if not is_sharded(tensor):
        return Piece(tensor.detach(), [0] * tensor.ndim) if rank == 0 else None
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinates = mesh.get_coordinate()
    if coordinates is None:  # not a rank of this mesh
        return None
    if any(c for c, p in zip(coordinates, placements, strict=True) if p.is_replicate()):
        return None
    chunk: Any = tensor.__create_chunk_list__()[0]
    part = local(tensor.detach())
    return Piece(part, list(chunk.offsets)) if part.numel() else None


def safetensors_chunks(tensors: dict[str, Tensor]) -> Iterator[Any]:
    """The bytes of a safetensors file, one tensor at a time.

    The writer of safetensors needs all tensors on the CPU at once, and none may share memory.
    """
    # Readers view the bytes in place, so every tensor must begin at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -_stored_itemsize(tensors[name].dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        begin, end = end, end + tensors[name].numel() * dtype.itemsize
        header[name] = {
            "dtype": _NATIVE.get(dtype, "U8"),
            "shape": shape if dtype in _NATIVE else [*shape, dtype.itemsize],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        dense = tensors[name].cpu().resolve_conj().resolve_neg().contiguous()
        yield dense.view(-1).view(torch.uint8).numpy()


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a JSON file; see `write_file`.

    Raises:
        ValueError: If it would be larger than is ever read again.
    """
    text = json.dumps(value, allow_nan=False).encode()
    if len(text) > LARGEST:
        raise ValueError(
            f"{path.name} would have {len(text)} bytes, and at most {LARGEST} are read again: "
            "keep long lists in the state as tensors"
        )
    return write_file(path, [text])


def write_file(path: Path, chunks: Iterable[Any]) -> FileRecord:
    """Write a new file to the disk itself. Returns its size and SHA-256, for the manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def read_manifest(path: Path) -> Manifest:
    """The sizes and hashes of a checkpoint's files, which lie in its folder under plain names.

    Raises:
        DamagedCheckpoint: If there is no manifest that this version can read.
    """
    file = path / "manifest.json"
    try:
        data = read_regular(file, links=False)
    except ValueError as error:
        raise invalid(file, str(error)) from error
    try:
        manifest = parse_json(data, dict[str, Any])
        version = checked(int, manifest.get("format"), "format")
        if version == FORMAT:
            records = checked(dict[str, FileRecord], manifest.get("files"), "files")
            step = checked(int | None, manifest.get("step"), "step")
            if step is not None and step < 0:
                raise ValueError(f"step must be 0 or more, got {step}")
    except ValueError as error:
        raise invalid(file, f"is not a checkpoint's manifest ({error})") from error
    if version != FORMAT:
        raise invalid(file, f"is of format {version!r}, and this version of fogzo reads {FORMAT}")
    if "state.json" not in records:
        raise invalid(file, "does not name state.json")
    for name, record in records.items():
        if not _PLAIN_NAME.fullmatch(name):
            raise invalid(file, f"names {name!r}, which is not a plain name of a file beside it")
        if record["size"] < 0:
            raise invalid(file, f"gives {name} {record['size']} bytes")
    expected = step_of(path)
    if expected is not None and step != expected:
        raise invalid(file, f"is of step {step}, unlike its folder")
    return {name: (record["size"], record["sha256"]) for name, record in records.items()}


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if it is named otherwise."""
    match = _STEP.fullmatch(path.name)
    return int(match[1] or match[2]) if match else None


def run_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint's run, also where a relative path begins within it."""
    return Path(os.path.normpath(checkpoint / "../.."))


def check_file(path: Path, name: str, manifest: Manifest) -> None:
    """Raise a `DamagedCheckpoint` unless a file's bytes are the manifest's."""
    file = path / name
    expected_size, expected_digest = manifest[name]
    try:
        size = check_regular(file, links=False, largest=None)
        if size != expected_size:
            raise ValueError(f"has {size} bytes instead of {expected_size}")
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != expected_digest:
            raise ValueError("has other bytes than were written (SHA-256)")
    except OSError as error:
        raise invalid(file, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise invalid(file, str(error)) from error


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be loaded.

    Attributes:
        reason: The file, and what is wrong with it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}: use an earlier checkpoint, as --resume and newest_checkpoint(run_folder) "
            "do by themselves"
        )
        self.reason = reason


def invalid(file: Path, why: str) -> DamagedCheckpoint:
    """The error of a checkpoint that cannot be loaded."""
    return DamagedCheckpoint(f"{file} {why}")


def _stored_itemsize(dtype: torch.dtype) -> int:
    return dtype.itemsize if dtype in _NATIVE else 1


def _child(like: Any, key: str | int) -> Any:
    """The entry of `like` for a child; a DTensor stands for everything below it."""
    if isinstance(like, Tensor):
        return like
    if isinstance(like, dict):
        return like.get(key)
    inside = isinstance(like, list | tuple) and isinstance(key, int) and key < len(like)
    return like[key] if inside else None


def _subscripts(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)
