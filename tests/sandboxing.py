"""What the tests of the sandbox share: a planted private folder, victims, and attempts with and without the sandbox.

An attempt is a program that prints ESCAPED when it got what it wanted. Each is run in the sandbox, where it must not,
and as a plain process, where it must: an attempt that fails in any case would prove nothing.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SECRET = "the private text"
MARK = "NANOCHAT_TEST_MARK"


@dataclass
class Host:
    """What there is to be attacked on this machine: files, a process, listeners on 127.0.0.1, an open file."""

    private: Path
    victim: subprocess.Popen
    listener: socket.socket
    datagrams: socket.socket
    open_file: int
    mark: str

    def names(self) -> dict[str, object]:
        """What an attempt is told: it has not to find its target first."""
        return {
            "PRIVATE": str(self.private),
            "SECRET": SECRET,
            "CALLER": os.getpid(),
            "VICTIM": self.victim.pid,
            "PORT": self.listener.getsockname()[1],
            "UDP_PORT": self.datagrams.getsockname()[1],
        }

    def state(self) -> dict[str, object]:
        """All that an attempt could have changed."""
        files = {
            str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted(self.private.rglob("*"))
        }
        return {
            "files": files,
            "victim": self.victim.poll(),
            "connected": has_come(self.listener.accept),
            "datagram": has_come(lambda: self.datagrams.recv(1)),
            "offset": os.lseek(self.open_file, 0, os.SEEK_CUR),
            "survivors": survivors(self.mark),
        }


def has_come(receive) -> bool:
    with suppress(BlockingIOError):
        receive()
        return True
    return False


def survivors(mark: str) -> list[int]:
    """Processes that have this text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@contextmanager
def attacked_host(folder: Path, mark: str) -> Iterator[Host]:
    private = folder / "private"
    (private / "below").mkdir(parents=True)
    for path in (private / "secret.txt", private / "below" / "kept.txt"):
        path.write_text(SECRET, encoding="utf-8")
        path.chmod(0o666)  # nothing but the sandbox protects it
    (private / "script.ld").write_text(f'ASSERT(0, "{SECRET}")', encoding="utf-8")  # a linker would show its text
    for path in (private, private / "below"):
        path.chmod(0o777)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    listener, datagrams = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    open_file = os.open(private / "secret.txt", os.O_RDWR)
    os.set_inheritable(open_file, True)
    try:
        for each in (listener, datagrams):
            each.setblocking(False)
        yield Host(private, victim, listener, datagrams, open_file, mark)
    finally:
        os.close(open_file)
        listener.close()
        datagrams.close()
        victim.kill()
        victim.wait()
