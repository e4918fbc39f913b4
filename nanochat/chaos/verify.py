"""What must hold of a run that was struck: nothing that stood is lost, and the end is that of an undisturbed run.

After every death: the newest checkpoint that bears a name is as its manifest says, it is not older than one that was
seen before, and every step it counts has its record. At the end: weights, optimizer, data position and progress are the
reference's bit for bit (or within a tolerance, where other numbers of ranks took part), and so is the record of every
step, once each, in order, and the step that is kept as the best.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nanochat.checkpoint import Checkpoint, read_json, saved_steps
from nanochat.common import UserError
from nanochat.train.metrics import read_lines, read_metrics
from nanochat.train.run import replaced_folder

STATE_FILES = ("model.safetensors", "optimizer.safetensors", "loader.safetensors")
EXACT_RECORD = ("step", "loss_raw", "loss", "val_bpb", "lr", "tokens", "skipped")
EXACT_PROGRESS = ("steps", "tokens", "smooth_loss", "smooth_weight")  # the rest is time


class Lost(Exception):
    """Something that must survive did not. kind: what it was."""

    KINDS = (
        "unreadable checkpoints",
        "lost runs",
        "steps lost",
        "metrics wrong",
        "weights differing",
        "hangs",
        "exits",
    )

    def __init__(self, kind: str, message: str) -> None:
        assert kind in self.KINDS, kind
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Tolerance:
    """How far an end may be from the reference's. Zero: bit for bit."""

    loss: float = 0.0
    weights: float = 0.0  # of the largest weight of each tensor

    @property
    def is_exact(self) -> bool:
        return self.loss == self.weights == 0.0


@dataclass(frozen=True)
class End:
    """Where a run came to: its last checkpoint, opened, its records, and which step it remembers as the best."""

    checkpoint: Checkpoint
    records: list[dict[str, Any]]
    best: dict[str, Any] | None

    @classmethod
    def of(cls, folder: Path) -> "End":
        """Raises Lost where one of them cannot be read, or the run does not say that it has finished."""
        checkpoint = open_newest(folder)
        lines = read_lines(folder / "metrics.jsonl")
        records = read_records(folder)
        if len(records) != len(lines):
            raise Lost("metrics wrong", f"{folder}: {len(lines) - len(records)} damaged records in metrics.jsonl")
        run = read_json(folder / "run.json")
        if run.get("status") != "finished":
            raise Lost("lost runs", f"{folder}: the command ended well, but the run is not marked as finished")
        return cls(checkpoint, records, run.get("best"))


def open_newest(folder: Path) -> Checkpoint:
    """The newest checkpoint that bears a name, every byte of it looked at."""
    steps = saved_steps(folder)
    if not steps:
        raise Lost("lost runs", f"{folder}: holds no checkpoint")
    try:
        checkpoint = Checkpoint.open(folder / f"step_{steps[-1]:06d}")
        read_json(folder / "run.json")
    except UserError as error:
        raise Lost("unreadable checkpoints", str(error)) from error
    if checkpoint.step != steps[-1]:
        raise Lost("unreadable checkpoints", f"{checkpoint.folder}: says that it is step {checkpoint.step}")
    return checkpoint


