"""What every room may use: paths, the process environment, rank-0 printing, errors, records of stages.

This module never imports torch, so that `--help` stays instant. Environment variables are read here (and in
`parallel.runtime`) and nowhere else.
"""

import errno
import gzip
import io
import json
import math
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, cast

from nanochat.memory import MemoryWatch

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before UTF-8
PROCESS_BEGAN = time.perf_counter()  # near enough: recipes import this module before all that takes time
PARENT = os.getppid()  # who has started this process


class UserError(ValueError):
    """Something the user can cause and mend. The message says what was given, what is allowed, what to do.

    Recipes print it as one line and leave with exit code 2 (`run`).
    """


class Stopped(Exception):
    """A recipe was asked to stop by a signal and has done so in order. `code`: of the process's exit."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class LostRank(Exception):
    """Another rank of the job is gone, so that this one cannot go on."""


class FlagError(UserError):
    """Mistakes in a command line. Every rank has the same one, so one of them tells."""


def base_dir() -> Path:
    """Root of everything a run leaves behind: `$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`."""
    given = os.environ.get("NANOCHAT_BASE_DIR")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "nanochat"


def requested_dtype() -> str | None:
    """`$NANOCHAT_DTYPE`, the compute dtype the user asks for, or None."""
    return os.environ.get("NANOCHAT_DTYPE") or None


def launch_ranks() -> tuple[int, int, int]:
    """(rank, world_size, local_rank) as torchrun sets them; (0, 1, 0) for a plain process.

    Raises UserError where one of them is no number: torchrun does not do that.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: value for name in names if (value := os.environ.get(name)) is not None}
    for name, value in given.items():
        if not re.fullmatch("[0-9]{1,9}", value):
            raise UserError(f"{name}={printable(value)}: must be a whole number, as torchrun sets it; else unset it")
    if not {"RANK", "WORLD_SIZE"} <= given.keys():
        return 0, 1, 0
    rank, world, local = (int(given.get(name, "0")) for name in names)
    if rank >= world:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world}: ranks are numbered from 0 to WORLD_SIZE - 1; unset them both"
        )
    return rank, world, local


