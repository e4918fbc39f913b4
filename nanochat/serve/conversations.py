"""The log of conversations, which is written only where the server was told to: one JSON object a line."""

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.serve.replies import Event, ends_of, parts_of
from nanochat.serve.writing import Delta


class ConversationLog:
    """Appends to a file that only its owner may read; what was written is there when the process dies."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where it cannot be written."""
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)
        except OSError as error:
            raise UserError(f"--log-conversations={path}: cannot be written ({error.strerror or error})") from error
        self._lock = threading.Lock()

    def add(self, model: str, asked: Any, events: Sequence[Event]) -> None:
        """A request, as messages or prompts, and its answers so far."""
        answers = []
        for choice in sorted({event.choice for event in events}):
            deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
            reason = next((finish.reason for finish in ends_of(events) if finish.choice == choice), "cancelled")
            answers.append({"parts": parts_of(deltas), "finish_reason": reason})
        entry = {"time": time.time(), "model": model, "asked": asked, "answers": answers}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        self._file.close()
