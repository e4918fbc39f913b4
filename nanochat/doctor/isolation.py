"""Checks in processes of their own: one that crashes, hangs or is killed is a finding and not the end of the doctor.

Each check is `python -m nanochat.doctor NAME`, which prints its result as the last line. A check that takes too long is
stopped with all that it has started, also what has left its process group, as torchrun's ranks do. Two run side by
side, except those that measure: they run alone.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO

from nanochat.common import printable
from nanochat.doctor.checks import Check
from nanochat.doctor.result import Request, Result
from nanochat.sandbox.processes import kill_tree

MARK = "RESULT "
SIDE_BY_SIDE = 2
POLL_S = 0.02


@dataclass(frozen=True)
class Finding:
    """A check, what came of it, and how long it took."""

    check: Check
    result: Result
    seconds: float

    @property
    def prevents_training(self) -> bool:
        return self.check.needed and self.result.state in ("missing", "failed")


def examine(checks: Sequence[Check], request: Request, limit_s: float = float("inf")) -> Iterator[Finding]:
    """Run checks and yield what each found, in their order, as soon as it is known. limit_s: for each, if it has no
    stricter one of its own."""
    waiting, running = deque(checks), list[Child]()
    findings: dict[str, Finding] = {}
    told = deque(checks)
    try:
        while told:
            while waiting and has_room(waiting[0], [child.check for child in running]):
                running.append(Child(waiting.popleft(), request, limit_s))
            time.sleep(POLL_S)
            for child in [child for child in running if child.is_over()]:
                running.remove(child)
                findings[child.check.name] = child.finding()
            while told and told[0].name in findings:
                yield findings[told.popleft().name]
    finally:
        for child in running:
            child.stop()


def has_room(check: Check, running: Sequence[Check]) -> bool:
    """Whether a check may start beside those that run."""
    return not running or (len(running) < SIDE_BY_SIDE and not any(c.alone for c in (check, *running)))


class Child:
    """A check that runs. Its output goes to files: a pipe could be held open by what the check has started."""

    def __init__(self, check: Check, request: Request, limit_s: float) -> None:
        self.check, self._limit_s = check, min(limit_s, check.limit_s)
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - `_lines` closes
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __package__, check.name, json.dumps(asdict(request)), str(self._limit_s)],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )

    def is_over(self) -> bool:
        return self._process.poll() is not None or time.perf_counter() - self._began > self._limit_s

    def finding(self) -> Finding:
        """What a check that is over has found."""
        code, seconds = self._process.poll(), time.perf_counter() - self._began
        self.stop()
        lines = [self._lines(file) for file in (self._out, self._err)]
        return Finding(self.check, self._result(code, *lines), seconds)

    def stop(self) -> None:
        """End the check and all that it has started."""
        if self._process.poll() is None:
            kill_tree(self._process.pid)
        with suppress(ProcessLookupError, PermissionError):  # macOS: nobody is left in the group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _lines(self, file: IO[bytes]) -> list[str]:
        file.seek(0)
        lines = file.read().decode(errors="replace").splitlines()
        file.close()
        return [printable(line) for line in lines if line.strip()]

    def _result(self, code: int | None, out: list[str], err: list[str]) -> Result:
        if code == 0 and out and out[-1].startswith(MARK):
            return Result(**json.loads(out[-1].removeprefix(MARK)))
        advice = f"see all that it says: python -m {__package__} {self.check.name}"
        if code is None:
            return Result("failed", f"no answer within {self._limit_s:g} s, so it was stopped", advice)
        if code < 0:
            memory = ", as Linux does when memory runs out" if -code == signal.SIGKILL else ""
            return Result("failed", f"its process was ended by {signal.Signals(-code).name}{memory}", advice)
        return Result("failed", f"{err[-1] if err else f'it left with code {code}'}"[:300], advice)
