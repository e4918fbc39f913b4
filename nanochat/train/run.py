"""Runs: where training starts, continues and ends.

    <base>/checkpoints/<source>/<tag>/
        run.json           the command's flags, fingerprints of what it trains on, the best step, the end
        metrics.jsonl      one record per step
        step_000100/       checkpoints, see nanochat.checkpoint

A run is continued only with the flags it was started with, never replaced unless told so, and what it replaces stays
until its own first checkpoint stands. Kept are its last checkpoints (--keep-last), every N-th (--keep-every), and the
one with the lowest validation loss.
"""

import json
import math
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanochat.checkpoint import (
    Checkpoint,
    Resumable,
    check_tokenizer,
    num_bytes,
    read_json,
    remove,
    run_folder,
    saved_steps,
    write_checkpoint,
)
from nanochat.common import UserError, atomic_write, base_dir, print0, sync_file
from nanochat.machine import git_commit
from nanochat.model.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.runlock import RunLock, hold
from nanochat.tokenizer import Tokenizer

# Flags that may differ when a run goes on: they change where and how it is computed and shown, not what.
FREE_FLAGS = {"resume", "overwrite", "logger", "run", "compile", "device_type", "device_batch_size", "offline"}
FREE_FLAGS |= {"eval_every", "eval_tokens", "save_every", "keep_last", "keep_every", "grace_period", "reduce_dtype"}
FREE_FLAGS |= {"fp8", "fp8_recipe", "fp8_emulate"}
FREE_FLAGS |= {"data_dir", "data"}  # inputs are compared by content
HORIZON_FLAGS = {"num_iterations", "target_flops", "target_param_data_ratio", "time_budget", "num_epochs"}


