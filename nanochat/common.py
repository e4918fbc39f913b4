"""What every room may use: paths, the process environment, rank-0 printing, errors, device peaks.

This module never imports torch, so that `--help` stays instant. Environment variables are read here (and in
`parallel.runtime`) and nowhere else.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something the user can cause and mend. The message says what was given, what is allowed, what to do.

    Recipes print it as one line and leave with exit code 2 (`cli.run`).
    """


def base_dir() -> Path:
    """Root of everything a run leaves behind: `$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`."""
    given = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "nanochat"


def requested_dtype() -> str | None:
    """`$NANOCHAT_DTYPE`, the compute dtype the user asks for, or None."""
    return os.environ.get("NANOCHAT_DTYPE") or None


def launch_ranks() -> tuple[int, int, int]:
    """(rank, world_size, local_rank) as torchrun sets them; (0, 1, 0) for a plain process."""
    rank, world, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return (int(rank), int(world), int(local or 0)) if rank is not None and world is not None else (0, 1, 0)


def print0(*args: object) -> None:
    """Print on rank 0 only, at once."""
    if launch_ranks()[0] == 0:
        print(*args, flush=True)


def prepare_process(offline: bool = False) -> None:
    """Set the process-wide defaults that must stand before torch is imported. Given values win.

    GOMP_SPINCOUNT: OpenMP threads spin at barriers; with one busy neighbour on a two-core machine that made decoding
    up to 20 times slower. A short spin costs nothing on a quiet machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; when the block ends well it is synced and renamed to `path`, else removed.

    Readers see the old file or the new one, never a part. A failing disk raises UserError and leaves the old file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error.strerror or error}); free some space or choose another folder "
            "with NANOCHAT_BASE_DIR"
        ) from error
    finally:
        with suppress(OSError):  # a folder that cannot be entered holds no temporary file either
            temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def report_folder() -> Path:
    """Where stages leave their records and the report is written."""
    return base_dir() / "report"


@contextmanager
def record_stage(name: str) -> Iterator[dict[str, Any]]:
    """Time a stage and save what the block puts into the dict as `<report folder>/stages/<name>.json`, on rank 0.

    Added are `wall_clock_s` and `peak_rss_bytes` of this process; `earlier_s` in the dict, the time that an
    interrupted run of the same stage took, is added to the clock. A block that puts nothing in leaves no record.
    """
    began = time.perf_counter()
    record: dict[str, Any] = {}
    yield record
    if record and launch_ranks()[0] == 0:
        record["wall_clock_s"] = time.perf_counter() - began + record.pop("earlier_s", 0.0)
        record["peak_rss_bytes"] = peak_rss_bytes()
        with atomic_write(report_folder() / "stages" / f"{name}.json") as path:
            path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    import resource  # not on every platform

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Dense bf16 peak, FLOP/s. The first entry whose words are all among the words of the device name wins, so special cases
# come first. Whole words only: an L40 is no L4, and an RTX A4000 no A40.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("gb200", 2.5e15),
    ("grace blackwell", 2.5e15),
    ("b200", 2.25e15),
    ("b100", 1.8e15),
    ("h200 nvl", 836e12),
    ("h200 pcie", 836e12),
    ("h200", 989e12),
    ("gh200", 989e12),
    ("h100 nvl", 835e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("h800 nvl", 989e12),
    ("h800", 756e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a40", 149.7e12),
    ("a30", 165e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("mi355x", 2.5e15),
    ("mi325x", 1.3074e15),
    ("mi300a", 980.6e12),
    ("mi300x", 1.3074e15),
    ("mi250x", 383e12),
    ("mi250", 362.1e12),
    ("5090", 209.5e12),
    ("4090", 165.2e12),
    ("3090", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name (vendors' data sheets), or None where unknown: no MFU is reported."""
    given = set(re.findall("[a-z0-9]+", device_name.lower()))
    if "laptop" in given:  # same name as the desktop's card, about half its speed
        return None
    return next((peak for words, peak in PEAK_FLOPS if given.issuperset(words.split())), None)
