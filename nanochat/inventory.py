"""What models there are, and taking them away.

    <base>/checkpoints/<source>/<tag>/     one `Model` each

Listing reads small files only: a checkpoint counts as damaged when a file of its manifest is missing or has another
size; comparing every byte is `verify`. Deleting takes the run's lock first (`nanochat.runlock`), so that nothing a live
process writes is touched, and renames before it deletes, so that no half of a model ever bears its name. What processes
that died left behind, hidden folders all of them, is a `Leftover`.
"""

import json
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanochat.checkpoint import FILES, TRAINERS, Checkpoint, read_json, remove, saved_steps
from nanochat.common import UserError, atomic_write, base_dir, printable, reading
from nanochat.runlock import hold, writer


@dataclass(frozen=True)
class Model:
    """A run's folder as the listing shows it; None is not known.

    state: running (a live process writes it), damaged, imported, finished, or stopped: --resume=auto goes on with it.
    damaged: steps whose files are not all there. bytes: on disk, of the whole folder. pid: of a running one.
    """

    source: str
    tag: str
    steps: list[int]
    depth: int | None
    parameters: int | None
    bytes: int
    saved: str | None
    state: str
    damaged: list[int]
    val_bpb: float | None
    pid: int | None

    @property
    def name(self) -> str:
        return f"{self.source}/{self.tag}"


@dataclass(frozen=True)
class Leftover:
    """A hidden folder that no live process is writing. keep: why it is not to be removed, or nothing."""

    path: Path
    run: Path
    bytes: int
    keep: str = ""


def find_models(verify: bool = False) -> list[Model]:
    """Every run that has its own name, by source and tag. verify: read every byte of every checkpoint."""
    models = []
    for source in TRAINERS:
        for folder in _folders(base_dir() / "checkpoints" / source):
            if not folder.name.startswith("."):
                with reading(folder):
                    models.append(describe(folder, verify))
    return models


def describe(folder: Path, verify: bool = False) -> Model:
    """A run's folder, however damaged."""
    steps, pid = saved_steps(folder), writer(folder)
    damaged = [step for step in steps if not is_whole(place := step_folder(folder, step), verify) and place.exists()]
    newest = step_folder(folder, steps[-1]) if steps else folder
    meta = _json_or_nothing(newest / "meta.json")
    run = _json_or_nothing(folder / "run.json")
    config = meta.get("model_config")
    depth = config.get("n_layer") if isinstance(config, dict) else None
    return Model(
        source=folder.parent.name,
        tag=folder.name,
        steps=steps,
        depth=depth if isinstance(depth, int) else None,
        parameters=count_parameters(newest / "model.safetensors"),
        bytes=size_of(folder),
        saved=_date(newest),
        state="running" if pid is not None else _state(run, meta, bool(damaged) or not steps),
        damaged=damaged,
        val_bpb=last_bpb(folder / "metrics.jsonl", meta),
        pid=pid,
    )


def _date(path: Path) -> str | None:
    """When a folder was last changed; None if it is gone meanwhile."""
    with suppress(OSError):
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    return None


def _state(run: dict[str, Any], meta: dict[str, Any], is_damaged: bool) -> str:
    if is_damaged or not meta:
        return "damaged"
    if "imported" in meta:
        return "imported"
    return "finished" if run.get("status") == "finished" else "stopped"


def step_folder(folder: Path, step: int) -> Path:
    """The folder of a checkpoint, as it is written: step numbers have six digits or more."""
    return folder / f"step_{step:06d}"