class Run:
    """One training run: a folder, the point it starts from, and saving.

    A run that starts afresh lives in a hidden folder until its first checkpoint stands; only then does it take the
    place of what bore its tag before. So a new run that fails or is stopped early costs nothing.
    """

    def __init__(
        self,
        folder: Path,
        args: Namespace,
        rt: Runtime,
        checkpoint: Checkpoint | None,
        finished: bool,
        record: Mapping[str, Any],
    ) -> None:
        self.args, self.rt, self.checkpoint, self.is_finished = args, rt, checkpoint, finished
        self._inputs: dict[str, str] = {}
        self._first_inputs: dict[str, str] = record.get("inputs", {}) if checkpoint else {}
        self._lock: RunLock | None = None
        self._has_warned = False
        self._commit = git_commit() if rt.is_main else None
        best = record.get("best")
        self.final_folder = folder
        self.folder = folder if checkpoint else folder.with_name(f".{folder.name}.new")
        # Checkpoints of a run that is continued from an earlier step: they go once the first new one stands.
        self._steps = saved_steps(folder)
        self._stale = [step for step in self._steps if step > self.start] if checkpoint else []
        self._best = dict(best) if best and checkpoint and best["step"] <= self.start else None

    @classmethod
    def open(
        cls, source: str, tag: str, args: Namespace, rt: Runtime, inputs: Mapping[str, str] | None = None
    ) -> "Run":
        """Start or continue a run according to --resume and --overwrite in `args`; every rank calls this.

        inputs: see `check_inputs`. Raises UserError rather than replace a run that is finished or could be continued,
        unless told to, and where flags or inputs are not those of the run that is to be continued.
        """
        folder = run_folder(source, tag)
        if rt.is_main:
            undo_replacement(folder)
        rt.barrier()
        steps = saved_steps(folder)
        record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
        finished = record.get("status") == "finished"
        if args.resume == "no" and steps and not args.overwrite:
            hint = "" if finished else "continue it with --resume=auto, "
            raise UserError(
                f"{folder}: holds a {'finished' if finished else 'stopped'} run at step {steps[-1]}; {hint}replace it "
                "with --overwrite, or choose another --model-tag"
            )
        if finished and args.resume == "auto":
            finished = not horizon_changes(args, record.get("args", {}))  # a longer one goes on, a shorter is refused
        checkpoint = cls._resume_checkpoint(folder, steps, args.resume, rt.is_main)
        if checkpoint:
            check_flags(args, record.get("args", {}), folder, finished and args.resume == "auto")
        run = cls(folder, args, rt, checkpoint, finished and args.resume == "auto", record)
        run.check_inputs(inputs or {})
        return run

    @staticmethod
    def _resume_checkpoint(folder: Path, steps: list[int], resume: str | int, verify: bool) -> Checkpoint | None:
        if resume == "no" or (resume == "auto" and not steps):
            return None
        wanted = steps[-1] if resume in ("auto", "newest") and steps else resume
        if wanted not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"--resume={resume}: {folder} has no such checkpoint; there are: {there}")
        return Checkpoint.open(folder / f"step_{wanted:06d}", verify)  # one rank reads every byte, not all

    def claim(self) -> None:
        """Hold the run's lock, and clear the ground. For rank 0; `restore` does it."""
        self._lock = hold(self.final_folder)
        if saved_steps(self.final_folder) != self._steps:
            raise UserError(f"{self.final_folder}: another process has written this run just now; start again")
        if self.checkpoint is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            make_folder(self.folder)
        else:
            clear_remains(self.folder)
            if self._stale and (self.folder / "metrics.jsonl").exists():
                shutil.copyfile(self.folder / "metrics.jsonl", self.metrics_path)

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Note fingerprints of what is trained on, by name: "text", "base model".

        Raises UserError where a run is continued on something else than it was started on.
        """
        first = self._first_inputs
        changed = [name for name in inputs if first.get(name, inputs[name]) != inputs[name]]
        if changed:
            raise UserError(
                f"{self.folder}: was trained on another {' and another '.join(changed)} than the one given now; start "
                "it anew with --overwrite, or choose another --model-tag"
            )
        self._inputs |= inputs
        if not all(map(self.rt.agrees_on, inputs.values())):
            raise UserError(
                f"{self.folder}: the ranks see different inputs; wait until a download or a change of the files is over"
            )

    @property
    def start(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def saved_plan(self) -> dict[str, Any]:
        """The `plan` that `save` was given when the checkpoint to go on from was written; else empty."""
        return dict(self.checkpoint.meta["plan"]) if self.checkpoint else {}

    @property
    def metrics_path(self) -> Path:
        """Hidden while the run goes on from an earlier step: the record of the later ones stays until they go."""
        return self.folder / (".metrics.jsonl.new" if self._stale else "metrics.jsonl")

    @property
    def relative_metrics_path(self) -> str:
        """The metrics' place below the base folder, as records keep it."""
        return str((self.final_folder / "metrics.jsonl").relative_to(base_dir()))

    def check_horizon(self, num_steps: int) -> None:
        """Raise UserError where the run is past the end that it is now given."""
        if self.start > num_steps:
            raise UserError(
                f"{self.folder}: is at step {self.start} already, past the {num_steps} steps asked for; give a longer "
                "horizon, or an earlier checkpoint with --resume=STEP"
            )

    def restore(self, model: GPT, optimizer: MuonAdamW, loader: Resumable, tokenizer: Tokenizer) -> dict[str, Any]:
        """Put weights, optimizer and data position back to the checkpoint's, if there is one; return its progress.

        Until this is called nothing is written; from then on no other process can write this run. Raises UserError
        where one does, where model or tokenizer are not the checkpoint's, or the disk has no room for a checkpoint.
        """
        self.rt.barrier()  # all ranks have looked before the first changes anything
        if self.rt.is_main:
            self._check_space(num_bytes(model.parameters()) + optimizer.state_bytes)
            self.claim()
        if self.checkpoint is None:
            return {}
        saved, now = self.checkpoint.config.to_dict(), model.config.to_dict()
        changed = [f"{name}: {saved[name]} -> {now[name]}" for name in saved if saved[name] != now[name]]
        if changed:
            raise UserError(
                f"--resume: the model differs from {self.checkpoint.folder} ({'; '.join(changed)}); give the "
                "flags that make the saved one (after an update others than then), or another --model-tag"
            )
        check_tokenizer(self.checkpoint, tokenizer)
        self.checkpoint.load_model(model)
        self.checkpoint.load_optimizer(optimizer)
        self.checkpoint.load_loader(loader)
        print0(f"continuing from step {self.start} of {self.folder}")
        if (earlier := self.checkpoint.meta.get("dtype", str(model.dtype))) != str(model.dtype):
            print0(f"note: it was trained in {earlier} and goes on in {model.dtype}, with slightly other numbers")
        return dict(self.checkpoint.meta["progress"])

    def save(
        self,
        step: int,
        model: GPT,
        optimizer: MuonAdamW,
        loader: Resumable,
        tokenizer: Tokenizer,
        progress: Mapping[str, Any],
        plan: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint, then drop those that are not to be kept. All ranks call this.

        progress: what the loop needs to go on. plan: what a later stage inherits (total_batch_tokens, base_rates).
        """
        if step == self.start and self.checkpoint is not None:
            return
        began = time.perf_counter()
        state, optimizer_state = loader.state(), optimizer.state_dict()
        if self.rt.is_main:
            arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
            meta = {
                "step": step,
                "model_config": model.config.to_dict(),
                "args": vars(self.args),
                "progress": dict(progress),
                "tokenizer": tokenizer.fingerprint,
                "inputs": self._inputs,
                "commit": self._commit,
                "dtype": str(model.dtype),
                "loader": {name: value for name, value in state.items() if name not in arrays},
                "plan": dict(plan),
            }
            tensors: dict[str, Mapping[str, Tensor]] = {
                "model": dict(model.named_parameters()),
                "optimizer": optimizer_state,
            }
            write_checkpoint(self.folder / f"step_{step:06d}", tensors, arrays, meta, tokenizer)
            self._write_status("running")
            with self._tidying(step):
                self._take_place()
                self._drop([old for old in self._stale if old != step])
                self._replace_metrics()
                self._retire()
        self.folder = self.final_folder
        self.rt.barrier()
        self._compare_with_grace(time.perf_counter() - began)

    def _compare_with_grace(self, save_s: float) -> None:
        """Warn, once, where a signal would leave too little time for a checkpoint."""
        if save_s > 0.5 * self.args.grace_period and not self._has_warned:
            self._has_warned = True
            print0(
                f"warning: a checkpoint takes {save_s:.0f} s; --grace-period={self.args.grace_period:g} may be too "
                "short to save when a signal stops the run; give a longer one (and torchrun its --shutdown-timeout)"
            )

    def _replace_metrics(self) -> None:
        """The record of the branch takes the place of the one whose checkpoints are gone; an open file goes along."""
        hidden, self._stale = self.metrics_path, []
        if hidden != self.metrics_path and hidden.exists():
            os.replace(hidden, self.metrics_path)

    def note_validation(self, step: int, val_bpb: float) -> None:
        """Remember a saved step that is the best so far, and keep it."""
        is_better = math.isfinite(val_bpb) and (self._best is None or val_bpb < self._best["val_bpb"])
        if self.rt.is_main and is_better and step in saved_steps(self.folder):
            self._best = {"step": step, "val_bpb": val_bpb}
            self._write_status("running")
            with self._tidying(step):
                self._retire()

    @contextmanager
    def _tidying(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: step {step} is saved, but what it replaces could not be removed ({error}); look at "
                "the disk, then continue with --resume=auto"
            ) from error

    def _retire(self) -> None:
        """Drop the checkpoints that the flags do not ask to keep."""
        steps = saved_steps(self.folder)
        kept = {*steps[-self.args.keep_last :], self._best["step"] if self._best else None}
        every = self.args.keep_every
        self._drop([step for step in steps if step not in kept and not (every > 0 and step % every == 0)])

    def _check_space(self, checkpoint_bytes: int) -> None:
        """Raise UserError where the checkpoints that will stand at a time do not fit on the disk."""
        most = self.args.keep_last + 2  # the best one, and one that is being written
        count = 1 if self.args.save_every < 0 else max(1, most - len(saved_steps(self.folder)))
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        if free_bytes < count * checkpoint_bytes:
            raise UserError(
                f"{self.folder}: {count} more checkpoints of {checkpoint_bytes / 1e9:.2f} GB each will be written "
                f"(--keep-last={self.args.keep_last}), but only {free_bytes / 1e9:.2f} GB are free; free some space, "
                "set NANOCHAT_BASE_DIR to a larger disk, or keep fewer"
            )

    def _take_place(self) -> None:
        """Move from the hidden folder to the run's own."""
        if self.folder != self.final_folder:
            replaced = replaced_folder(self.final_folder)
            shutil.rmtree(replaced, ignore_errors=True)
            if self.final_folder.exists():
                os.replace(self.final_folder, replaced)
            os.replace(self.folder, self.final_folder)
            sync_file(self.final_folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            self.folder = self.final_folder

    def _drop(self, steps: Sequence[int]) -> None:
        for step in steps:
            remove(self.folder / f"step_{step:06d}")

    def finish(self) -> None:
        """Mark the run as complete: it is never overwritten or continued silently."""
        self._write_status("finished")

    def _write_status(self, status: str) -> None:
        if self.rt.is_main:
            record = {"status": status, "args": vars(self.args), "inputs": self._inputs, "best": self._best}
            with atomic_write(self.folder / "run.json") as path:
                path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def replaced_folder(folder: Path) -> Path:
    """Where a run waits while another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def undo_replacement(folder: Path) -> None:
    """Give a run its name back that died between its first checkpoint and the last renaming.

    With an earlier run in between two renames: that one, as if the new one had died a moment earlier.
    """
    replaced, replacing = replaced_folder(folder), folder.with_name(f".{folder.name}.new")
    if folder.exists() or not saved_steps(replacing):
        return
    whole = replaced if replaced.is_dir() else replacing
    with hold(folder):
        try:
            os.replace(whole, folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be put back from {whole} ({error.strerror}); rename it") from error


def clear_remains(folder: Path) -> None:
    """Delete what a run that died has left half written or half deleted; it would stay for ever."""
    for path in [*folder.glob(".*"), replaced_folder(folder)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def horizon_changes(args: Namespace, first: Mapping[str, Any]) -> str:
    """How the flags of the horizon differ from those that a run was started with; empty if they do not."""
    return told_changes(args, [name for name in first if name in HORIZON_FLAGS], first)


def told_changes(args: Namespace, names: Iterable[str], first: Mapping[str, Any]) -> str:
    """`--flag: then -> now` of each that differs."""
    now = vars(args)
    pairs = [(name, first[name], now.get(name)) for name in names if first[name] != now.get(name)]
    shown = lambda value: "(not given)" if value in (None, "") else value  # noqa: E731
    return ", ".join(f"--{name.replace('_', '-')}: {shown(then)} -> {shown(new)}" for name, then, new in pairs)


def check_flags(args: Namespace, first: Mapping[str, Any], folder: Path, finished: bool) -> None:
    """Raise UserError where a run is continued with other flags than it was started with; a new horizon is allowed,
    and told."""
    told = told_changes(args, [name for name in first if name not in FREE_FLAGS | HORIZON_FLAGS], first)
    if told and finished:
        raise UserError(f"{folder}: finished with other flags ({told}); use --overwrite or another --model-tag")
    if told:
        raise UserError(
            f"{folder}: was started with other flags ({told}); give the earlier values, or another --model-tag"
        )
    if told := horizon_changes(args, first):
        print0(f"note: the horizon has changed ({told}); the schedule follows the new one")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another NANOCHAT_BASE_DIR") from error
