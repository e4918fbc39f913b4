"""Who hears of a run's progress: the terminal, and dashboards that are imported only when `--logger` names them.

A logger takes one flat record per step. The record of truth is the run's `metrics.jsonl` (nanochat.train.metrics); a
dashboard is a mirror of it. So that a killed and resumed run shows every step once, a dashboard is opened with the
records that stand from before: what lies on this machine is written anew from them, and a server, which cannot take a
step back, is told only what it lacks. Every step is logged: a thread of its own does it (nanochat.train.metrics), and a
curve with holes cannot be laid over another one.

    <base>/logs/tensorboard/<source>/<tag>/<run id>/    event files
    <base>/logs/wandb/                                  W&B's folders
    <base>/logs/trackio/                                Trackio's database

The files lie outside the run's own folder because that one moves: a run is hidden until its first checkpoint stands,
and these libraries open their files again by name. And each dashboard shows all the runs that lie below one folder.

A new logger is a class and a line in `LOGGERS`.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]

PROJECT = "nanochat"  # under which W&B and Trackio keep the runs
UPLOAD_S = 30  # how long W&B may go on uploading after the last step; what is left then stays on disk for `wandb sync`

# A record's names as dashboards know them, those of the ancestor's runs; None: not for a dashboard.
NAMES: dict[str, str | None] = {
    "step": None,
    "num_steps": None,
    "eta_s": None,
    "elapsed_s": None,
    "lr": "train/lrm",
    "step_s": "train/dt",
    "tokens_per_s": "train/tok_per_sec",
    "flops": "total_training_flops",
    "train_s": "total_training_time",
}


class Logger(Protocol):
    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class About:
    """What a dashboard is told of a run. `past`: the records from before this process, in the order of steps."""

    source: str
    tag: str
    id: str
    config: Mapping[str, Any]
    folder: Path  # of all logs
    past: Sequence[Record] = ()


def dashboard_values(record: Record) -> dict[str, float]:
    """The numbers of a record by their names on dashboards; what JSON has no number for is left out.

    >>> dashboard_values({"step": 3, "loss": 2.5, "lr": 1, "val_bpb": 1.25, "skipped": "no targets"})
    {'train/loss': 2.5, 'train/lrm': 1, 'val/bpb': 1.25, 'train/skipped': 1}
    """
    values = {name: 1 if name == "skipped" else value for name, value in record.items()}
    return {
        shown: value
        for name, value in values.items()
        if (shown := NAMES.get(name, dashboard_name(name))) and isinstance(value, int | float) and math.isfinite(value)
    }


def dashboard_name(name: str) -> str:
    """`val/bpb` for val_bpb, `train/loss` for loss."""
    return name.replace("_", "/", 1) if name.startswith("val_") else f"train/{name}"


# The terminal ----------------------------------------------------------------------------------------------------


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
    if record.get("epoch"):
        parts.append(f"epoch {record['epoch'] + 1}")
    parts += [render(record[name]) for name, render in formats.items() if record.get(name) is not None]
    return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    """12s, 3m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


# Dashboards ------------------------------------------------------------------------------------------------------


class TensorBoardLogger:
    """Event files, written anew from the first step by every process of a run."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = about.folder / "tensorboard" / about.source / about.tag / about.id
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step: a TensorBoard that is open meanwhile drops what it has read from the files that are gone
        self._writer = SummaryWriter(str(folder), purge_step=0, flush_secs=10)
        self._events: Any = self._writer.file_writer
        self._writer.add_text("config", f"```json\n{json.dumps(about.config, indent=1)}\n```", 0)
        # The relative time axis is the run's own clock, on which the time between two processes does not count.
        self._began = time.time() - (about.past[-1]["elapsed_s"] if about.past else 0)
        for record in about.past:
            self.log(record)

    def log(self, record: Record) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in dashboard_values(record).items()]
        # One event for them all: add_scalar would take ten times as long.
        self._events.add_summary(Summary(value=values), record["step"], self._began + record["elapsed_s"])

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases, online or (WANDB_MODE=offline) as folders for `wandb sync`. A resumed run goes on under its id.

    A server's steps may only grow: it is asked for the next one, and told nothing twice. A folder is only written in
    blocks, so that a killed process leaves one without its last steps: the next process writes a whole one instead.
    """

    def __init__(self, about: About) -> None:
        import wandb

        about.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.setup().settings
        is_online = settings.mode in ("online", "shared")
        if is_online and not wandb.login(prompt=False):
            raise ConnectionError("not logged in; use `wandb login`, or WANDB_MODE=offline and later `wandb sync`")
        for unfinished in (about.folder / "wandb").glob(f"offline-run-*-{about.id}"):
            shutil.rmtree(unfinished)
        self._run = wandb.init(
            project=settings.project or PROJECT,
            id=about.id,
            name=f"{about.source}/{about.tag}",
            job_type=about.source,
            config=dict(about.config),
            dir=str(about.folder),
            resume="allow",
            settings=wandb.Settings(console="off", finish_timeout=UPLOAD_S),
        )
        self._next_step = self._run.step if is_online else 0
        for record in about.past:
            self.log(record)

    def log(self, record: Record) -> None:
        if record["step"] >= self._next_step:
            self._run.log(dashboard_values(record), step=record["step"], commit=True)

    def close(self) -> None:
        self._run.finish()


class TrackioLogger:
    """Trackio's database on this machine, where every process of a run writes the run anew."""

    def __init__(self, about: About) -> None:
        import trackio

        name = f"{about.source}-{about.tag}-{about.id}"
        with suppress(ValueError):  # there is no such project yet
            for run in trackio.Api().runs(PROJECT):
                if run.name == name:
                    run.delete()
        self._run = trackio.init(PROJECT, name, group=about.source, config=dict(about.config), embed=False)
        for record in about.past:
            self.log(record)

    def log(self, record: Record) -> None:
        self._run.log(dashboard_values(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Kind:
    """How a logger is opened. package: what must be installed for it, by an extra of the same name as the logger."""

    open: Callable[[About], Logger]
    package: str = ""


LOGGERS: dict[str, Kind] = {
    "console": Kind(lambda about: ConsoleLogger()),
    "tensorboard": Kind(TensorBoardLogger, "tensorboard"),
    "wandb": Kind(WandbLogger, "wandb"),
    "trackio": Kind(TrackioLogger, "trackio"),
}


def logger_names(text: str) -> str:
    """What --logger accepts: `none`, or names of LOGGERS with commas between, whose packages are installed.

    The packages are looked for, not imported. ValueError says what is wrong.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if names == ["none"]:
        return text
    if unknown := [name for name in names if name not in LOGGERS]:
        known = ", ".join(LOGGERS)
        raise ValueError(f"no such logger: {', '.join(map(repr, unknown))}; give none, or some of {known}, with commas")
    if missing := [name for name in names if not is_installed(LOGGERS[name].package)]:
        raise ValueError(
            f"not installed: {', '.join(missing)}; install with pip install 'nanochat[{','.join(missing)}]', in a copy "
            f"of the sources with bash runs/setup.sh {' '.join(missing)}"
        )
    return ",".join(names)


def is_installed(package: str) -> bool:
    """Whether a package can be imported; "" always. A folder of that name, such as W&B leaves behind, is none."""
    found = find_spec(package) if package else None
    return not package or (found is not None and found.origin is not None)
