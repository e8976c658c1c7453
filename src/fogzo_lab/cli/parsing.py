"""From arguments to a checked config, in the same way for every command."""

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from fogzo_lab.options import Options, deferred_checks

OptionsT = TypeVar("OptionsT", bound=Options)


def parse(
    cls: type[OptionsT],
    arguments: Sequence[str],
    prog: str,
    description: str | None,
    default: OptionsT | None = None,
) -> OptionsT:
    """The config of the arguments; exits with 2 if they are not valid options.

    Raises:
        ValueError: If the value of an option is not allowed.
    """
    _refuse_empty(arguments)
    given: dict[str, Any] = {} if default is None else {"default": default}
    with deferred_checks():
        config: OptionsT = tyro.cli(
            cls, args=arguments, prog=prog, description=description, **given
        )
    config.check()
    return config


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse empty values, as of unset shell variables: a path would be the current folder."""
    before = "the first argument"
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not argument.strip() or (option.startswith("--") and equals and not value.strip()):
            name = option if option.strip() else before
            raise ValueError(f"{name} has an empty value: give one (is a variable unset?)")
        before = argument
