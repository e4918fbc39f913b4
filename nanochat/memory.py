"""How much memory a process and all that it started hold together; and what is to become of memory that is freed."""

import ctypes
import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal


class MemoryWatch:
    """The most memory that a process and all that it started have held together while the block ran.

    On Linux a thread adds up their resident sets from /proc every `interval_s`; what this process itself held between
    two looks is known from the system's own count, which is the least that is told. Memory that several processes share
    counts for each of them, so the figure is rather too high than too low. Elsewhere: the peak of this process and that
    of the largest it has waited for, added up.

    root: the process at the top; under torchrun the launcher, so that all ranks of this machine are counted.
    """

    def __init__(self, root: int, interval_s: float = 0.5) -> None:
        self._root, self._interval_s = root, interval_s
        self._peak_bytes = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "MemoryWatch":
        if sys.platform == "linux":
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def peak_bytes(self) -> int:
        """The peak so far."""
        if self._thread is None:
            return peak_rss_bytes() + peak_rss_bytes(of_children=True)
        return max(self._peak_bytes, peak_rss_bytes())

    def _watch(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            began = time.perf_counter()
            self._peak_bytes = max(self._peak_bytes, tree_rss_bytes(self._root))
            # Looking at 80 processes takes 2.5 ms; where there are thousands, the looks become rarer.
            pause_s = max(self._interval_s, 50 * (time.perf_counter() - began))


def tree_rss_bytes(root: int) -> int:
    """The resident sets of process `root` and all its descendants now, added up, from Linux's /proc."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended meanwhile
            fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()  # its name may hold anything
            children.setdefault(int(fields[1]), []).append(int(name))
            pages[int(name)] = int(fields[21])
    tree = [root]
    for process in tree:  # grows while it is walked
        tree += children.get(process, [])
    return sum(pages.get(process, 0) for process in tree) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes(of_children: bool = False) -> int:
    """The most memory that this process has held. of_children: the largest of those that it has waited for."""
    import resource  # not on every platform

    peak = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def high_water_bytes() -> int:
    """The most memory that this process has held since it was started, by the kernel's count for its address space.

    `peak_rss_bytes` may begin with what the parent held: Linux hands that figure on when a program is started.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()


def resident_bytes() -> int:
    """What this process holds now, freed memory that it keeps included; where only a peak is told, that."""
    with suppress(OSError):
        return _own_bytes("resident")
    return peak_rss_bytes()


# What allocators and libraries say, where they have no kind of error of their own; torch's are RuntimeErrors.
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|could not create a (memory|primitive)"
    r"|can't start new thread",  # Python's, where there is no room for its stack
    re.I,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has said so: a GPU's, torch's on a CPU, or Python's."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where the C library is glibc; elsewhere nothing happens.

    A training step frees what the next one takes again. Given back in between, every page comes anew from the kernel,
    filled with zeros: 40 % of the ancestor's CPU time. In float32 depth 2 trains 1.24 times as fast with it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory_bytes(heed_limit: bool = True) -> int | None:
    """What this process may still take: of the machine, of its control group, of its own limit. None where unknown.

    heed_limit: of `ulimit -v`, too.
    """
    found = [_free_of_machine(), _free_of_group(), _free_of_limit() if heed_limit else None]
    return min((free for free in found if free is not None), default=None)


def _free_of_machine() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return machine_memory_bytes()


def machine_memory_bytes() -> int | None:
    """All of it, used or not."""
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def group_limit_bytes() -> int | None:
    """What a container may take in all; None where there is no limit."""
    limit = _group_number("memory.max", "memory.limit_in_bytes")
    return limit if limit is not None and limit < 2**60 else None


def _free_of_group() -> int | None:
    limit, used = group_limit_bytes(), _group_number("memory.current", "memory.usage_in_bytes") or 0
    return None if limit is None else max(0, limit - used + _cached_by_group())


def _cached_by_group() -> int:
    """Files that were read and that the kernel drops first; they count as used."""
    for path in (Path("/sys/fs/cgroup/memory.stat"), Path("/sys/fs/cgroup/memory/memory.stat")):
        with suppress(OSError, ValueError):
            numbers = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
            return int(numbers.get("total_inactive_file") or numbers["inactive_file"])
    return 0


def _group_number(name: str, old_name: str) -> int | None:
    """A number of Linux's control group, in its second or first version."""
    for path in (Path("/sys/fs/cgroup", name), Path("/sys/fs/cgroup/memory", old_name)):
        with suppress(OSError, ValueError):  # ValueError: the word "max"
            return int(path.read_text(encoding="ascii"))
    return None


THREADS_BYTES = 2**29  # of addresses, for eight threads: each one's heap takes 64 MiB of them before it holds anything


def _free_of_limit() -> int | None:
    """Of `ulimit -v`, which limits addresses, whether anything lies there or not."""
    import resource  # not on every platform

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with suppress(OSError):
        return max(0, limit - _own_bytes("addresses") - THREADS_BYTES)
    return limit


def _own_bytes(what: Literal["addresses", "resident"]) -> int:
    """Of this process, now, from Linux's /proc."""
    addresses, resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[:2]
    return int(addresses if what == "addresses" else resident) * os.sysconf("SC_PAGE_SIZE")
