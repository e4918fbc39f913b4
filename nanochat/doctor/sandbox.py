"""What this kernel lets a program do to lock itself in, tried by locking in a process that is thrown away.

    namespaces   a user of its own, with its own processes, mounts and no network
    landlock     files out of reach, by a rule that the process lays on itself
    limits       seconds and bytes, by setrlimit
    none         not even those

Each trial is a forked process that leaves with 0 if it could lock itself in and was really held. System calls that
Python does not have are made by number; those of Landlock are the same on every processor.
"""

import ctypes
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanochat.doctor.result import Request, Result

NEWNS, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000  # <linux/sched.h>
MS_PRIVATE, MS_REC = 1 << 18, 1 << 14  # <linux/mount.h>
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446  # <asm/unistd.h>
LANDLOCK_VERSION = 1  # flag: only tell the version
WRITE_FILE, MAKE_REG = 1 << 1, 1 << 8  # <linux/landlock.h>
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, STRICT = 38, 22, 1  # <linux/prctl.h>
LIMIT_BYTES = 2**31


def sandbox(request: Request) -> Result:
    """Try every lock; the best one is the level."""
    is_linux = sys.platform == "linux"
    found: dict[str, bool] = {"limits": holds(memory_limit)}
    found |= {name: is_linux and holds(trial) for name, trial in TRIALS.items()}
    found["bwrap"] = bwrap_works()
    version = landlock_version() if is_linux else 0
    level = next((name for name in ("namespaces", "landlock", "limits") if found[name]), "none")
    words = [f"{name} {'yes' if held else 'no'}" for name, held in found.items()]
    seen = f"level {level}: {', '.join(words)}" + (f"; Landlock's version is {version}" if version else "")
    numbers = {"level": level, "landlock_version": version, **found}
    weak = level in ("none", "limits")
    advice = "programs that a model writes could read your files here: run them in a container or a virtual machine"
    return Result("missing" if weak else "ok", seen, advice if weak else "", numbers)


def holds(trial: Callable[[], bool]) -> bool:
    """Whether a trial, in a process of its own, ends well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with suppress(OSError):
                code = 0 if trial() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def syscall(*arguments: int | bytes | None) -> int:
    """A system call by number; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    return checked(libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int) -> int:
    zero = ctypes.c_ulong(0)
    libc = ctypes.CDLL(None, use_errno=True)
    return checked(libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero))


# Trials: each is called in a process of its own --------------------------------------------------------------------


def memory_limit() -> bool:
    """Memory beyond the limit is refused."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    try:
        bytearray(LIMIT_BYTES)
    except MemoryError:
        return True
    return False


def namespaces() -> bool:
    """The first process of a world of its own, with mounts of its own and no network."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET))
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    checked(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    checked(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None))
    devices = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()[2:]  # still the outer /proc, our network
    return not os.listdir("/tmp") and len(devices) <= 1 and holds(lambda: os.getpid() == 1)


def landlock() -> bool:
    """No file can be written any more."""
    rules = syscall(LANDLOCK_CREATE, struct.pack("Q", WRITE_FILE | MAKE_REG), 8, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "file")
        before.touch()
        if os.fork() == 0:
            held = False
            try:
                syscall(LANDLOCK_RESTRICT, rules, 0)
                try:
                    before.write_text("x", encoding="ascii")
                except PermissionError:
                    held = True
            finally:
                os._exit(0 if held else 1)
        return os.waitstatus_to_exitcode(os.wait()[1]) == 0


def seccomp() -> bool:
    """A process that allows itself to read and write only is killed when it opens a file."""
    child = os.fork()
    if child == 0:
        try:
            prctl(PR_SET_SECCOMP, STRICT)
            os.open("/", os.O_RDONLY)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


TRIALS = {"namespaces": namespaces, "landlock": landlock, "seccomp": seccomp}


def landlock_version() -> int:
    """0: the kernel has none."""
    with suppress(OSError):
        return syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION)
    return 0


def bwrap_works() -> bool:
    """Whether bubblewrap is there and starts a program without network."""
    program = shutil.which("bwrap")
    if program is None:
        return False
    command = [program, "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", sys.executable, "-c", ""]
    return subprocess.run(command, capture_output=True).returncode == 0
