"""Being asked to stop: SIGTERM (a scheduler, a service manager, torchrun) and SIGINT (Ctrl-C) lose nothing.

The signal is only noted; the loop ends at the next step, after a checkpoint. A step that does not end within the grace
time is given up: then the last checkpoint stands. The exit code is the shell's for that signal, 143 or 130. A second
Ctrl-C stops at once. A second SIGTERM changes nothing: torchrun sends its own after the terminal's Ctrl-C.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from nanochat.common import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Watches for signals. signal: the number of the first one, or 0.

    grace_s: seconds until the process ends in any case; None: does not watch.
    """

    def __init__(self, grace_s: float | None, is_main: bool = True) -> None:
        self.signal = 0
        self.grace_s, self._is_main = grace_s, is_main
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    @property
    def is_watching(self) -> bool:
        return self.grace_s is not None

    def watch(self) -> None:
        """From now on note signals, in the main thread."""
        if self.is_watching and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def release(self) -> None:
        """Leave signals as they were. Not called on errors: the process is going down, and shall first tell why."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def stopped(self, step: int) -> Stopped:
        """What the recipe ends with after a stop before `step`."""
        name = signal.Signals(self.signal).name
        saved = f"at step {step}, all is saved; go on with --resume=auto" if step else "before the first step"
        return Stopped(128 + self.signal, f"stopped by {name} {saved}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal or self.grace_s is None:
            return
        self.signal = number
        self._say(f"{signal.Signals(number).name}: ending after this step (at most {self.grace_s:g} s)")
        self._timer = threading.Timer(self.grace_s, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        self._say(
            f"error: the step did not end within {self.grace_s:g} s of {signal.Signals(self.signal).name}; not saved: "
            "the last checkpoint stands, go on from it with --resume=auto"
        )
        os._exit(128 + self.signal)

    def _say(self, text: str) -> None:
        if self._is_main:
            os.write(2, f"\n{text}\n".encode())  # a handler must not touch buffered streams
