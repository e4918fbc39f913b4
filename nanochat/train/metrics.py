"""A run's progress on record: `metrics.jsonl` always, and the loggers that --logger names (nanochat.loggers).

The file is written first, by the training itself, and a failure to write it ends the run. A dashboard works in a thread
of its own: slow or broken, it costs the run nothing but a warning.
"""

import json
import math
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write, prepare_dashboards, printable, reading, to_json
from nanochat.loggers import LOGGERS, About, Logger, Record
from nanochat.train.run import Run

MAX_WAITING = 20_000  # records for a dashboard that does not keep up: about 10 MB
CLOSE_S = 60.0  # at the end, for what a dashboard has yet to write; longer than W&B's loggers.UPLOAD_S
SHOWN_CHARS = 300  # of a reason


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
    with reading(path):  # bytes that are no text make a line that is no record
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; those that a crash has damaged are left out. UserError where it cannot be read."""
    return [json.loads(line) for line in read_lines(path) if step_of(line) < math.inf]


def step_of(line: str) -> float:
    """A record's step; a damaged line counts as never, so that a resumed run drops it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Background:
    """A logger in a thread of its own: opening a dashboard and sending to it takes none of the training's time.

    Whatever goes wrong there is told once, and the run goes on without it.
    """

    def __init__(self, name: str, open_logger: Callable[[], Logger]) -> None:
        self._name, self._open = name, open_logger
        self._waiting: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._has_failed, self._telling = False, threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"logger-{name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        if self._waiting.qsize() >= MAX_WAITING:
            self._fail(f"it does not keep up, {MAX_WAITING:,} steps wait for it")
        if not self._has_failed:
            self._waiting.put(dict(record))

    def close(self) -> None:
        """Wait until all is written, but not for ever."""
        self._waiting.put(None)
        self._thread.join(0 if self._has_failed else CLOSE_S)
        if self._thread.is_alive():
            self._fail(f"it has not finished within {CLOSE_S:g} s")

    def _work(self) -> None:
        try:
            logger = self._open()
            del self._open  # and with it all records from before
            while (record := self._waiting.get()) is not None:
                logger.log(record)
            logger.close()
        except Exception as error:  # others' code and a network: what it may raise is nowhere listed
            self._fail(str(error) or repr(error))

    def _fail(self, reason: str) -> None:
        with self._telling:
            if not self._has_failed:
                print(
                    f"warning: --logger={self._name}: {printable(reason)[:SHOWN_CHARS]}; the run goes on without it, "
                    "metrics.jsonl has every step",
                    file=sys.stderr,
                    flush=True,
                )
            self._has_failed = True  # only now: `close` waits for a warning that is being given


def open_loggers(run: Run, model_config: Mapping[str, Any]) -> list[Logger]:
    """The loggers that a run's flags ask for; none on other ranks than the first."""
    if not run.rt.is_main:
        return []
    loggers: list[Logger] = [JsonlLogger(run.metrics_path, run.start)]
    kinds = {name: LOGGERS[name] for name in run.args.logger.split(",") if name != "none"}
    dashboards = any(kind.package for kind in kinds.values())
    about = describe_run(run, model_config) if dashboards else About("", "", "", {}, Path())
    for name, kind in kinds.items():
        loggers.append(Background(name, partial(kind.open, about)) if kind.package else kind.open(about))
    return loggers


def describe_run(run: Run, model_config: Mapping[str, Any]) -> About:
    """What dashboards are told of a run. Its id stands in its folder from the first process that needs one."""
    logs = prepare_dashboards()
    id_path = run.metrics_path.with_name("run_id")
    if not id_path.exists():
        with atomic_write(id_path) as temporary:
            temporary.write_text(f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}", encoding="utf-8")
    config = {"flags": vars(run.args), "model": dict(model_config)}
    past = [record for record in read_metrics(run.metrics_path) if record["step"] < run.start]
    id = id_path.read_text(encoding="utf-8")
    return About(run.final_folder.parent.name, run.final_folder.name, id, config, logs, past)
