"""Memory and disk: a piece of each is really used."""

import mmap
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from nanochat.common import atomic_write, base_dir
from nanochat.doctor.result import Request, Result
from nanochat.memory import free_memory_bytes, group_limit_bytes, machine_memory_bytes

TOUCHED_BYTES = 2**30
WRITTEN_BYTES = 2**26
LITTLE_MEMORY_BYTES = 2 * 10**9  # depth 4 trains in about as much
SLOW_DISK_BYTES_PER_S = 2e7
DEPTH = 20
KEPT = 4  # checkpoints at a time: the last two, the best one, and the one being written


# Memory ----------------------------------------------------------------------------------------------------------


def memory(request: Request) -> Result:
    """A quarter of what is free, at most 1 GiB, is taken and every page of it touched."""
    total, limit = machine_memory_bytes() or 0, group_limit_bytes()
    free = free_memory_bytes(heed_limit=False) or 0  # a limit is met by trying
    size = min(TOUCHED_BYTES, max(2**24, free // 4))
    seen = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    seen += f", this container may take {limit / 1e9:.1f} GB" if limit is not None and limit < total else ""
    numbers = {"total_bytes": total, "free_bytes": free, "limit_bytes": limit, "touched_bytes": size}
    began = time.perf_counter()
    try:
        touch(size)
    except (OSError, MemoryError) as error:
        advice = "raise the limit (ulimit -v) or stop other programs"
        return Result("failed", f"{seen}; {size / 1e9:.2f} GB of it could not be had ({error})", advice, numbers)
    rate = size / (time.perf_counter() - began)
    seen += f"; {size / 1e9:.2f} GB were taken at {rate / 1e9:.1f} GB/s"
    little = free < LITTLE_MEMORY_BYTES
    advice = "enough for depth 2 and small batches (--device-batch-size=1); stop other programs" if little else ""
    return Result("slow" if little else "ok", seen, advice, {**numbers, "bytes_per_s": rate})


def touch(size: int) -> None:
    """Take so much memory and write into each page."""
    with mmap.mmap(-1, size) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1


# Disk ------------------------------------------------------------------------------------------------------------


def disk(request: Request) -> Result:
    """A file is written as every checkpoint is, synced, read back and compared; then it is removed again."""
    from nanochat.forecast import exact_sizes
    from nanochat.scaling import model_config

    folder = base_dir()
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    content, path = os.urandom(WRITTEN_BYTES), folder / f".doctor.{os.getpid()}"
    try:
        began = time.perf_counter()
        with atomic_write(path) as temporary:  # raises UserError, which says what is wrong and what to do
            temporary.write_bytes(content)
        write_rate = WRITTEN_BYTES / (time.perf_counter() - began)
        is_same, read_rate = read_back(path, content)
        free = shutil.disk_usage(folder).free
    finally:
        with suppress(OSError):
            path.unlink()
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
    sizes = exact_sizes(model_config(DEPTH))
    checkpoint = sizes.weights + sizes.state
    seen = f"{folder}: writes {write_rate / 1e6:,.0f}, reads {read_rate / 1e6:,.0f} MB/s; {free / 1e9:,.1f} GB free"
    seen += f", a run of depth {DEPTH} keeps {KEPT} checkpoints of {checkpoint / 1e9:.1f} GB"
    rates = {"write_bytes_per_s": write_rate, "read_bytes_per_s": read_rate}
    numbers = {"folder": str(folder), **rates, "free_bytes": free, "checkpoint_bytes": checkpoint}
    if not is_same:
        return Result("failed", f"{folder}: what was read is not what was written", "do not use this disk", numbers)
    if free < KEPT * checkpoint:
        return Result(
            "slow", seen, "enough for a lesser depth; else free some space, or move NANOCHAT_BASE_DIR", numbers
        )
    if write_rate < SLOW_DISK_BYTES_PER_S:
        return Result("slow", seen, "training waits while it saves: choose a faster disk (NANOCHAT_BASE_DIR)", numbers)
    return Result("ok", seen, "", numbers)


def read_back(path: Path, content: bytes) -> tuple[bool, float]:
    """(whether the file holds this, bytes per second), from the disk where the system can forget what it has cached."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        found = file.readall()
        return found == content, len(content) / (time.perf_counter() - began)
