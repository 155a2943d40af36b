"""One process at a time in a run folder: a lock on a file in it, which the system lets go of even if the process is killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from recipes.common.errors import UserError

NAME = ".lock"  # in the run folder; holds the pid


def take(folder: Path) -> IO[str]:
    """Hold the folder; gives what `release` takes. Raises UserError if another process holds it."""
    import fcntl

    file = open(folder / NAME, "a+")  # noqa: SIM115  # open as long as it is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"another process (pid {holder or 'unknown'}) is running in {folder}: wait until it has ended, or choose another "
            "--run.name"
        ) from None
    except OSError:  # a file system without locks, where two runs in one folder are not found out
        pass
    if not _lies_there(file):  # its holder removed it while it ended, and another may have made a new one
        file.close()
        return take(folder)
    os.register_at_fork(after_in_child=file.close)  # a worker that outlives a killed run must not hold its folder
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def release(lock: IO[str]) -> None:
    """Let others have the folder, which may have been removed or renamed meanwhile."""
    if _lies_there(lock):
        Path(lock.name).unlink()
    lock.close()


def _lies_there(lock: IO[str]) -> bool:
    """Whether an open lock file is still the one in the folder."""
    path = Path(lock.name)
    return path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno()))
