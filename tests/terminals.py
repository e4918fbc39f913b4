"""A program in a terminal of its own (a pseudo-terminal), and somebody who types and looks."""

import fcntl
import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from visiting import state

CTRL_C, CTRL_D, LEFT, UP, BACKSPACE, TAB, ENTER = "\x03", "\x04", "\x1b[D", "\x1b[A", "\x7f", "\t", "\r"


def pasted(text: str) -> str:
    """What a terminal sends for a text from the clipboard (bracketed paste)."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """Runs a command until the block ends; `see` waits for what it shows."""

    def __init__(self, command: Sequence[str], cwd: Path, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\x00\x50\x00\x00\x00\x00\x00")  # 40 lines of 80
        surroundings = {**os.environ, "TERM": "xterm", "INPUTRC": os.devnull, "LC_ALL": "C.UTF-8", **environment}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=surroundings,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = b""
        self._seen = 0  # how much of it

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, *keys: str) -> None:
        for key in keys:
            os.write(self._ours, key.encode(errors="surrogateescape"))

    def interrupt(self) -> None:
        """Press Ctrl-C, once the program waits for a key: Python's readline misses a signal just before that."""
        while state(self.process.pid) != "S":
            time.sleep(0.01)
        self.type(CTRL_C)

    def see(self, text: str) -> str:
        """Wait until this is shown, after what was seen before; returns what was shown until then."""
        deadline = time.monotonic() + 60
        while (at := self.shown.find(text.encode(), self._seen)) < 0:
            assert time.monotonic() < deadline, f"never seen: {text!r}; shown: {self.shown[self._seen :]!r}"
            assert self._read(), f"it ended without {text!r}; shown: {self.shown[self._seen :]!r}"
        before = self.shown[self._seen : at]
        self._seen = at + len(text.encode())
        return before.decode(errors="replace")

    def leave_code(self) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + 60
        while self._read():
            assert time.monotonic() < deadline, f"it never ended; shown: {self.shown[self._seen :]!r}"
        return self.process.wait(timeout=60)

    def _read(self) -> bool:
        """Take what comes within a second; False at the end."""
        if not select.select([self._ours], [], [], 1)[0]:
            return self.process.poll() is None
        try:
            new = os.read(self._ours, 65536)
        except OSError:  # nobody holds the other side any more
            return False
        self.shown += new
        return bool(new)
