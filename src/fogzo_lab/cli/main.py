"""The entry point: how every command starts and ends.

It imports nothing slow before its signal handlers are in place.
"""

import atexit
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import NoReturn

from fogzo_lab.system import signals


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    No error of a user or a system ends in a traceback. The exit code is 2 on an error of the user
    or the data and, as in shells, 130 after Ctrl-C, 143 after SIGTERM and 141 if the reader of the
    output is gone.
    """
    with signals.ending_at_once("fogzo: interrupted"):
        commands = _import_commands()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    try:
        with signals.raised():
            commands.run(sys.argv[1:] if arguments is None else arguments)
            print(end="", flush=True)  # to flush may raise too
    except KeyboardInterrupt as error:
        _end(130, error, "interrupted")
    except signals.Terminated as error:
        _end(error.code, error, f"ended by {error.name}")
    except BrokenPipeError as error:
        # The interpreter would try to write it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(141, error)


def _import_commands() -> ModuleType:
    try:
        from fogzo_lab.cli import commands
    except ImportError as error:
        sys.exit(f"fogzo: the commands need {error.name}: pip install 'fogzo[lab]'")
    return commands


def _end(code: int, error: BaseException, said: str = "") -> NoReturn:
    """Exit with a line of a message and of the notes that were added to the error."""
    atexit.register(signals.ignore)  # another one would find the interpreter half shut down
    if said:
        with suppress(OSError):  # the terminal itself may be gone
            print(f"fogzo: {'; '.join([said, *getattr(error, '__notes__', [])])}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
