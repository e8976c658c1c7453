"""One process at a time works in a folder."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_NAME = ".lock"


@contextmanager
def locked(folder: Path, work: str = "training") -> Iterator[None]:
    """Keep others out of a folder, which is made if need be; the lock ends with the process.

    What was made is gone again if the block fails before it has written anything.

    Args:
        folder: The folder.
        work: What is done there, for the error.

    Raises:
        ValueError: If another process is at work there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    before = set(os.listdir(folder))
    lock = FileLock(folder / _NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another process is at work in {folder}: wait for it to end, or give this {work} "
            f"--output-dir {folder}-2"
        ) from error
    try:
        yield
    except BaseException:
        if set(os.listdir(folder)) == before | {_NAME} and _NAME not in before:
            (folder / _NAME).unlink()
            with contextlib.suppress(OSError):  # somebody else has written there
                for path in made:
                    path.rmdir()
        raise
    finally:
        lock.release()