def is_whole(checkpoint: Path, verify: bool = False) -> bool:
    """Whether the files of a checkpoint are all there in their sizes, or, to verify, byte for byte."""
    try:
        if verify:
            Checkpoint.open(checkpoint)
            return True
        files = read_json(checkpoint / "manifest.json")["files"]
        return set(files) >= FILES and all((checkpoint / n).stat().st_size == f["bytes"] for n, f in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def count_parameters(weights: Path) -> int | None:
    """Numbers in a file of weights, by its header alone; None where it cannot be read."""
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
        return sum(math.prod(shape) for shape in shapes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def last_bpb(metrics: Path, meta: dict[str, Any]) -> float | None:
    """The newest validation result of a run, or the one an imported model brought along."""
    imported = meta.get("imported")
    found = imported.get("val_bpb") if isinstance(imported, dict) else None
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    for line in reversed(lines):
        if '"val_bpb"' in line and isinstance(value := _value(line, "val_bpb"), float):
            return value
    return found if isinstance(found, float) else None


def _value(line: str, name: str) -> Any:
    try:
        return json.loads(line)[name]
    except (ValueError, KeyError, TypeError):
        return None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what disappears meanwhile does not count."""
    total = 0
    for place in [path, *path.rglob("*")]:
        with suppress(OSError):
            info = place.lstat()
            total += 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    return total


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


# Deleting --------------------------------------------------------------------------------------------------------


def find_run(source: str, tag: str) -> Path:
    """The folder of a run that may be deleted.

    Raises UserError where there is none, and for one that is not really inside the base folder.
    """
    parent = base_dir() / "checkpoints" / source
    names = [folder.name for folder in _folders(parent) if not folder.name.startswith(".")]
    if tag not in names:
        there = ", ".join(map(printable, names)) or "no models"
        raise UserError(f"--delete={source}/{tag}: {parent} has {there}")
    check_inside(parent / tag)
    return parent / tag


def check_inside(path: Path) -> None:
    """Raise UserError for a link, and for a path that links lead out of the base folder."""
    root = base_dir().resolve()
    if path.is_symlink() or not path.resolve().is_relative_to(root):
        raise UserError(
            f"{path}: a link, or behind one that leads out of {root}; what it points to is never deleted, remove it "
            "by hand"
        )


def find_target(folder: Path, step: int | None) -> Path:
    """What is to be deleted: a run, or one of its checkpoints if that is not the only one. UserError if it may not."""
    if step is None:
        return folder
    steps = saved_steps(folder)
    if step not in steps:
        raise UserError(f"--step={step}: {folder} has {', '.join(map(str, steps)) or 'no checkpoints'}")
    if steps == [step]:
        raise UserError(f"--step={step}: the only checkpoint of {folder}; to delete the whole run leave --step out")
    check_inside(step_folder(folder, step))
    return step_folder(folder, step)


def delete(folder: Path, step: int | None = None) -> None:
    """Delete a run, or one checkpoint of it. Raises UserError if a live process writes the run, or for its only one."""
    with hold(folder) as lock:
        target = find_target(folder, step)
        if step is not None and step == saved_steps(folder)[-1]:
            reopen(folder)
        try:
            remove(target)
        except OSError as error:
            raise UserError(f"{target}: could not be deleted ({error.strerror})") from error
        if os.path.lexists(rest := target.with_name(f".{target.name}.old")):
            raise UserError(
                f"{rest}: could not be removed, {target} is gone; look at its permissions, then use --clean"
            )
        if step is None:
            lock.discard()


def reopen(folder: Path) -> None:
    """Mark a run that loses its last checkpoint as not finished, so that --resume=auto makes that one again."""
    record = _json_or_nothing(folder / "run.json")
    if record.get("status") == "finished":
        with atomic_write(folder / "run.json") as path:
            path.write_text(json.dumps({**record, "status": "running"}, indent=1), encoding="utf-8")


def find_leftovers() -> list[Leftover]:
    """What dead processes left behind in the base folder's checkpoints."""
    return [leftover for source in TRAINERS for leftover in _leftovers_of(base_dir() / "checkpoints" / source)]


def _leftovers_of(parent: Path) -> Iterator[Leftover]:
    for path in _folders(parent):
        hidden: list[tuple[Path, Path]] = []
        if match := re.fullmatch(r"\.(.+)\.(old|new)", path.name):
            hidden = [(path, parent / match[1])]
        elif not path.name.startswith("."):
            hidden = [
                (inside, path) for inside in _folders(path) if re.fullmatch(r"\.step_\d+\.(tmp|old)", inside.name)
            ]
        for leftover, run in hidden:
            if writer(run) is None:
                yield Leftover(leftover, run, size_of(leftover), _reason_to_keep(leftover, run))


def _reason_to_keep(leftover: Path, run: Path) -> str:
    """A run's process may have died between two renamings: then what is hidden is all there is of the run."""
    if run.exists() or not any(is_whole(step_folder(leftover, step)) for step in saved_steps(leftover)):
        return ""
    return f"holds a whole model, and the name {run.name} is free: rename it to that, or remove it by hand"


def clean(leftover: Leftover) -> None:
    """Remove a left-over folder. Raises UserError if a process has come to life that may use it."""
    check_inside(leftover.path)
    with hold(leftover.run) as lock:
        if not _reason_to_keep(leftover.path, leftover.run):
            shutil.rmtree(leftover.path, ignore_errors=True)
        if leftover.path.exists():
            raise UserError(f"{leftover.path}: could not be removed; look at its permissions")
        if not leftover.run.exists():
            lock.discard()
