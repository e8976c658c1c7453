"""A lock that lets one process at a time use a folder."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from filelock import FileLock, Timeout

_NAME = ".lock"


@contextmanager
def locked(folder: Path, work: str = "training") -> Iterator[None]:
    """Lock a folder, which is created if necessary; the lock ends with the process.

    Created folders are removed again if the block fails before it has written anything.

    Args:
        folder: The folder.
        work: Name of the work in the error.

    Raises:
        ValueError: If another process uses the folder, or it cannot be made or locked.
    """
    lock = FileLock(folder / _NAME)
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        before = set(os.listdir(folder))
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another process is at work in {folder}: wait for it to end, or give this {work} "
            f"--output-dir {quote(f'{folder}-2')}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made, written to or locked ({error.strerror}), and this {work} "
            "needs a folder of its own: give one on a disk of this machine, such as "
            "--output-dir runs/new"
        ) from error
    try:
        yield
    except BaseException:
        if set(os.listdir(folder)) == before | {_NAME} and _NAME not in before:
            (folder / _NAME).unlink()
            with contextlib.suppress(OSError):  # another process has written there
                for path in made:
                    path.rmdir()
        raise
    finally:
        lock.release()