def read_records(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(folder / "metrics.jsonl")
    except UserError as error:
        raise Lost("metrics wrong", str(error)) from error


def check_after_death(folder: Path, newest_before: int, previous_step: int = -1) -> int:
    """The newest checkpoint's step; -1 if there is none and never was. Raises Lost.

    newest_before: the newest that was seen to stand. previous_step: that of the earlier run which this one replaces; it
    may stand, or one of the new run.
    """
    folder = standing(folder)
    if newest_before < 0 and not saved_steps(folder):
        return -1
    checkpoint = open_newest(folder)
    if generation(checkpoint.step, previous_step) < generation(newest_before, previous_step):
        raise Lost("steps lost", f"{folder}: step {newest_before} stood before, now the newest is {checkpoint.step}")
    wanted = range(checkpoint.step)
    there = [record["step"] for record in read_records(folder) if record["step"] < checkpoint.step]
    if there != list(wanted):
        missing = sorted(set(wanted) - set(there))
        raise Lost("metrics wrong", f"{folder}: step {checkpoint.step} is saved, its records are {there} ({missing=})")
    return checkpoint.step


def standing(folder: Path) -> Path:
    """The run's folder; where a replacement died between its two renames, that of the earlier run, which the next start
    puts back."""
    earlier = replaced_folder(folder)
    return earlier if earlier.is_dir() and not folder.exists() else folder


def generation(step: int, previous_step: int) -> tuple[int, int]:
    """Orders what stands: nothing, the replaced run's checkpoint, the new run's."""
    return (0 if step < 0 else 1 if step == previous_step else 2), step


def check_end(folder: Path, reference: End, tolerance: Tolerance) -> None:
    """Raise Lost unless the run in `folder` has ended as the reference did."""
    end = End.of(folder)
    if end.checkpoint.step != reference.checkpoint.step:
        raise Lost("steps lost", f"{folder}: ended at step {end.checkpoint.step}, not {reference.checkpoint.step}")
    steps = [record["step"] for record in end.records]
    if steps != list(range(reference.checkpoint.step + 1)):
        raise Lost("metrics wrong", f"{folder}: the records are of steps {steps}")
    for ours, theirs in zip(end.records, reference.records, strict=True):
        compare_records(ours, theirs, tolerance.loss)
    if tolerance.is_exact and end.best != reference.best:
        raise Lost("metrics wrong", f"{folder}: the best step is {end.best}, undisturbed it was {reference.best}")
    differences = list(state_differences(end.checkpoint, reference.checkpoint, tolerance))
    if differences:
        raise Lost("weights differing", f"{folder}: {'; '.join(differences[:4])}")


def compare_records(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    for name in EXACT_RECORD:
        a, b = ours.get(name), theirs.get(name)
        is_close = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= tolerance
        if a != b and not is_close:
            raise Lost("metrics wrong", f"step {theirs['step']}: {name} is {a!r}, undisturbed it was {b!r}")


def state_differences(ours: Checkpoint, theirs: Checkpoint, tolerance: Tolerance) -> Iterator[str]:
    """What of the state that a checkpoint brings back is not the reference's, in words."""
    for name in STATE_FILES if tolerance.is_exact else STATE_FILES[:1]:
        yield from tensor_differences(ours.folder / name, theirs.folder / name, tolerance.weights)
    if tolerance.is_exact:
        yield from value_differences("progress", ours.meta, theirs.meta, EXACT_PROGRESS)
        yield from value_differences("loader", ours.meta, theirs.meta, sorted(theirs.meta["loader"]))


def tensor_differences(ours: Path, theirs: Path, tolerance: float) -> Iterator[str]:
    a, b = load_file(ours), load_file(theirs)
    if a.keys() != b.keys():
        yield f"{ours.name} has other tensors: {sorted(a.keys() ^ b.keys())[:4]}"
        return
    for name in b:
        if a[name].dtype != b[name].dtype or a[name].shape != b[name].shape:
            yield f"{ours.name}: {name} has another type or shape"
        elif not tolerance and a[name].numpy().tobytes() != b[name].numpy().tobytes():
            yield f"{ours.name}: {name} differs"
        elif tolerance and b[name].numel():
            largest = max(float(b[name].abs().max()), 1e-9)
            distance = float((a[name].double() - b[name].double()).abs().max()) / largest
            if not distance <= tolerance:
                yield f"{ours.name}: {name} is {distance:.2g} of its largest value away"


def value_differences(part: str, ours: dict[str, Any], theirs: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        a, b = json.dumps(ours[part].get(name)), json.dumps(theirs[part].get(name))
        if a != b:
            yield f"{part}: {name} is {a:.40}, undisturbed it was {b:.40}"
