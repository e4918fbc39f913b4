"""Who is writing a run: a lock that lasts exactly as long as its process.

    lock = hold(folder)        # a training, for as long as it lives; UserError if another process has it

The lock is an `flock` on a hidden file beside the run's folder, `<base>/checkpoints/<source>/.<tag>.lock`, so it covers
the run wherever its files are for now (`.<tag>.new` before the first checkpoint). The kernel frees it when the process
ends, however it ends: no crash leaves a run locked. What the file says, the process's id, is for messages only.
"""

import errno
import fcntl
import os
import re
import time
import weakref
from contextlib import suppress
from pathlib import Path

from nanochat.common import UserError

CANNOT_LOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems
ATTEMPTS = 10


class RunLock:
    """A held lock; freed by `release`, when nobody refers to it any more, and when the process ends."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.release = weakref.finalize(self, os.close, handle)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def discard(self) -> None:
        """Remove the file, then let go: whoever waits for it sees that it is gone, and makes a new one."""
        self.path.unlink(missing_ok=True)
        self.release()


def lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def hold(folder: Path) -> RunLock:
    """Take the lock of a run. Raises UserError if a live process has it, this one included.

    On a file system that has no locks the run is not protected, and trains all the same.
    """
    path = lock_path(folder)
    for attempt in range(ATTEMPTS):
        handle = _open(path)
        lock = RunLock(path, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.release()
            time.sleep(0 if attempt == ATTEMPTS - 1 else 0.05)  # `writer` of another process takes it for a moment
            continue
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise UserError(f"{path}: cannot be locked ({error.strerror})") from error
            return lock
        if _is_at(path, handle):
            with suppress(OSError):  # on a full disk the lock holds as well, only its message knows less
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
            return lock
        lock.release()  # its file was removed between our opening and our locking it
    raise UserError(
        f"{folder}: process {writer(folder) or 'unknown'} is writing this run; wait until it ends, or stop it"
    )


def writer(folder: Path) -> int | None:
    """The process that holds a run's lock, or None. 0 is one that has not yet written who it is."""
    try:
        handle = os.open(lock_path(folder), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        said = re.match(rb"[0-9]{1,9}\n", os.read(handle, 20))
        return int(said[0]) if said else 0
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); choose another NANOCHAT_BASE_DIR") from error


def _is_at(path: Path, handle: int) -> bool:
    """Whether the open file is still the one that bears the name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False
