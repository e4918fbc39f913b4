"""Who hears of a run's progress. `metrics.jsonl` always; a console line unless turned off.

A logger takes one flat record per step. New ones (TensorBoard and the like) are a class and a line in `LOGGERS`.
"""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from nanochat.common import UserError, atomic_write, reading, to_json
from nanochat.parallel import Runtime

Record = dict[str, Any]


class Logger(Protocol):
    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlLogger:
    """Appends records to a file; a resumed run first drops what it is about to do again."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        kept = [line for line in read_lines(path) if step_of(line) < start]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        try:
            self._file.write(to_json(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._path}: could not be written ({error.strerror}); free space and continue with --resume=auto"
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was told by log
            self._file.close()


def read_lines(path: Path) -> list[str]:
    """Whole lines of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; those that a crash has damaged are left out. UserError where it cannot be read."""
    with reading(path, "", UnicodeDecodeError):
        lines = read_lines(path)
    return [json.loads(line) for line in lines if step_of(line) < math.inf]


def step_of(line: str) -> float:
    """A record's step; a damaged line counts as never, so that a resumed run drops it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class ConsoleLogger:
    """One line per step; at most one every `interval_s` seconds, but never hiding an evaluation."""

    def __init__(self, interval_s: float = 2.0) -> None:
        self.interval_s = interval_s
        self._last_shown = -interval_s

    def log(self, record: Record) -> None:
        has_news = any(name.startswith("val") for name in record) or "skipped" in record
        is_last = record["step"] >= record["num_steps"]
        if record["elapsed_s"] - self._last_shown < self.interval_s and not has_news and not is_last:
            return
        self._last_shown = record["elapsed_s"]
        print(format_record(record), flush=True)

    def close(self) -> None:
        pass


def format_record(record: Record) -> str:
    """A record as a line for people."""
    total = record["num_steps"]
    parts = [f"step {record['step']:>{len(str(total))}}/{total}"]
    formats: dict[str, Callable[[Any], str]] = {
        "loss": lambda x: f"loss {x:.4f}",
        "val_bpb": lambda x: f"val bpb {x:.4f}",
        "val_loss": lambda x: f"val loss {x:.4f}",
        "skipped": lambda x: f"skipped: {x}",
        "lr": lambda x: f"lr x{x:.2f}",
        "tokens_per_s": lambda x: f"{x:,.0f} tok/s",
        "mfu": lambda x: f"mfu {100 * x:.1f} %",
        "eta_s": lambda x: f"eta {format_seconds(x)}",
    }
    parts += [render(record[name]) for name, render in formats.items() if record.get(name) is not None]
    return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    """12s, 3m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


LOGGERS: dict[str, Callable[[], list[Logger]]] = {"console": lambda: [ConsoleLogger()], "none": list}


def open_loggers(name: str, metrics_path: Path, start: int, rt: Runtime) -> list[Logger]:
    """The loggers of a run that begins at step `start`; none on other ranks than the first."""
    return [JsonlLogger(metrics_path, start), *LOGGERS[name]()] if rt.is_main else []
