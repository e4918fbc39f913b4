"""What may befall a training process, and how it is done to a real one.

A `Fault` is a kind and a place in the life, both drawn from a seed. Blows (signals, a limit on file sizes) are dealt
from outside at a moment that the run's folder shows: the start, a step, a save that has begun, the end. A failing disk
comes from within: a small library, compiled from faults.c and preloaded, miscounts nothing and strikes at the k-th
call. Without a C compiler, or not on Linux, the kinds that need it are left out and the limit stands for a full disk.
"""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from nanochat.chaos.lives import Life, Watch
from nanochat.chaos.verify import Lost

SHIM_SOURCE = Path(__file__).with_suffix(".c")
POLL_S = 0.0005
MAX_LIFE_S = 240.0  # far more than any life needs: past it the run hangs
GRACE_S = 60.0  # to leave after a blow, and for ranks to notice that one is gone


def build_shim(folder: Path) -> Path | None:
    """Compile the library that makes a disk fail; None where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not os.path.isdir("/proc/self/fd"):
        return None
    library = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM_SOURCE), "-ldl", "-pthread"]
    return library if subprocess.run(command, capture_output=True).returncode == 0 else None


# Faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """blow: what is done from outside to a life. shim: (calls, does) of faults.c instead. codes: exit codes that a
    process struck by it may leave with; None: any. num_ranks: how many ranks it takes."""

    name: str
    blow: Callable[[Life, "Fault"], None] | None = None
    shim: tuple[str, str] | None = None
    events: tuple[str, ...] = ("start", "step", "step", "end")
    codes: frozenset[int] | None = None
    num_ranks: int = 1
    ends_all: bool = True  # the whole life ends by it; False: it may go on


@dataclass(frozen=True)
class Fault:
    """place, delay: in [0, 1), where in the life and how long after the event; see `is_due` and `shim_variables`."""

    kind: Kind
    event: str
    place: float
    delay: float
    struck: list[str] = field(default_factory=list, compare=False)  # where it truly struck, for people

    def __str__(self) -> str:
        where = f"{self.kind.shim[0]} call" if self.kind.shim else self.event
        told = self.struck[0] if self.struck else "not reached"
        return f"{self.kind.name} at {where} {self.place:.2f} ({told})"


def kill_group(life: Life, fault: Fault) -> None:
    life.send_to_group(signal.SIGKILL)
    life.end()


def kill_rank(life: Life, fault: Fault) -> None:
    """One rank dies; torchrun and the others have to notice by themselves."""
    ranks = life.ranks()
    if ranks:
        with suppress(ProcessLookupError):
            os.kill(ranks[int(fault.place * 1000) % len(ranks)], signal.SIGKILL)


def kill_launcher(life: Life, fault: Fault) -> None:
    """torchrun alone is killed; its ranks have to end by themselves."""
    life.send(signal.SIGKILL)


def terminate(life: Life, fault: Fault) -> None:
    life.send(signal.SIGTERM)


def interrupt(life: Life, fault: Fault) -> None:
    life.send_to_group(signal.SIGINT)


def limit_files(life: Life, fault: Fault) -> None:
    """No file grows past a limit, without a shim: the kernel writes a part, then refuses (EFBIG)."""
    import resource

    if hasattr(resource, "prlimit"):
        size = int(512 + fault.delay * 80_000)
        with suppress(ProcessLookupError):
            resource.prlimit(life.process.pid, resource.RLIMIT_FSIZE, (size, size))


KILLED, REFUSED = frozenset({-9, 0}), frozenset({0, 2})
TERMINATED, INTERRUPTED = frozenset({0, 143, -15}), frozenset({0, 130, -2})

KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill", kill_group, codes=KILLED),
        Kind("kill-in-save", kill_group, events=("save",), codes=KILLED),
        Kind("kill-at-call", shim=("any", "kill"), codes=KILLED),
        Kind("full-disk", shim=("write", "full"), codes=REFUSED),
        Kind("short-write", shim=("write", "short"), codes=REFUSED),
        Kind("partial-write", shim=("write", "part"), codes=frozenset({0}), ends_all=False),
        Kind("sync-error", shim=("sync", "error"), codes=REFUSED),
        Kind("rename-error", shim=("rename", "error"), codes=REFUSED),
        Kind("file-size-limit", limit_files, events=("step",), codes=REFUSED, ends_all=False),
        Kind("sigterm", terminate, codes=TERMINATED),
        Kind("sigint", interrupt, codes=INTERRUPTED),
        Kind("kill-all-ranks", kill_group, events=("step", "save"), num_ranks=2),
        Kind("kill-one-rank", kill_rank, events=("step", "save"), num_ranks=2),
        Kind("kill-launcher", kill_launcher, events=("step", "save"), num_ranks=2),
        Kind("sigterm-ranks", terminate, events=("step",), num_ranks=2),
    )
}


@dataclass(frozen=True)
class Course:
    """What an undisturbed life of the same command is like."""

    num_steps: int
    startup_s: float
    calls: Mapping[str, int]  # write, sync, rename, any -> how often; empty without the shim

    def shim_variables(self, fault: Fault, start: int, shim: Path, folder: Path, log: Path) -> list[str]:
        """Environment for a life that begins at step `start`; its number of calls is about proportional."""
        assert fault.kind.shim is not None
        calls, does = fault.kind.shim
        expected = self.calls[calls] * (self.num_steps - start) / self.num_steps
        return shim_environment(shim, folder, log, calls, 1 + int(fault.place * expected), does)

    def due_s(self, fault: Fault, watch: Watch, start: int, lived_s: float) -> float | None:
        """Seconds to wait before the blow, once its event is there; else None."""
        left = self.num_steps - start
        if fault.event == "start":
            return 0.0 if lived_s >= fault.place * self.startup_s else None
        if fault.event == "step":
            return 0.02 * fault.delay if watch.records > start + int(fault.place * left) else None
        if fault.event == "save":
            return 0.008 * fault.delay if watch.saves_begun > int(fault.place * min(4, left // 3)) else None
        return 0.3 * fault.delay if watch.newest == self.num_steps else None


def shim_environment(shim: Path, folder: Path, log: Path, calls: str, at: int, does: str) -> list[str]:
    """Words for `env`. folder: real path below which calls count."""
    return [
        f"LD_PRELOAD={shim}",
        f"FAULT_FOLDER={folder}",
        f"FAULT_LOG={log}",
        f"FAULT_CALLS={calls}",
        f"FAULT_AT={at}",
        f"FAULT_DOES={does}",
    ]


def read_counts(log: Path) -> dict[str, int]:
    """Calls of a life that was only counted, by kind; `any` is their sum."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    counts = {words[1]: int(words[2]) for line in lines if (words := line.split())[0] == "count"}
    return {**counts, "any": sum(counts.values())} if counts else {}


# Dealing them ----------------------------------------------------------------------------------------------------


class Abandoned(Exception):
    """Everything is to end."""


class Supervision:
    """Watches a life to its end, and deals it the blow when that is due. stop: set when everything is to end."""

    def __init__(
        self,
        life: Life,
        watch: Watch,
        stop: threading.Event,
        fault: Fault | None = None,
        course: Course | None = None,
        start: int = 0,
    ) -> None:
        self.life, self.watch, self.stop, self.course, self.start = life, watch, stop, course, start
        self.fault = fault if fault and fault.kind.blow else None
        self.startup_s = 0.0  # until the first record
        self.was_in_training = True  # when the blow fell; before that Python itself decides how a process leaves
        self._began = monotonic()
        self._deadline = self._began + MAX_LIFE_S
        self._due: float | None = None

    def until_it_ends(self) -> int:
        """The exit code. Raises Lost where the life does not end, or leaves processes behind."""
        try:
            while self.life.process.poll() is None:
                self._look()
                sleep(POLL_S if self.watch.records else 10 * POLL_S)
            if not self.life.wait_until_all_are_gone(GRACE_S):
                raise Lost("hangs", f"processes were left {GRACE_S:.0f} s after the command's end")
        finally:
            self.life.end()
        return int(self.life.process.returncode)

    def _look(self) -> None:
        self.watch.look()
        lived_s = monotonic() - self._began
        if self.stop.is_set():
            raise Abandoned
        if monotonic() > self._deadline:
            raise Lost("hangs", f"still there after {lived_s:.0f} s")
        if self.watch.records and not self.startup_s:
            self.startup_s = lived_s
        if self.fault and self.course:
            self._deal(self.fault, self.course, lived_s)

    def _deal(self, fault: Fault, course: Course, lived_s: float) -> None:
        if self._due is None:
            wait_s = course.due_s(fault, self.watch, self.start, lived_s)
            self._due = None if wait_s is None else lived_s + wait_s
        if self._due is not None and lived_s >= self._due:
            assert fault.kind.blow is not None
            fault.struck.append(f"{lived_s:.1f} s, {self.watch.records} records")
            self.was_in_training = self.watch.records > 0
            fault.kind.blow(self.life, fault)
            self.fault = None
            if fault.kind.ends_all:
                self._deadline = monotonic() + GRACE_S
