"""JSON files: read from regular files of bounded size, checked, written whole or not at all.

The expected structure is a type hint: a TypedDict, or a type that one consists of.
"""

import contextlib
import json
import math
import os
import stat
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Far more than any run writes, and little enough to read at once.
LARGEST = 2**28

# Type of the values of keys that a TypedDict does not name.
_PLAIN = float | None
_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
    list: "a list",
    dict: "an object",
}


def read_json(path: Path, hint: Any, way_out: str) -> Any:
    """The value in a JSON file, as the type that is expected there.

    Args:
        path: The file.
        hint: See `checked`.
        way_out: Advice for a damaged file, for the error.

    Raises:
        ValueError: If there is no such file, or it holds anything else. It names the file, what
            came and what was expected.
    """
    try:
        return parse_json(read_regular(path), hint)
    except ValueError as error:
        raise ValueError(f"{path} {error}: {way_out}") from error


def read_regular(path: Path, links: bool = True) -> bytes:
    """The bytes of a file, which must be neither a device, a pipe nor too large.

    Args:
        path: The file.
        links: Whether it may be a symbolic link.

    Raises:
        ValueError: If it cannot be read. It gives the reason, without the file's name.
    """
    try:
        check_regular(path, links)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def check_regular(path: Path, links: bool = True, largest: int | None = LARGEST) -> int:
    """The size of a regular file, found without opening it, as a pipe would wait for ever.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is anything else, or too large.
    """
    status = path.stat() if links else path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ValueError("is a symbolic link where a file was expected")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    if largest is not None and status.st_size > largest:
        raise ValueError(f"has {status.st_size} bytes where at most {largest} were expected")
    return status.st_size


def parse_json(text: bytes, hint: Any) -> Any:
    """The value in JSON text; duplicate names and numbers that are not finite are refused.

    Raises:
        ValueError: If it is not JSON, or not of the expected type.
    """
    try:
        value = json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=_without_duplicates,
            parse_float=_float,
            parse_constant=_float,
        )
    except RecursionError as error:
        raise ValueError("is not JSON (nested too deep)") from error
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    try:
        return checked(hint, value)
    except ValueError as error:
        raise ValueError(f"cannot be used ({error})") from error


def checked(hint: Any, value: Any, where: str = "") -> Any:
    """The value itself, if it is of the expected type.

    Args:
        hint: A TypedDict (further keys must hold numbers or null), dict[str, X], list[X], a union,
            Any, or any class.
        value: From `json.loads`, or a nesting of the kind.
        where: Name of the place, for the error.

    Raises:
        ValueError: If it is of another type. It names the place.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        return _union(inner, value, where)
    if origin is list:
        if not isinstance(value, list):
            _refuse(hint, value, where)
        for index, item in enumerate(value):
            checked(inner[0], item, f"{where}[{index}]")
    elif origin is dict:
        for key, item in _as_object(hint, value, where).items():
            checked(inner[0], key, where)
            checked(inner[1], item, _inside(where, key))
    elif typing.is_typeddict(hint):
        hints, values = _hints(hint), _as_object(hint, value, where)
        for name in sorted(hint.__required_keys__ - set(values)):
            raise ValueError(f"{_inside(where, name)} is missing")
        for name, item in values.items():
            checked(hints.get(name, _PLAIN), item, _inside(where, name))
    elif not _fits(hint, value):
        _refuse(hint, value, where)
    return value


_hints = cache(typing.get_type_hints)


def _fits(cls: Any, value: Any) -> bool:
    """Whether a value is of a class; numbers of 64 bits at most, and never true or false."""
    if isinstance(value, bool):
        return cls is bool
    if isinstance(value, int):
        return cls in (int, float) and abs(value) < 2**64
    return isinstance(value, cls)


def _union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    plain = [option for option in options if isinstance(option, type)]
    if any(_fits(option, value) for option in plain if not typing.is_typeddict(option)):
        return value
    others = [option for option in options if option is not types.NoneType]
    if len(others) == 1:
        return checked(others[0], value, where)
    for option in others:
        with contextlib.suppress(ValueError):
            return checked(option, value, where)
    return _refuse(typing.Union[options], value, where)  # noqa: UP007 -- made of a tuple


def _as_object(hint: Any, value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        _refuse(hint, value, where)
    return value


def _refuse(hint: Any, value: Any, where: str) -> typing.NoReturn:
    raise ValueError(f"{where or 'it'} must be {_described(hint)}, got {_shown(value)}")


def _described(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(_described(option) for option in typing.get_args(hint))
    if typing.is_typeddict(hint):
        return "an object"
    return _NAMES.get(origin or hint, f"a {getattr(hint, '__name__', hint)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _inside(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} is there twice")
        values[name] = value
    return values


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text in which numbers that are not finite are null, as JSON has none."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in an error of writing to it; of a full disk the system tells none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole file, or leave the old one as it is."""
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            partial.write_text(text, encoding="utf-8", newline="")
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
