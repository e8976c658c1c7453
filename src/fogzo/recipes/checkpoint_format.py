"""What the files of a checkpoint say: tensors in safetensors, their nesting in JSON.

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
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fogzo.collectives import is_sharded, local

FORMAT = 1

FileRecord = dict[str, Any]
Manifest = dict[str, tuple[int, str]]

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


class Layout:
    """The state as JSON, and its tensors by name: the same on every rank."""

    def __init__(self) -> None:
        self.skeleton: Any = None
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, dict[str, Any]] = {}

    def add(self, value: Any, path: tuple[str | int, ...]) -> Any:
        """What `json.dumps` takes, for a value at a path in the state.

        Raises:
            ValueError: If it is nothing that a checkpoint can hold.
        """
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
    """Reads a checkpoint's files, each checked when it is first needed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._manifest = read_manifest(path)
        self._open: dict[str, Any] = {}

    def verified(self, name: str) -> Path:
        """A file whose bytes are the manifest's."""
        check_file(self._path, name, self._manifest)
        return self._path / name

    def build(self, node: Any, like: Any) -> Any:
        """The value that `Layout.add` turned into JSON."""
        if isinstance(node, list):
            return [self.build(item, _child(like, key)) for key, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        if "dict" in node:
            return {key: self.build(item, _child(like, key)) for key, item in node["dict"]}
        if "tuple" in node:
            return tuple(self.build(node["tuple"], like))
        if "float" in node:
            return struct.unpack(">d", bytes.fromhex(node["float"]))[0]
        shape = node["shape"]
        if is_sharded(like) and list(like.shape) == shape:
            return self._read_shard(node, like)
        return self._read(node, [0] * len(shape), shape)

    def _read_shard(self, node: dict[str, Any], like: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        chunk = like.__create_chunk_list__()[0]
        part = self._read(node, list(chunk.offsets), list(chunk.sizes))
        mesh, placements = like.device_mesh, like.placements
        return DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride())

    def _read(self, node: dict[str, Any], start: list[int], shape: list[int]) -> Tensor:
        """A box of a tensor, put together from those pieces that it overlaps."""
        dtype: torch.dtype = getattr(torch, node["dtype"])
        raw = [] if dtype in _NATIVE else [dtype.itemsize]
        # Copied out of the file's memory map, so that nothing depends on the file any more.
        out = torch.empty([*shape, *raw], dtype=torch.uint8 if raw else dtype)
        filled = 0
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
            filled += math.prod(b - a for a, b in zip(low, high, strict=True))
        if filled != math.prod(shape):
            raise invalid(self._path / "state.json", f"{node['tensor']} has missing pieces")
        return out.view(-1).view(dtype).view(shape) if raw else out

    def _tensors(self, name: str) -> Any:
        if name not in self._open:
            opened = safe_open(self.verified(name), framework="pt")
            self._open[name] = self.enter_context(opened)
        return self._open[name]


class Piece(NamedTuple):
    """The part of a tensor that one rank writes, and where it begins in the whole."""

    part: Tensor
    offset: list[int]


def own_piece(tensor: Tensor, rank: int) -> Piece | None:
    """What this rank writes of a tensor: each element is written by exactly one rank."""
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

    safetensors' own writer wants all tensors on the CPU at once and none to share memory.
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
    """Write a JSON file; see `write_file`."""
    return write_file(path, [json.dumps(value, allow_nan=False).encode()])


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
    """The sizes and hashes of a checkpoint's files.

    Raises:
        ValueError: If there is no manifest that this version can read.
    """
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        version = manifest["format"]
        files = {name: (r["size"], r["sha256"]) for name, r in manifest["files"].items()}
    except OSError as error:
        raise invalid(file, f"cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise invalid(file, f"is not a checkpoint's manifest ({error!r})") from error
    if version != FORMAT:
        raise invalid(file, f"is of format {version!r}, and this version of fogzo reads {FORMAT}")
    if "state.json" not in files:
        raise invalid(file, "does not name state.json")
    return files


def check_file(path: Path, name: str, manifest: Manifest) -> None:
    """Raise a `ValueError` unless a file's bytes are the manifest's."""
    file = path / name
    if name not in manifest:
        raise invalid(file, "is not in the manifest")
    expected_size, expected_digest = manifest[name]
    try:
        size = file.stat().st_size
        if size != expected_size:
            raise invalid(file, f"has {size} bytes instead of {expected_size}")
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise invalid(file, f"cannot be read ({error.strerror})") from error
    if digest != expected_digest:
        raise invalid(file, "has other bytes than were written (SHA-256)")


def invalid(file: Path, why: str) -> ValueError:
    """The error of a checkpoint that cannot be loaded."""
    return ValueError(
        f"{file} {why}: use an earlier checkpoint, as --resume and newest_checkpoint(run_folder) "
        "do by themselves"
    )


def _stored_itemsize(dtype: torch.dtype) -> int:
    return dtype.itemsize if dtype in _NATIVE else 1


def _child(like: Any, key: str | int) -> Any:
    """What stands for a child in `like`; a DTensor stands for everything below it."""
    if isinstance(like, Tensor):
        return like
    if isinstance(like, dict):
        return like.get(key)
    inside = isinstance(like, list | tuple) and isinstance(key, int) and key < len(like)
    return like[key] if inside else None


def _subscripts(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)
