"""System calls that Python does not have, by ctypes. They raise OSError, on other systems than Linux always.

What the launcher imports is kept to a few small modules: its start is most of what a sandbox costs.
"""

import ctypes
import errno
import os
import struct
import sys

IS_X86 = os.uname().machine == "x86_64"

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000  # <linux/sched.h>
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
EVERY_NAMESPACE = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 1 << 12, 1 << 14, 1 << 18  # <linux/mount.h>
MNT_DETACH = 2
SIGCHLD = 17
AT_FDCWD, AT_RECURSIVE = -100, 0x8000  # <linux/fcntl.h>
PR_SET_PDEATHSIG, PR_SET_SECCOMP = 1, 22  # <linux/prctl.h>
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAPABILITY_VERSION = 0x20080522  # <linux/capability.h>
CLONE, PIVOT_ROOT, CAPSET = (56, 155, 126) if IS_X86 else (220, 41, 91)  # <asm/unistd.h>
MOUNT_SETATTR = 442  # from here on the numbers are the same on every processor


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    """What a C function returned, unless it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(*arguments: int | bytes | None) -> int:
    """A system call by number."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "only Linux has this")
    return checked(libc().syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))


def prctl(option: int, value: int, pointer: object = None) -> int:
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "only Linux has this")
    zero = ctypes.c_ulong(0)
    return checked(libc().prctl(option, ctypes.c_ulong(value), pointer or zero, zero, zero))


def fork_into_namespaces() -> int:
    """As os.fork, but the child is the first process of a world of its own."""
    return syscall(CLONE, EVERY_NAMESPACE | SIGCHLD, 0, 0, 0, 0)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = (text if text is None else os.fsencode(text) for text in (source, target, kind))
    checked(libc().mount(*texts, ctypes.c_ulong(flags), options and options.encode()))


def make_read_only(target: str) -> None:
    """A mount, and those below it, become read-only, without devices and without programs that bring rights."""
    attributes = struct.pack("4Q", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)  # same bits as MOUNT_ATTR_*
    syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, attributes, len(attributes))


def make_writable(target: str) -> None:
    """A mount, without those below it."""
    attributes = struct.pack("4Q", 0, MS_RDONLY, 0, 0)
    syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), 0, attributes, len(attributes))


def pivot_root(new: str, old: str) -> None:
    """`new` becomes / and what was / comes to lie at `old`, a folder in it or `new` itself."""
    syscall(PIVOT_ROOT, os.fsencode(new), os.fsencode(old))


def detach(target: str) -> None:
    checked(libc().umount2(os.fsencode(target), MNT_DETACH))


def drop_capabilities() -> None:
    """None of root's rights is left; with no_new_privs none comes back."""
    syscall(CAPSET, struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6))