def printable(text: str) -> str:
    """`text` on one line: characters that would move the cursor or change the colour are escapes such as \\n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def plural(count: float, name: str) -> str:
    """
    >>> plural(1, "row"), plural(2_000, "pass"), plural(1.5, "core")
    ('1 row', '2,000 passes', '1.5 cores')
    """
    count = int(count) if count == int(count) else count
    return f"{count:,} {name}{'' if count == 1 else 'es' if name.endswith('s') else 's'}"


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
        os.environ["WANDB_MODE"] = "offline"
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):  # without them Trackio keeps to this machine
            os.environ.pop(name, None)


def prepare_matplotlib() -> None:
    """Keep Matplotlib's font cache in the base folder: it prints warnings where the home folder cannot be written.

    To be called before Matplotlib is imported. A given MPLCONFIGDIR wins.
    """
    os.environ.setdefault("MPLCONFIGDIR", str(base_dir() / "matplotlib"))


def prepare_dashboards() -> Path:
    """Make dashboards keep their files in the base folder, in the folder of logs that is returned.

    To be called before they are imported. W&B's caches and Trackio's database go where given variables say.
    """
    logs = base_dir() / "logs"
    os.environ.setdefault("TRACKIO_DIR", str(logs / "trackio"))
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(logs / "wandb" / "cache"))
    return logs


def show_progress(name: str, done: int, total: int) -> None:
    """`name done/total` on one line that the next call overwrites and the last clears; for terminals only, on rank 0.

    On stderr, so that it is seen where stdout goes to a file.
    """
    if sys.stderr.isatty() and launch_ranks()[0] == 0:
        text = f"{name} {done:,}/{total:,}"
        end = f"\r{' ' * len(text)}\r" if done >= total else ""
        print(f"\r{text}{end}", end="", file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Call a recipe's `main` as the process. What goes wrong becomes lines on stderr and an exit code, no traceback.

    2: a UserError. 1: a training that diverged or found no memory, or lost one of its ranks. 130: Ctrl-C, 143: SIGTERM
    (`train.stop`). 141: our reader left, as `| head` does.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        try:
            code = _exit_code(main)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the process's end
        code = 141
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    is_first = True
    try:
        is_first = launch_ranks()[0] == 0
        prepare_process()
        main()
    except UserError as error:
        return _fail(2, str(error)) if is_first or not isinstance(error, FlagError) else 2
    except (FloatingPointError, MemoryError) as error:
        return _fail(1, str(error) or "out of memory")
    except LostRank as error:
        return _fail(1, str(error)) if str(error) else 1
    except Stopped as end:
        return _fail(end.code, str(end), prefix="") if is_first else end.code
    except KeyboardInterrupt:
        goes_on = "; a training run goes on from its last checkpoint with --resume=auto" if _can_resume(main) else ""
        return _fail(130, f"interrupted{goes_on}", prefix="\n") if is_first else 130
    return 0


def _fail(code: int, message: str, prefix: str = "error: ") -> int:
    sys.stdout.flush()
    for line in message.splitlines():
        print(f"{prefix}{printable(line)}", file=sys.stderr)  # it may hold names of files
    return code


def _can_resume(main: Callable[[], None]) -> bool:
    """Whether the recipe of this `main` has --resume."""
    parse_args = getattr(sys.modules[main.__module__], "parse_args", None)
    try:
        return parse_args is not None and hasattr(parse_args(sys.argv[1:]), "resume")
    except UserError:
        return False


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
            f"{path}: could not be written ({error.strerror or error}); {_writing_advice(error)}"
        ) from error
    finally:
        with suppress(OSError):  # a folder that cannot be entered holds no temporary file either
            temporary.unlink(missing_ok=True)


def _writing_advice(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    return "free some space" if full else "choose another folder with NANOCHAT_BASE_DIR"


def check_writable(path: Path) -> None:
    """Raise UserError where a file `path` could not be written, before hours are spent on it. Writes nothing."""
    folder = next(parent for parent in path.parents if os.path.exists(parent))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        reason = "you may not write there" if folder.is_dir() else f"{folder} is no folder"
        raise UserError(f"{path}: cannot be written ({reason}); choose another folder with NANOCHAT_BASE_DIR")


def sync_file(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def reading(path: Path, where: str = "", *also: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong while `path` is read into a UserError that names it. also: more kinds of error."""
    kinds: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *also)
    try:
        yield
    except kinds as error:
        reason = (getattr(error, "strerror", None) or str(error) or repr(error)).splitlines()[0]
        advice = {
            errno.ENOENT: "check the path",
            errno.ENOTDIR: "check the path",
            errno.ENAMETOOLONG: "check the path",
            errno.EACCES: "its permissions do not let you",
        }.get(getattr(error, "errno", None) or 0, "it may be truncated or corrupt: remove it and fetch it again")
        raise UserError(f"{path}{where}: cannot be read ({reason}); {advice}") from error


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file for reading, unpacked where its name ends in .gz, placed after a byte order mark."""
    with reading(path), gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        yield cast(IO[bytes], file)


# Records of stages -----------------------------------------------------------------------------------------------


def report_folder() -> Path:
    """Where stages leave their records and the report is written."""
    return base_dir() / "report"


def record_path(name: str) -> Path:
    """The file of a stage's record."""
    return report_folder() / "stages" / f"{name}.json"


@contextmanager
def record_stage(name: str, began: float = PROCESS_BEGAN) -> Iterator[dict[str, Any]]:
    """Time a stage and save what the block puts into the dict as `<report folder>/stages/<name>.json`, on rank 0.

    A process is one stage: its clock starts with the process. Whoever records several of them gives each one's start, a
    time of `time.perf_counter`. Added are `wall_clock_s`, `peak_rss_bytes` (`memory.MemoryWatch`) and `ended`, a date.
    `earlier_s` in the dict is the time that an earlier process spent on the same stage: it is added to the clock, and
    of the peaks of both, where that process has left a record, the larger one stays. A block that fails, or puts
    nothing in, leaves no record.
    """
    rank, world_size, _ = launch_ranks()
    record: dict[str, Any] = {}
    if rank > 0:
        yield record
        return
    with MemoryWatch(os.getppid() if world_size > 1 else os.getpid()) as memory:
        yield record
    if record:
        earlier_s = record.pop("earlier_s", 0.0)
        record["ended"] = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        record["wall_clock_s"] = time.perf_counter() - began + earlier_s
        record["peak_rss_bytes"] = memory.peak_bytes()
        if earlier_s:
            with suppress(UserError):  # there is none, or it is damaged
                earlier = read_record(record_path(name)).get("peak_rss_bytes") or 0
                record["peak_rss_bytes"] = max(earlier, record["peak_rss_bytes"])
        write_record(name, record)


def write_record(name: str, record: dict[str, Any]) -> None:
    """Save a stage's record in the place of an earlier one."""
    with atomic_write(record_path(name)) as path:
        path.write_text(to_json(record, indent=1), encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """A record that a stage left. Raises UserError where it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run that stage again") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: holds no JSON object; run that stage again")
    return record


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every program reads: NaN and the infinities, which JSON does not have, become null.

    >>> to_json({"bpb": float("nan"), "n": [1, 2.5]})
    '{"bpb": null, "n": [1, 2.5]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
