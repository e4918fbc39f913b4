"""What the user types, pastes or pipes in, message by message.

A message is a line. A backslash at its end continues it on the next line, and between two lines of three quotes
everything is one message. On a terminal, readline edits the line (arrows, Ctrl-R, the keys of ~/.inputrc), recalls the
messages of earlier days, and takes pasted text as one message, line breaks and all, where the terminal marks it
(bracketed paste). Without a terminal there are plain lines, and nothing is remembered.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write, printable

PROMPT, MORE = "you: ", "...: "
QUOTES = '"""'
MAX_ENTRIES = 1000  # messages that are remembered, the newest
MAX_ENTRY_CHARS = 10_000  # a longer message is not

ReadLine = Callable[[str], str]


def read_message(read_line: ReadLine) -> str:
    """The next message; "" for one of several lines that Ctrl-C broke off.

    Raises EOFError at the end of input, and KeyboardInterrupt, only where no message was begun.
    """
    first = read_line(PROMPT)
    try:
        return "\n".join(_lines(first, read_line))
    except KeyboardInterrupt:
        print()
        return ""


def _lines(first: str, read_line: ReadLine) -> list[str]:
    """The lines of the message that begins with `first`. The end of input ends it too."""
    further = _further(read_line)
    if first.strip() == QUOTES:
        return list(takewhile(lambda line: line.strip() != QUOTES, further))
    lines = [first]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(next(further, ""))
    return lines


def _further(read_line: ReadLine) -> Iterator[str]:
    with suppress(EOFError):
        while True:
            yield read_line(MORE)


class Editor:
    """Line editing, and a history that outlives the process."""

    def __init__(self, readline: Any, path: Path, words: Sequence[str]) -> None:
        """readline: the module. words: what Tab completes at the beginning of a line."""
        self._readline, self._history, self._words = readline, History(path), words
        readline.set_auto_history(False)  # its entries are lines, ours are messages
        readline.parse_and_bind("set enable-bracketed-paste on")  # Python's module turns it off
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")
        for message in self._history.messages:
            self._recall_later(message)

    def remember(self, message: str) -> None:
        if message not in self._history.messages[-1:]:
            self._recall_later(message)
            self._history.add(message)

    def _recall_later(self, message: str) -> None:
        with suppress(ValueError):  # a character that this terminal's locale does not have
            self._readline.add_history(message)

    def _complete(self, begun: str, number: int) -> str | None:
        at_start = self._readline.get_begidx() == 0
        found = [word for word in self._words if word.startswith(begun)] if at_start and begun else []
        return f"{found[number]} " if number < len(found) else None


def open_editor(path: Path, words: Sequence[str] = ()) -> Editor | None:
    """The editor of this process's terminal; None without a terminal or without readline."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        import readline
    except ImportError:  # a Python that was built without it
        return None
    return Editor(readline, path, words)


class History:
    """Messages in a file that only its owner may read: a JSON string on each line, so that a message may have several.

    Each message is added when it is sent, so that nothing is lost if the process is killed, and two conversations at
    the same time both add theirs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_saved = True
        lines: list[str] = []
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        self.messages = [text for line in lines if (text := _entry(line))][-MAX_ENTRIES:]
        if len(lines) > MAX_ENTRIES:
            self._try(self._rewrite)

    def add(self, message: str) -> None:
        if self._is_saved and len(message) <= MAX_ENTRY_CHARS:
            self.messages.append(message)
            self._try(self._append)

    def _append(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(handle, "a", encoding="utf-8") as file:
            os.fchmod(handle, 0o600)
            file.write(json.dumps(self.messages[-1]) + "\n")

    def _rewrite(self) -> None:
        with atomic_write(self._path) as path:
            path.touch(mode=0o600)
            path.write_text("".join(json.dumps(message) + "\n" for message in self.messages), encoding="utf-8")

    def _try(self, write: Callable[[], None]) -> None:
        """Write, or say once that nothing is saved from now on."""
        try:
            write()
        except (OSError, UserError) as error:
            self._is_saved = False
            print(f"note: messages are not remembered: {printable(str(error))}", file=sys.stderr)


def _entry(line: str) -> str | None:
    """The message of a line of the file; None for a line that is none of ours."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, str) else None
