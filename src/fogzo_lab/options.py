"""Options: fields of configs whose annotations define the allowed values, and their check."""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from fogzo.wording import nearest


@dataclass(frozen=True)
class Rule:
    """The allowed values of an option, in code and in words."""

    allows: Callable[[Any], bool]
    words: str
    """The requirement, as in "1 or more"."""


@dataclass(frozen=True)
class OneOf:
    """The allowed texts of an option, if a `Literal` cannot list them."""

    choices: Sequence[str]


@dataclass(frozen=True)
class Example:
    """The value to suggest instead of a bad one, if the default is not a good suggestion."""

    value: Any


class _MayBePath:
    """A text that may be a path; a leading ``~`` is the home folder."""


PositiveInt = Annotated[int, Rule(lambda number: number >= 1, "1 or more")]
NonNegativeInt = Annotated[int, Rule(lambda number: number >= 0, "0 or more")]
PositiveFloat = Annotated[float, Rule(lambda number: number > 0, "positive")]
NonNegativeFloat = Annotated[float, Rule(lambda number: number >= 0, "0 or more")]
Share = Annotated[float, Rule(lambda share: 0 <= share <= 1, "in [0, 1]")]
ShareBelowOne = Annotated[float, Rule(lambda share: 0 <= share < 1, "in [0, 1)")]
PositiveShare = Annotated[float, Rule(lambda share: 0 < share <= 1, "in (0, 1]")]
ProperShare = Annotated[float, Rule(lambda share: 0 < share < 1, "in (0, 1)")]
PathOrName = Annotated[str, _MayBePath()]


def at_least_one(kind: str) -> Rule:
    """The rule of a tuple that may not be empty."""
    return Rule(bool, f"one {kind} or more")


_LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which networks compute

_DEFERRED: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Build options without checks; the caller checks the whole config afterwards.

    A group of options does not know its prefix on the command line, and a parser would draw a frame
    around the message and break its lines.
    """
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


class Options:
    """Base of configs: frozen dataclasses that check themselves when they are created.

    Every value must have the type of its field and obey the rules in its annotation. Numbers must
    be finite and texts not empty. Equivalent values are converted: a list to a tuple, a text to a
    `Path`, a NumPy number to Python's, ``~`` to the home folder.
    """

    __slots__ = ("_checked",)

    PREFIX: ClassVar[str] = ""
    """Prefix of these options on the command line."""

    _checked: bool

    def __post_init__(self) -> None:
        if not _DEFERRED.get():
            self.check()

    def check(self, prefix: str | None = None) -> None:
        """Raise a `ValueError` that names a bad option and an allowed value for it.

        Args:
            prefix: Prefix on the command line, if not ``PREFIX``.
        """
        prefix = self.PREFIX if prefix is None else prefix
        for name, hint in _hints(typing.cast(Any, type(self))).items():
            given = getattr(self, name)
            try:
                value = _conform(hint, given)
            except _Misfit as misfit:
                raise ValueError(
                    f"{name} must be {misfit.words}, got {misfit.value!r:.80}: "
                    f"{self._correction(name, misfit, prefix)}"
                ) from None
            if value is not given:
                object.__setattr__(self, name, value)
            # One that was checked is frozen since, and need not be with every config around it.
            if isinstance(value, Options) and not hasattr(value, "_checked"):
                value.check(value.PREFIX and f"{prefix}{name}.")
        self.check_together(prefix)
        object.__setattr__(self, "_checked", True)

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` if options contradict each other."""

    @classmethod
    def _correction(cls, name: str, misfit: "_Misfit", prefix: str) -> str:
        """The option with an allowed value, as on the command line."""
        hint = _hints(typing.cast(Any, cls))[name]
        meant = nearest(misfit.value, misfit.choices)
        value = meant if meant is not None else _example(cls, name)
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        if tyro.conf.Suppress in marks or isinstance(value, Options):
            return f"{name}={value!r}"
        values = value if isinstance(value, tuple) else (value,)
        if tyro.conf.Positional in marks:
            return " ".join(map(str, values))
        option = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, bool):
            return f"--{option} or --{prefix}no-{name.replace('_', '-')}"
        return " ".join([f"--{option}", *map(str, values)])


OptionsT = TypeVar("OptionsT", bound=Options)


def from_dict(cls: type[OptionsT], values: object) -> OptionsT:
    """A config from parsed JSON.

    Raises:
        ValueError: If a key is not a field of the config, one is missing, or a value is bad.
    """
    config = _unchecked(cls, values)
    config.check()
    return config


