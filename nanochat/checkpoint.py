"""Runs on disk. A checkpoint appears whole or not at all, and says itself whether it is intact.

    <base>/checkpoints/<source>/<tag>/     source: base, mid, sft, rl
        run.json                           the command's flags and whether the run has finished
        metrics.jsonl                      one record per step
        step_000100/
            model.safetensors  optimizer.safetensors  loader.safetensors
            meta.json  tokenizer.json      configuration, progress, loader position; the tokenizer lives with the model
            manifest.json                  size and SHA-256 of each file above, written last

A checkpoint is written to a hidden folder, synced, and renamed into place. So what bears the name `step_N` is complete,
and a crash or a full disk leaves the previous one as the newest.
"""

import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from nanochat.common import UserError, atomic_write, base_dir, print0, sync_file
from nanochat.config import ModelConfig
from nanochat.model.gpt import GPT, empty_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.tokenizer import Tokenizer

SOURCES = ("base", "mid", "sft", "rl")
KEEP_LAST = 2  # intermediate checkpoints kept while a run goes on


class Resumable(Protocol):
    """A loader whose position can be saved."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def run_folder(source: str, tag: str) -> Path:
    return base_dir() / "checkpoints" / source / tag


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name)))


@dataclass
class Checkpoint:
    """A checkpoint folder whose files agree with its manifest."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Raises UserError naming the first file that is missing or damaged."""
        manifest = read_json(folder / "manifest.json")
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                raise UserError(
                    f"{path}: missing or damaged (it differs from the manifest); delete {folder} and use an "
                    "older checkpoint with --resume=STEP or --step"
                )
        return cls(folder, read_json(folder / "meta.json"))

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.meta["model_config"])

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    def load_model(self, model: GPT) -> None:
        """Copy the weights into a model of the same configuration."""
        saved = load_tensors(self.folder / "model.safetensors")
        parameters = dict(model.named_parameters())
        assert saved.keys() == parameters.keys(), f"weights differ: {sorted(saved.keys() ^ parameters.keys())[:4]}"
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])

    def build_model(self, device: torch.device, dtype: torch.dtype) -> GPT:
        """The model, ready on `device`."""
        model = empty_model(self.config, device, dtype)
        self.load_model(model)
        return model

    def load_optimizer(self, optimizer: MuonAdamW) -> None:
        optimizer.load_state_dict(load_tensors(self.folder / "optimizer.safetensors"))

    def load_loader(self, loader: Resumable) -> None:
        loader.load_state({**self.meta["loader"], **load_arrays(self.folder / "loader.safetensors")})


