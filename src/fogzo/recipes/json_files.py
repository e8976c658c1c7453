"""The one door through which JSON comes in: of a regular file, of a known size, of a known shape.

A shape is a type hint: dataclasses and TypedDicts for objects, and what they are made of.
"""

import contextlib
import dataclasses
import json
import math
import stat
import types
import typing
from pathlib import Path
from typing import Any

# Far more than any run writes, and little enough to be read at once.
LARGEST = 2**28

_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    Path: "a path",
}


def read_json(path: Path, hint: Any, way_out: str) -> Any:
    """The value in a JSON file, as the type that is expected there.

    Args:
        path: The file.
        hint: See `restore`.
        way_out: What to do if the file is damaged, for the error.

    Raises:
        ValueError: If there is no such file, or it holds anything else. It names the file, what
            came and what was expected.
    """
    try:
        return parse_json(read_regular(path), hint)
    except ValueError as error:
        raise ValueError(f"{path} {error}: {way_out}") from error


def read_regular(path: Path, links: bool = True) -> bytes:
    """The bytes of a file, which must be neither a device, a pipe nor beyond all bounds.

    Args:
        path: The file.
        links: Whether it may be a symbolic link.

    Raises:
        ValueError: If it cannot be read. It says why, without the file's name.
    """
    try:
        check_regular(path, links)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def check_regular(path: Path, links: bool = True, largest: int | None = LARGEST) -> int:
    """The size of a regular file, found without opening it, as a pipe would wait for ever.

    Raises:
        OSError: If there is none.
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
    """The value in JSON text; names that come twice and numbers that are not finite are refused.

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
        return restore(hint, value)
    except ValueError as error:
        raise ValueError(f"cannot be used ({error})") from error


def restore(hint: Any, value: Any, where: str = "") -> Any:
    """A value that JSON can hold, checked and turned into the type it was before.

    Args:
        hint: A dataclass, a TypedDict (what it has beyond the hinted keys must be plain values),
            dict[str, X], list[X], tuple[X, ...], a union, a Literal, Path, Any, or any class.
        value: From `json.loads`, or a nesting of the kind.
        where: Name of the place, for the error.

    Raises:
        ValueError: If it is of another type. It names the place.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        return _restore_union(inner, value, where)
    if origin is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in inner):
            _refuse(hint, value, where)
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            _refuse(hint, value, where)
        return origin(restore(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        return {
            restore(inner[0], key, where): restore(inner[1], item, _inside(where, key))
            for key, item in _as_object(hint, value, where).items()
        }
    if typing.is_typeddict(hint):
        return _restore_typed_dict(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return _restore_dataclass(hint, value, where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not _fits(hint, value):
        _refuse(hint, value, where)
    return value


def _fits(cls: Any, value: Any) -> bool:
    """Whether a value is of a class; numbers of 64 bits at most, and never true or false."""
    if isinstance(value, bool):
        return cls is bool
    if isinstance(value, int):
        return cls in (int, float) and abs(value) < 2**64
    return isinstance(value, cls)


def _restore_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    others = [option for option in options if option is not types.NoneType]
    classes = [option for option in others if dataclasses.is_dataclass(option)]
    if classes:
        others = [_tagged(classes, value, where)]
    if len(others) == 1:
        return restore(others[0], value, where)
    for option in others:
        if isinstance(option, type):
            if _fits(option, value):
                return value
            continue
        with contextlib.suppress(ValueError):
            return restore(option, value, where)
    return _refuse(typing.Union[options], value, where)  # noqa: UP007 -- made of a tuple


def _tagged(classes: list[Any], value: Any, where: str) -> Any:
    """The dataclass of a union whose tag (its first field) a value carries."""
    if len(classes) == 1:
        return classes[0]
    for cls in classes:
        tag = dataclasses.fields(cls)[0]
        if isinstance(value, dict) and value.get(tag.name) == tag.default:
            return cls
    names = ", ".join(cls.__name__ for cls in classes)
    raise ValueError(f"none of {names} is like {where or 'this'}, {_shown(value)}")


def _restore_dataclass(cls: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = _as_object(cls, value, where)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(unknown)}: it has {', '.join(hints)}"
        )
    empty = dataclasses.MISSING
    for field in dataclasses.fields(cls):
        required = field.default is empty and field.default_factory is empty
        if required and field.name not in values:
            raise ValueError(f"{_inside(where, field.name)} is missing")
    fields = {name: restore(hints[name], v, _inside(where, name)) for name, v in values.items()}
    return cls(**fields)


def _restore_typed_dict(cls: Any, value: Any, where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    values = _as_object(cls, value, where)
    for name in sorted(cls.__required_keys__ - set(values)):
        raise ValueError(f"{_inside(where, name)} is missing")
    plain = str | float | bool | None
    return {
        name: restore(hints.get(name, plain), item, _inside(where, name))
        for name, item in values.items()
    }


def _as_object(hint: Any, value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        _refuse(hint, value, where)
    return value


def _refuse(hint: Any, value: Any, where: str) -> typing.NoReturn:
    raise ValueError(f"{where or 'it'} must be {_described(hint)}, got {_shown(value)}")


def _described(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in typing.get_args(hint))
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(_described(option) for option in typing.get_args(hint))
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return "an object"
    return _NAMES.get(origin or hint, f"a {getattr(hint, '__name__', hint)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _inside(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return values


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