def _unchecked(cls: type[OptionsT], values: object) -> OptionsT:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} is an object with named fields, got {values!r:.80}")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    if unknown := sorted(map(str, set(values) - set(fields))):
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(unknown)}: it has {', '.join(fields)}"
        )
    if missing := [n for n, f in fields.items() if n not in values and not _has_default(f)]:
        raise ValueError(f"{cls.__name__} needs the field {', '.join(missing)}, which is not there")
    with deferred_checks():
        return cls(**values)


class _Misfit(Exception):
    """A value that an annotation does not allow.

    Attributes:
        words: The requirement.
        value: The value, or the bad item of it.
        right_type: Whether the type is right and only a rule is broken.
        choices: The texts, of which one was perhaps meant.
    """

    def __init__(
        self, words: str, value: object, right_type: bool = False, choices: Sequence[str] = ()
    ) -> None:
        self.words, self.value, self.right_type, self.choices = words, value, right_type, choices


def _conform(hint: Any, value: Any) -> Any:
    """The value, converted to the type of a field with this annotation."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _conform(parts[0], value)
        for mark in parts[1:]:
            if isinstance(mark, Rule) and not mark.allows(value):
                raise _Misfit(mark.words, value, right_type=True)
            if isinstance(mark, OneOf):
                _one_of(mark.choices, value)
            if isinstance(mark, _MayBePath):
                value = _at_home(value)
        return value
    if origin in (types.UnionType, typing.Union):
        return _conform_to_any(parts, value)
    if origin is Literal:
        return _one_of(parts, value)
    if origin is tuple:
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise _Misfit("several values", value)
        return tuple(_conform(parts[0], item) for item in value)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _unchecked(typing.cast(Any, hint), value)
        if not isinstance(value, typing.cast(Any, hint)):
            raise _Misfit(f"a {typing.cast(Any, hint).__name__}", value)
        return value
    return _PLAIN[hint](value)


def _conform_to_any(hints: Sequence[Any], value: Any) -> Any:
    if value is None and types.NoneType in hints:
        return None
    configs = [hint for hint in hints if dataclasses.is_dataclass(hint)]
    if configs and isinstance(value, dict):
        return _unchecked(_tagged_like(configs, value), value)
    misfits = []
    for hint in hints:
        try:
            return _conform(hint, value)
        except _Misfit as misfit:
            misfits.append(misfit)
    for found in misfits:
        if found.right_type:
            raise found
    words = " or ".join(found.words for found in misfits)
    raise _Misfit(words, value, choices=[text for found in misfits for text in found.choices])


def _tagged_like(configs: Sequence[Any], values: dict[str, Any]) -> type[Options]:
    """The config of a union whose tag (its first field) is in the values."""
    for config in configs:
        tag = dataclasses.fields(config)[0]
        if values.get(tag.name) == tag.default:
            return typing.cast(type[Options], config)
    names = ", ".join(config.__name__ for config in configs)
    raise ValueError(f"none of {names} is tagged like {values!r:.80}")


def _one_of(choices: Sequence[str], value: Any) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise _Misfit(f"one of {', '.join(map(str, choices))}", value, choices=choices)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Misfit("True or False", value)
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _Misfit("an integer", value)
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise _Misfit("an integer of 64 bits", value, right_type=True)
    return number


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _Misfit("a number", value)
    number = _int(value) if isinstance(value, Integral) else float(value)
    if not abs(number) <= _LARGEST:
        raise _Misfit("finite in 32 bits", value, right_type=True)
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Misfit("text", value)
    if not value.strip() or "\0" in value:
        raise _Misfit("text that is not empty", value, right_type=True)
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise _Misfit("a path", value)
    return Path(_at_home(_text(os.fspath(value))))


def _at_home(text: str) -> str:
    """The text with ``~`` expanded, which a shell leaves alone in ``--output-dir=~/runs``."""
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        raise _Misfit(
            f"a path: no user {text[1:].partition(os.sep)[0]!r} has a home here, and a name that "
            f"begins with ~ is written ./{text}",
            text,
            right_type=True,
        )
    return expanded


def _none(value: Any) -> None:
    if value is not None:
        raise _Misfit("None", value)


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _text,
    Path: _path,
    types.NoneType: _none,
}


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _example(cls: Any, name: str) -> Any:
    """An allowed value of the option."""
    for mark in typing.get_args(_hints(cls)[name])[1:]:
        if isinstance(mark, Example):
            return mark.value
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "..."


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing
