"""Locks that a process lays on itself before it becomes the program; whatever it starts inherits them.

Limits (setrlimit) hold on every system. Landlock names the folders that may be read and the ones that may be written;
every other file is out of reach, by whatever path. Newer versions of it also close the network and other processes.
"""

import os
import resource
import struct

from nanochat.sandbox import kernel

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # <asm/unistd.h>
VERSION_FLAG, PATH_BENEATH = 1, 1  # <linux/landlock.h>
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG, MAKE_FIFO, MAKE_SYM = 1 << 7, 1 << 8, 1 << 10, 1 << 12
REFER, TRUNCATE = 1 << 13, 1 << 14
FS_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # version -> number of rights to files
BIND_AND_CONNECT, OUTSIDE_SOCKETS_AND_SIGNALS = 3, 3  # since versions 4 and 6
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # those that a rule for a single file may name
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM | REFER | TRUNCATE

# The kernel pipes a crashed process's memory to a program of the host's where one is set up, with a limit of 0 too.
# It does not with a limit of 1, and a file of 1 byte is none (man 5 core, fs/coredump.c).
CORE_BYTES = 1

SIGKILL, SIGTERM = 9, 15


def set_limits(limits: dict[str, int]) -> None:
    """Lower the limits named as in `resource`; those that the system does not have are left out."""
    for name, wanted in limits.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:
            hard = resource.getrlimit(number)[1]
            value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(number, (value, value))


def landlock_version() -> int:
    """0: the kernel has none."""
    try:
        return kernel.syscall(LANDLOCK_CREATE, None, 0, VERSION_FLAG)
    except OSError:
        return 0


def landlock(readable: list[str], writable: list[str]) -> None:
    """Only these files and what is below these folders can be opened. Needs no_new_privs."""
    version = kernel.syscall(LANDLOCK_CREATE, None, 0, VERSION_FLAG)
    handled = (1 << max(count for since, count in FS_RIGHTS.items() if since <= version)) - 1
    network = BIND_AND_CONNECT if version >= 4 else 0
    scoped = OUTSIDE_SOCKETS_AND_SIGNALS if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = kernel.syscall(LANDLOCK_CREATE, struct.pack("3Q", handled, network, scoped), size, 0)
    try:
        for rights, paths in ((READ, readable), (WRITE, writable)):
            for path in paths:
                _allow(rules, path, rights & handled)
        kernel.syscall(LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        is_folder = os.path.isdir(path)
        rule = struct.pack("=Qi", rights if is_folder else rights & FILE_RIGHTS, handle)
        kernel.syscall(LANDLOCK_ADD, rules, PATH_BENEATH, rule, 0)
    finally:
        os.close(handle)


def become(user: int, group: int) -> None:
    """Another user, for good, without further groups. Only for root."""
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def no_new_privileges() -> None:
    """No program that is started from here on brings rights with it."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(by: int = SIGKILL) -> None:
    """Get this signal when the process that started this one ends. To be called again after a change of user."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, by)


def adopt_orphans() -> None:
    """What this process's children leave behind becomes its own, so that it can be found and ended."""
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
