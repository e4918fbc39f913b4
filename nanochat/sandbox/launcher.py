"""The launcher: a process between the caller and the program.

    caller -> launcher -> first process of the new world -> program

It tries the levels that its plan names, the strongest first. At the level `namespaces` it starts the first process of
a new world, and tells the kernel, from outside, which users there are in it. That process builds the world's files and
starts the program's stages (compile, run), one after the other. When it ends, the kernel kills whatever else is left in
its world. Should the launcher or the caller die, so does it.

Each stage is a process that locks itself in and then becomes the program. It leaves a byte in a pipe just before, so a
level counts as reached only when every one of its locks has closed.

Its status goes to the caller, a line for each thing that the caller has to know. The program cannot write there.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # without its part in Python, which takes a while to load
import fcntl
import marshal
import os
import sys

from nanochat.sandbox import kernel, locks, processes, seccomp, world

TYPE_CHECKING = False  # typing has the same, and takes a while to load
if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = 65534  # who the program is, where root has started it
JOB, REPORT = 3, 4  # the program's open files; 0 is empty, 1 and 2 are for printing
CANNOT_START = 97
IS_LINUX = sys.platform == "linux"


class Launcher:
    """Carries out a plan."""

    def __init__(self, plan: dict, status: int, level: str = "", locked: int = -1) -> None:
        self._plan, self._status = plan, status
        self._level, self._locked = level, locked
        self._is_root = is_root()

    def tell(self, *words: object) -> None:
        """A line for the caller."""
        os.write(self._status, (" ".join(map(str, words)) + "\n").encode())

    def run(self) -> None:
        """Run the program at the first level that can be had."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a world's first process gets no signal that it does not handle
        if IS_LINUX:
            locks.adopt_orphans()
            write("/proc/self/oom_score_adj", "1000")  # when memory runs out, the kernel ends us and not a training run
        for level, start in self._ways():
            self._level = level
            locked, self._locked = os.pipe()
            try:
                self._wait(start())
            except OSError as error:
                self.tell("cannot", self._level, error)
            os.close(self._locked)
            if os.read(locked, 1):
                break

    def _ways(self) -> list:
        """Levels with what starts the first process of each, the strongest first. Bubblewrap may have rights that we
        have not; where root has them, it would run the program as root."""
        ways: list = []
        for level in self._plan["levels"]:
            if level == "namespaces":
                ways += [(level, self._start_world)]
                ways += [(level, self._start_bubblewrap)] if self._plan["bubblewrap"] and not self._is_root else []
            else:
                ways += [(level, lambda: self._start(self._enter_folder))]
        return ways

    # The first process -------------------------------------------------------------------------------------------

    def _start_world(self) -> int:
        """The first process of a world of its own, with users that this process gives it from outside."""
        is_named, name = os.pipe()
        first = self._start(lambda: self._enter_world(is_named, name), kernel.fork_into_namespaces)
        os.close(is_named)
        try:
            name_users(first)
            os.write(name, b"1")
        finally:
            os.close(name)
        return first

    def _start(self, enter: Callable[[], None], fork: Callable[[], int] = os.fork) -> int:
        """A process that runs the stages. Whatever happens, it does not return here."""
        first = fork()
        if first == 0:
            try:
                if IS_LINUX:
                    locks.die_with_parent()
                enter()
                self.run_stages()
            except OSError as error:
                self.tell("cannot", self._level, error)
            finally:
                os._exit(0)
        return first

    def _start_bubblewrap(self) -> int:
        """The same by another program, inside which this one is started again (`inside`)."""

        def become_bubblewrap() -> None:
            with open("plan", "wb") as plan:
                marshal.dump({**self._plan, "bubblewrap": []}, plan)
            files = [os.open("plan", os.O_RDONLY), self._status, self._locked]
            os.unlink("plan")
            for file in files:
                os.set_inheritable(file, True)
            command = [*self._plan["bubblewrap"], *map(str, files)]
            os.execv(command[0], command)

        os.chdir(self._plan["folder"])
        return self._start(become_bubblewrap)

    def _enter_world(self, is_named: int, name: int) -> None:
        os.close(name)
        if not os.read(is_named, 1):
            os._exit(0)  # the launcher has told why
        owner = NOBODY if self._is_root else world.USER
        world.enter(self._plan["folder"], self._plan["view"], self._plan["disk_bytes"], owner)

    def _enter_folder(self) -> None:
        os.chdir(self._plan["folder"])
        if self._is_root and self._level != "none":
            os.chown(".", NOBODY, NOBODY)

    def _wait(self, first: int) -> None:
        """Wait for the end of the stages, which SIGTERM brings about, and of all that they have started."""
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        os.waitpid(first, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while left := processes.children(os.getpid()):
            for child in left:
                processes.kill_tree(child)
                os.waitpid(child, 0)

    # Stages ------------------------------------------------------------------------------------------------------

    def run_stages(self) -> None:
        """One after the other, as long as they end well."""
        for name, content in self._plan["files"].items():
            with open(name, "wb") as file:
                file.write(content)
        all(self._run_stage(stage) == 0 for stage in self._plan["stages"])

    def _run_stage(self, stage: dict) -> int:
        """Exit code of a stage, negative for a signal. Orphans that end meanwhile are buried too."""
        program = os.fork()
        if program == 0:
            try:
                self._become(stage)
            except OSError as error:
                self.tell("cannot", self._level, error)
            finally:
                os._exit(CANNOT_START)
        ended, status = 0, 0
        while ended != program:
            ended, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        self.tell("ended", stage["name"], code)
        return code

    def _become(self, stage: dict) -> None:
        """Lock this process in and turn it into the stage's program."""
        os.setsid()
        here = os.getcwd()
        environment = {**stage["environment"], "HOME": here, "TMPDIR": here}
        program, *_ = arguments = stage["arguments"]
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and what is ignored is inherited
            signal.signal(number, signal.SIG_DFL)
        if self._level != "none":
            self._lock(stage["limits"])
        os.close(os.open(program, os.O_RDONLY))  # it can be had
        os.write(self._locked, b"1")
        self.tell("began", stage["name"], self._level)
        os.execve(program, arguments, environment)

    def _lock(self, limits: dict[str, int]) -> None:
        """What the level asks for. Each lock leaves open what the next one needs."""
        user = NOBODY if self._is_root else os.geteuid()
        if self._level != "namespaces":  # his other processes count too
            limits = {**limits, "NPROC": limits["NPROC"] + processes.num_threads(user)}
        if IS_LINUX:
            locks.no_new_privileges()
        if self._level == "namespaces" and locks.landlock_version():
            locks.landlock(["/"], [world.WORK, *world.DEVICES])
        if self._level == "landlock":
            shown = [source for part in ("bound", "packages") for _, source in self._plan["view"][part]]
            locks.landlock(shown, [os.getcwd(), *world.DEVICES])
        if self._is_root:
            locks.become(user, NOBODY)
        locks.set_limits(limits)
        if self._level in ("namespaces", "landlock"):
            kernel.drop_capabilities()
            seccomp.install()


def is_root() -> bool:
    """Whether this is root with other users beside him. In a container that has only one, root is somebody outside."""
    return os.geteuid() == 0 and any(start <= NOBODY < start + count for start, count in users("uid"))


def users(kind: str) -> list[tuple[int, int]]:
    """Ranges of users (uid) or groups (gid) that there are here: the first one, and how many."""
    if not IS_LINUX:
        return [(0, NOBODY + 1)]
    with open(f"/proc/self/{kind}_map", encoding="ascii") as file:
        lines = [line.split() for line in file]
    return [(int(start), int(count)) for start, _, count in lines]


def name_users(pid: int) -> None:
    """Give a new user namespace its users: to root's all that there are, to another user's that one."""
    if is_root():
        maps = {kind: "\n".join(f"{start} {start} {count}" for start, count in users(kind)) for kind in ("uid", "gid")}
    else:
        write(f"/proc/{pid}/setgroups", "deny")
        maps = {"uid": f"{world.USER} {os.geteuid()} 1", "gid": f"{world.USER} {os.getegid()} 1"}
    for kind, text in maps.items():
        write(f"/proc/{pid}/{kind}_map", text)


def write(path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


def main() -> None:
    """Arguments: open files with the plan, for the status, with the program's job and for its report."""
    given = [int(number) for number in sys.argv[1:]]
    plan_file, status, job, report = (fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, REPORT + 1) for file in given)
    for file in given:
        os.close(file)
    for file, number in ((job, JOB), (report, REPORT)):
        os.dup2(file, number)
        os.close(file)
    with open(plan_file, "rb") as opened:
        plan = marshal.load(opened)
    if IS_LINUX:
        locks.die_with_parent(locks.SIGTERM)  # so that it ends the others first, see `_wait`
    if os.getppid() == plan["caller"]:  # it has not died before
        Launcher(plan, status).run()


def inside() -> None:
    """The stages in a world that bubblewrap has made. Arguments: open files with the plan, for the status, and for the
    byte that says that all locks are closed."""
    plan_file, status, locked = map(int, sys.argv[1:])
    for file in (status, locked):
        os.set_inheritable(file, False)
    with open(plan_file, "rb") as opened:
        Launcher(marshal.load(opened), status, "namespaces", locked).run_stages()
