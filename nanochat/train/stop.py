"""Being asked to stop: SIGTERM (a scheduler, a service manager, torchrun) and SIGINT (Ctrl-C) lose nothing.

The signal is only noted; the loop ends at the next step, after a checkpoint. What has not ended within the grace time
is given up: then the last checkpoint stands. The exit code is the shell's for that signal, 143 or 130. A second Ctrl-C
stops at once; other signals after the first change nothing, because torchrun passes on what the terminal sent already.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from nanochat.common import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Watches for signals. received: the number of the first one, or 0; only the handler writes it.

    grace_s: seconds until the process ends in any case; None: does not watch.
    """

    def __init__(self, grace_s: float | None, is_main: bool = True) -> None:
        self.received = 0
        self.grace_s, self._is_main = grace_s, is_main
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._asked, self._done = threading.Event(), threading.Event()

    @property
    def is_watching(self) -> bool:
        return self.grace_s is not None

    def watch(self) -> None:
        """From now on note signals, in the main thread."""
        if self.is_watching and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            # Started here, because a handler that starts a thread can meet a lock that this very thread holds.
            threading.Thread(target=self._count_down, name="grace", daemon=True).start()

    def release(self) -> None:
        """Leave signals as they were."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._done.set()
        self._asked.set()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received = number
            self._say(f"{signal.Signals(number).name}: ending after this step (at most {self.grace_s:g} s)")
            self._asked.set()

    def _count_down(self) -> None:
        self._asked.wait()
        if not self._done.wait(self.grace_s):
            self._say(
                f"error: not done {self.grace_s:g} s after {signal.Signals(self.received).name}, so the run ends here; "
                "the newest checkpoint stands, go on from it with --resume=auto"
            )
            os._exit(128 + self.received)

    def _say(self, text: str) -> None:
        if self._is_main:
            os.write(2, f"\n{text}\n".encode())  # a handler must not touch buffered streams


def stopped(number: int, step: int) -> Stopped:
    """What a recipe ends with that a signal has stopped before `step`."""
    name = signal.Signals(number).name
    saved = f"at step {step}, all is saved; go on with --resume=auto" if step else "before the first step"
    return Stopped(128 + number, f"stopped by {name} {saved}")