class Run:
    """One training run: a folder, the point it starts from, and saving.

    A run that starts afresh lives in a hidden folder until its first checkpoint stands; only then does it take the
    place of what bore its tag before. So a new run that fails or is stopped early costs nothing.
    """

    def __init__(
        self, folder: Path, args: Namespace, rt: Runtime, checkpoint: Checkpoint | None, finished: bool
    ) -> None:
        self.args, self.rt, self.checkpoint, self.is_finished = args, rt, checkpoint, finished
        self.final_folder = folder
        self.folder = folder if checkpoint else folder.with_name(f".{folder.name}.new")
        # Checkpoints of a run that is continued from an earlier step: they go once the first new one stands.
        self._stale = [step for step in saved_steps(folder) if step > self.start] if checkpoint else []

    @classmethod
    def open(cls, source: str, tag: str, args: Namespace, rt: Runtime) -> "Run":
        """Start or continue a run according to --resume and --overwrite in `args`; every rank calls this.

        Raises UserError rather than replace a run that is finished or could be continued, unless told to, and where
        the flags are not those of the run that is to be continued.
        """
        folder = run_folder(source, tag)
        steps = saved_steps(folder)
        record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
        finished = record.get("status") == "finished"
        if args.resume == "no" and steps and not args.overwrite:
            hint = "" if finished else "continue it with --resume=auto, "
            raise UserError(
                f"{folder}: holds a {'finished' if finished else 'stopped'} run at step {steps[-1]}; {hint}replace it "
                "with --overwrite, or choose another --model-tag"
            )
        checkpoint = cls._resume_checkpoint(folder, steps, args.resume)
        if checkpoint:
            check_flags(args, record.get("args", {}), folder, finished and args.resume == "auto")
        run = cls(folder, args, rt, checkpoint, finished and args.resume == "auto")
        rt.barrier()  # all have looked before anybody changes anything
        if rt.is_main and checkpoint is None:
            shutil.rmtree(run.folder, ignore_errors=True)
            make_folder(run.folder)
        rt.barrier()
        return run

    @staticmethod
    def _resume_checkpoint(folder: Path, steps: list[int], resume: str | int) -> Checkpoint | None:
        if resume == "no" or (resume == "auto" and not steps):
            return None
        wanted = steps[-1] if resume in ("auto", "newest") and steps else resume
        if wanted not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"--resume={resume}: {folder} has no such checkpoint; there are: {there}")
        return Checkpoint.open(folder / f"step_{wanted:06d}")

    @property
    def start(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def check_horizon(self, num_steps: int) -> None:
        """Raise UserError where the run is past the end that it is now given."""
        if self.start > num_steps:
            raise UserError(
                f"{self.folder}: is at step {self.start} already, past the {num_steps} steps asked for; give a longer "
                "horizon, or an earlier checkpoint with --resume=STEP"
            )

    def restore(self, model: GPT, optimizer: MuonAdamW, loader: Resumable, tokenizer: Tokenizer) -> dict[str, Any]:
        """Put weights, optimizer and data position back to the checkpoint's, if there is one; return its progress.

        Raises UserError where model or tokenizer are not the checkpoint's.
        """
        if self.checkpoint is None:
            return {}
        saved, now = self.checkpoint.config.to_dict(), model.config.to_dict()
        changed = [f"{name}: {saved[name]} -> {now[name]}" for name in saved if saved[name] != now[name]]
        if changed:
            raise UserError(
                f"--resume: the model differs from {self.checkpoint.folder} ({'; '.join(changed)}); give the "
                "flags of the first run, or another --model-tag"
            )
        check_tokenizer(self.checkpoint, tokenizer)
        self.checkpoint.load_model(model)
        self.checkpoint.load_optimizer(optimizer)
        self.checkpoint.load_loader(loader)
        print0(f"continuing from step {self.start} of {self.folder}")
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
        """Write a checkpoint, then drop all but the last few.

        progress: what the loop needs to go on. plan: what a later stage inherits (total_batch_tokens, base_rates).
        """
        state = loader.state()
        if self.rt.is_main and (step != self.start or self.checkpoint is None):
            arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
            meta = {
                "step": step,
                "model_config": model.config.to_dict(),
                "args": vars(self.args),
                "progress": dict(progress),
                "tokenizer": tokenizer.fingerprint,
                "loader": {name: value for name, value in state.items() if name not in arrays},
                "plan": dict(plan),
            }
            tensors: dict[str, Mapping[str, Tensor]] = {
                "model": dict(model.named_parameters()),
                "optimizer": optimizer.state_dict(),
            }
            write_checkpoint(self.folder / f"step_{step:06d}", tensors, arrays, meta, tokenizer)
            self._write_status("running")
            self._take_place()
            self._drop([old for old in self._stale if old != step])
            self._stale = []
            self._drop(saved_steps(self.folder)[:-KEEP_LAST])
        self.folder = self.final_folder
        self.rt.barrier()

    def _take_place(self) -> None:
        """Move from the hidden folder to the run's own."""
        if self.folder != self.final_folder:
            replaced = self.final_folder.with_name(f".{self.final_folder.name}.old")
            shutil.rmtree(replaced, ignore_errors=True)
            if self.final_folder.exists():
                os.replace(self.final_folder, replaced)
            os.replace(self.folder, self.final_folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self.folder = self.final_folder

    def _drop(self, steps: Sequence[int]) -> None:
        for step in steps:
            shutil.rmtree(self.folder / f"step_{step:06d}")

    def finish(self) -> None:
        """Mark the run as complete: it is never overwritten or continued silently."""
        self._write_status("finished")

    def _write_status(self, status: str) -> None:
        if self.rt.is_main:
            record = {"status": status, "args": vars(self.args)}
            with atomic_write(self.folder / "run.json") as path:
                path.write_text(json.dumps(record, indent=1), encoding="utf-8")


# Flags that may differ when a run goes on: they change where and how it is computed and shown, not what.
FREE_FLAGS = {"resume", "overwrite", "logger", "run", "compile", "device_type", "device_batch_size", "offline"}
FREE_FLAGS |= {"eval_every", "eval_tokens", "save_every", "data_dir", "data"}  # the loader checks the data itself
HORIZON_FLAGS = {"num_iterations", "target_flops", "target_param_data_ratio", "time_budget", "num_epochs"}


def check_flags(args: Namespace, first: Mapping[str, Any], folder: Path, finished: bool) -> None:
    """Raise UserError where a run is continued with other flags than it was started with; a new horizon is allowed
    unless the run has finished, and told."""
    now = vars(args)
    changed = [name for name in first if name not in FREE_FLAGS and first[name] != now.get(name)]
    told = ", ".join(f"--{name.replace('_', '-')}: {first[name]} -> {now.get(name)}" for name in changed)
    if changed and finished:
        raise UserError(f"{folder}: finished with other flags ({told}); use --overwrite or another --model-tag")
    if set(changed) - HORIZON_FLAGS:
        raise UserError(f"{folder}: was started with other flags ({told}); give those, or another --model-tag")
    if changed:
        print0(f"note: the horizon has changed ({told}); the schedule follows the new one")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another NANOCHAT_BASE_DIR") from error


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """Write all files of a checkpoint beside `folder`, then rename. Raises UserError if the disk refuses."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            unshared = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            save_tensors(unshared, temporary / f"{name}.safetensors")
        save_arrays(dict(arrays), temporary / "loader.safetensors")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        (temporary / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())
        }
        (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            sync_file(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync_file(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        steps = saved_steps(folder.parent)
        kept = f"step {steps[-1]} is the last one saved: continue with --resume=auto" if steps else "none is saved yet"
        raise UserError(f"{folder}: could not be saved ({error}); free some space; {kept}") from error


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the checkpoint was trained with this tokenizer."""
    if checkpoint.meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{checkpoint.folder}: trained with another tokenizer (fingerprint {checkpoint.meta['tokenizer'][:12]}, "
            f"given {tokenizer.fingerprint[:12]}); use the one saved in that folder, or train a new model"
        )


TRAINERS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


def find_checkpoint(source: str, tag: str = "", step: int | None = None, prefix: str = "model") -> Checkpoint:
    """A saved model: by default the deepest tag (d<number>), else the newest, at its last step.

    Raises UserError saying what there is. prefix: of the flags that gave tag and step, for that message.
    """
    folder = base_dir() / "checkpoints" / source
    tags = [path for path in folder.iterdir() if path.name[0] != "." and saved_steps(path)] if folder.is_dir() else []
    if not tags:
        elsewhere = ", ".join(s for s in SOURCES if s != source and (base_dir() / "checkpoints" / s).is_dir())
        raise UserError(
            f"{folder}: no {source} model is there; train one with `python -m scripts.{TRAINERS[source]}`"
            + (f", choose another --source ({elsewhere})" if elsewhere else "")
            + ", or set NANOCHAT_BASE_DIR to where it is"
        )
    if tag and tag not in [path.name for path in tags]:
        raise UserError(f"--{prefix}-tag={tag}: {folder} has {', '.join(sorted(path.name for path in tags))}")
    chosen = folder / tag if tag else max(tags, key=depth_then_age)
    steps = saved_steps(chosen)
    if step is not None and step not in steps:
        raise UserError(f"--{prefix}-step={step}: {chosen} has {', '.join(map(str, steps))}")
    return Checkpoint.open(chosen / f"step_{steps[-1] if step is None else step:06d}")


def depth_then_age(folder: Path) -> tuple[int, float]:
    match = re.match(r"d(\d+)", folder.name)
    return int(match[1]) if match else -1, folder.stat().st_mtime


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the checkpoint is damaged, delete its folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; the checkpoint is damaged, delete its folder")
    return content


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
