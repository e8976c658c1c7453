"""The entry point: how every command begins and ends, whatever happens to it.

It imports nothing that takes time before it has seen to signals.
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

    Nothing that a user or a system does ends in a traceback. The exit code is 2 on an error of the
    user's or the data's, and as shells have it 130 after Ctrl-C, 143 after SIGTERM, 141 where
    nobody reads the output any more.
    """
    with signals.ending_at_once("fogzo: interrupted"):
        commands = _import_commands()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show ends nothing
    try:
        with signals.raised():
            commands.run(sys.argv[1:] if arguments is None else arguments)
            print(end="", flush=True)  # what is still buffered may also find nobody
    except KeyboardInterrupt as error:
        _end(130, error, "interrupted")
    except signals.Terminated as error:
        _end(error.code, error, f"ended by {error.name}")
    except BrokenPipeError as error:
        # The interpreter would try again to write it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(141, error)


def _import_commands() -> ModuleType:
    try:
        from fogzo_lab.cli import commands
    except ImportError as error:
        sys.exit(f"fogzo: the commands need {error.name}: pip install 'fogzo[lab]'")
    return commands


def _end(code: int, error: BaseException, said: str = "") -> NoReturn:
    """Exit, with a line of what is said and of the notes that were added to the error."""
    atexit.register(signals.ignore)  # a second one would find the interpreter half shut down
    if said:
        with suppress(OSError):  # the terminal may be what has gone
            print(f"fogzo: {'; '.join([said, *getattr(error, '__notes__', [])])}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
