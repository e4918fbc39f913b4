"""Training processes as seen and ended from outside.

A `Life` is one start of a recipe: a process group of its own, or under torchrun several, since every rank leads one.
All of them carry a mark in their environment, so that what belongs to a life is found by that mark and by nothing else.
A `Watch` is what the run's folder shows of it.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "FAULT_LIFE"  # the environment variable that every process of a life carries


class Life:
    """One start of a command; with `ranks` > 1 it is torchrun that is started."""

    def __init__(self, command: Sequence[str], folder: Path, mark: str, log: Path) -> None:
        self.mark, self.log = f"{MARK}={mark}", log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ["env", self.mark, *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def members(self) -> dict[int, dict[str, str]]:
        """Process id -> environment, of all that are alive and bear the mark."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            environment = read_environment(entry)
            if environment.get(MARK) == self.mark.partition("=")[2]:
                found[int(entry.name)] = environment
        return found

    def ranks(self) -> list[int]:
        """Process ids of the training processes, by rank."""
        members = self.members()
        return sorted((pid for pid in members if "RANK" in members[pid]), key=lambda pid: int(members[pid]["RANK"]))

    def send(self, number: signal.Signals) -> None:
        """To the process that was started, as a scheduler does."""
        self.process.send_signal(number)

    def send_to_group(self, number: signal.Signals) -> None:
        """To its process group, as a terminal does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Nothing of this life is left when this returns."""
        self.send_to_group(signal.SIGKILL)
        self.process.wait()
        while members := self.members():
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def wait_until_all_are_gone(self, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while self.process.poll() is None or self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def read_environment(process: Path) -> dict[str, str]:
    """What a process was started with; empty for one that is gone, a zombie, or another user's."""
    try:
        words = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (word.decode(errors="replace").partition("=") for word in words)
    return {name: value for name, _, value in pairs}


@dataclass
class Watch:
    """What a run's folder shows of a life from outside. To be made before that starts: what is there then is an earlier
    life's, and a life writes its records to a file of its own from the beginning. Looking is cheap."""

    folder: Path
    newest: int = -1  # of the checkpoints that bear a name; -1: none
    records: int = 0  # lines of metrics
    saves_begun: int = 0
    _saving: str = ""
    _metrics_bytes: int = -1

    def __post_init__(self) -> None:
        self._places = (self.folder, self.folder.with_name(f".{self.folder.name}.new"))
        metrics = [place / "metrics.jsonl" for place in self._places]
        self._earlier = {_identity(path) for path in metrics if path.is_file()}

    def look(self) -> None:
        for folder in self._places:
            with suppress(OSError):  # it is being renamed
                self._look_at(folder)

    def _look_at(self, folder: Path) -> None:
        names = os.listdir(folder)
        steps = [int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name)]
        if folder == self.folder:
            self.newest = max(steps, default=self.newest)
        if "metrics.jsonl" not in names or _identity(metrics := folder / "metrics.jsonl") in self._earlier:
            return
        if (size := metrics.stat().st_size) != self._metrics_bytes:
            self._metrics_bytes, self.records = size, metrics.read_bytes().count(b"\n")
        saving = next((name for name in names if re.fullmatch(r"\.step_\d+\.tmp", name)), "")
        if saving and saving != self._saving:
            self.saves_begun += 1
        self._saving = saving or self._saving


def _identity(path: Path) -> tuple[int, int]:
    """Of a file as it is now; the number alone is given to a new file once an old one is deleted."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns
