"""The caller's side: starts the launcher, reads what comes of it, and sees to it that it ends.

Four pipes come back: the program's two outputs, its report, and the launcher's status. Each is read as it fills, and
only its first bytes are kept, so a program that prints without end fills neither our memory nor the pipe. Between two
reads the clock is compared with the limit of the stage that runs, and the memory of all processes below the launcher
is added up: the kernel limits it for each process, not for all of them together.
"""

import marshal
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from nanochat.common import UserError
from nanochat.sandbox import processes, world
from nanochat.sandbox.locks import CORE_BYTES
from nanochat.sandbox.view import PACKAGE, View, start

LEVELS = ("none", "limits", "landlock", "namespaces")
SETUP_S = 30.0  # for all that comes before the program's first stage, on a machine that is very busy
ENDING_S = 10.0  # for the launcher to end all processes; then it is killed with what is left
POLL_S = 0.05
OWN_MEMORY_BYTES = 2**26  # of the processes that look after the program
STATUS_BYTES, REPORT_BYTES = 2**16, 2**13
CHUNK_BYTES = 2**16
# Little of it, and nothing of ours. Threads would only fight for the processor; sets print in the same order each time.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # each thread's own would take address space, which is limited
    "PYTHONHASHSEED": "0",
    "PYTHONIOENCODING": "utf-8:backslashreplace",
}


@dataclass(frozen=True)
class Limits:
    """What a program may use. Memory and processes: of each process, and together; threads count as processes."""

    seconds: float
    memory_bytes: int
    processes: int = 32
    disk_bytes: int = 2**26
    output_bytes: int = 2**20
    open_files: int = 64

    def of_kernel(self) -> dict[str, int]:
        """Names and numbers as in setrlimit(2)."""
        return {
            "AS": self.memory_bytes,
            "DATA": self.memory_bytes,
            "STACK": min(self.memory_bytes, 2**23),
            "CPU": int(self.seconds) + 2,
            "NPROC": self.processes,
            "FSIZE": self.disk_bytes,
            "NOFILE": self.open_files,
            "CORE": CORE_BYTES,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
            "NICE": 0,
            "RTPRIO": 0,
        }


@dataclass(frozen=True)
class Stage:
    """A program that is started, after the one before has left with 0."""

    name: str
    arguments: Sequence[str]
    limits: Limits

    def listed(self) -> dict[str, object]:
        """For the launcher, which knows only plain values."""
        arguments, limits = list(self.arguments), self.limits.of_kernel()
        return {"name": self.name, "arguments": arguments, "environment": ENVIRONMENT, "limits": limits}


@dataclass
class Outcome:
    """What happened. level: None where no stage began. codes: of the stages that ended, negative for a signal.
    reasons: why stronger levels could not be had."""

    level: str | None = None
    codes: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    timeout: bool = False
    memory_exceeded: bool = False
    stdout: bytes = b""
    stderr: bytes = b""
    report: bytes = b""


@dataclass(frozen=True)
class Program:
    """What is to be run. job: the bytes of the program's file 3. files: what lies in its folder."""

    stages: Sequence[Stage]
    view: View
    job: bytes
    files: dict[str, bytes] = field(default_factory=dict)


def run(program: Program, lowest_level: str, highest_level: str = LEVELS[-1]) -> Outcome:
    """Run a program at the strongest level that can be had; raises UserError where there is none."""
    for level in (lowest_level, highest_level):
        if level not in LEVELS:
            raise UserError(f"level {level!r}: choose one of {', '.join(LEVELS)}")
    levels = LEVELS[LEVELS.index(lowest_level) : LEVELS.index(highest_level) + 1][::-1]
    if not levels:
        raise UserError(f"lowest level {lowest_level!r} is above the highest, {highest_level!r}")
    with tempfile.TemporaryDirectory(prefix="nanochat_sandbox_") as folder, Launched(program, levels, folder) as it:
        outcome = it.wait()
    if outcome.level is None:
        said = outcome.stderr.decode(errors="replace").strip().splitlines()[-1:]  # a launcher that died, or bubblewrap
        why = "; ".join([*outcome.reasons, *said]) or "the launcher died"
        raise UserError(
            f"no sandbox of level {lowest_level!r} or above can be had here ({why}), so the program was not run; "
            "docs/sandbox.md says what each level holds, and how to allow a lower one"
        )
    return outcome


class Launched:
    """A launcher that runs, and what has been read from it. Leaving the block ends it, with all below it."""

    def __init__(self, program: Program, levels: Sequence[str], folder: str) -> None:
        stages = program.stages
        output_bytes = max(stage.limits.output_bytes for stage in stages)
        self._room = {"stdout": output_bytes, "stderr": output_bytes, "report": REPORT_BYTES, "status": STATUS_BYTES}
        self._read = {name: bytearray() for name in self._room}
        self._limits = {stage.name: stage.limits for stage in stages}
        self._outcome, self._num_told = Outcome(), 0
        self._memory_bytes = max(stage.limits.memory_bytes for stage in stages) + OWN_MEMORY_BYTES
        self._deadline, self._next_look = time.monotonic() + SETUP_S, 0.0
        disk_bytes = max(stage.limits.disk_bytes for stage in stages)
        plan = {
            "caller": os.getpid(),
            "levels": list(levels),
            "folder": os.path.realpath(folder),
            "view": program.view.listed(),
            "bubblewrap": program.view.by_bubblewrap(world.WORK, world.DEVICES, disk_bytes, world.USER),
            "disk_bytes": disk_bytes,
            "files": program.files,
            "stages": [stage.listed() for stage in stages],
        }
        self._start(marshal.dumps(plan), program.job)

    def _start(self, plan: bytes, job: bytes) -> None:
        pipes = {name: os.pipe() for name in self._room}
        self._ends = {reading: name for name, (reading, _) in pipes.items()}
        with ExitStack() as theirs:
            inputs = []
            for content in (plan, job):
                file = theirs.enter_context(tempfile.TemporaryFile())
                file.write(content)
                file.seek(0)
                inputs.append(file.fileno())
            for _, writing in pipes.values():
                theirs.callback(os.close, writing)
            files = [inputs[0], pipes["status"][1], inputs[1], pipes["report"][1]]
            self._process = subprocess.Popen(
                [*start(str(PACKAGE.parent), "main"), *map(str, files)],
                stdin=subprocess.DEVNULL,
                stdout=pipes["stdout"][1],
                stderr=pipes["stderr"][1],
                pass_fds=files,
                cwd="/",
                env={},
                start_new_session=True,
            )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for end in self._ends:
            os.close(end)

    def wait(self) -> Outcome:
        """What came of it, at its end or at a limit."""
        with selectors.DefaultSelector() as selector:
            for end in self._ends:
                os.set_blocking(end, False)
                selector.register(end, selectors.EVENT_READ)
            while "status" in {self._ends[key.fd] for key in selector.get_map().values()}:
                for key, _ in selector.select(POLL_S):
                    if not self._read_some(key.fd):
                        selector.unregister(key.fd)
                if self._is_beyond():
                    self._end()
        for end in self._ends:  # the last of it; below level `namespaces` something may have got away and go on writing
            self._read_some(end)
        self._outcome.stdout, self._outcome.stderr = bytes(self._read["stdout"]), bytes(self._read["stderr"])
        self._outcome.report = bytes(self._read["report"])
        return self._outcome

    def _read_some(self, end: int) -> bool:
        """Keep what there is room for; False at the end of the stream."""
        name = self._ends[end]
        with suppress(BlockingIOError):
            chunk = os.read(end, CHUNK_BYTES)
            room = self._room[name] - len(self._read[name])
            self._read[name] += chunk[:room]
            if name == "status":
                self._hear()
            return bool(chunk)
        return True

    def _hear(self) -> None:
        """What the launcher has told since."""
        *lines, _ = self._read["status"].decode(errors="replace").split("\n")
        for line in lines[self._num_told :]:
            word, _, rest = line.partition(" ")
            name, _, told = rest.partition(" ")
            if word == "began":
                self._outcome.level = told
                self._deadline = time.monotonic() + self._limits[name].seconds
            elif word == "ended":
                self._outcome.codes[name] = int(told)
            else:
                self._outcome.reasons.append(f"{name}: {told}")
        self._num_told = len(lines)

    def _is_beyond(self) -> bool:
        """Whether a limit has been passed, for the first time."""
        now, outcome = time.monotonic(), self._outcome
        if outcome.timeout or outcome.memory_exceeded:
            return False
        outcome.timeout = now > self._deadline
        if now > self._next_look:
            self._next_look = now + POLL_S
            outcome.memory_exceeded = processes.memory_bytes(self._process.pid) > self._memory_bytes
        return outcome.timeout or outcome.memory_exceeded

    def _end(self) -> None:
        """Have the launcher end all that it has started; where it does not, do it."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(ENDING_S)
            except subprocess.TimeoutExpired:
                processes.kill_tree(self._process.pid)
                self._process.wait()
