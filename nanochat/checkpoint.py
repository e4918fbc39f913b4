"""Checkpoints on disk: one appears whole or not at all, and says itself whether it is intact.

    <base>/checkpoints/<source>/<tag>/     source: base, mid, sft, rl; the folder of one run (train/run.py)
        step_000100/
            model.safetensors  optimizer.safetensors  loader.safetensors
            meta.json  tokenizer.json      configuration, progress, loader position; the tokenizer lives with the model
            manifest.json                  size and SHA-256 of each file above, written last

A checkpoint is written to a hidden folder, synced, and renamed into place. So what bears the name `step_N` is complete,
and a crash or a full disk leaves the previous one as the newest.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from nanochat.common import UserError, base_dir, sync_file
from nanochat.config import ModelConfig
from nanochat.model.gpt import GPT, empty_model
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import Tokenizer

FILES = {"model.safetensors", "optimizer.safetensors", "loader.safetensors", "meta.json", "tokenizer.json"}


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
    def open(cls, folder: Path, verify: bool = True) -> "Checkpoint":
        """Raises UserError naming the first file that is missing or damaged. verify: read every byte."""
        files = read_json(folder / "manifest.json").get("files")
        if not isinstance(files, dict) or set(files) != FILES:
            raise UserError(f"{folder / 'manifest.json'}: does not list the files of a checkpoint; delete {folder}")
        for name, expected in files.items():
            path = folder / name
            if not path.is_file() or (verify and expected != describe_file(path)):
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

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        return str(read_json(self.folder / "manifest.json")["files"]["model.safetensors"]["sha256"])

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    def load_model(self, model: GPT) -> None:
        """Copy the weights into a model of the same configuration."""
        saved = TensorFile(self.folder / "model.safetensors")
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
        if "imported" in self.meta:
            raise UserError(
                f"{self.folder}: an imported model has no optimizer state to go on with; start a new stage from it, "
                "for example chat_sft --base-tag"
            )
        optimizer.load_state_dict(TensorFile(self.folder / "optimizer.safetensors"))

    def load_loader(self, loader: Resumable) -> None:
        loader.load_state({**self.meta["loader"], **load_arrays(self.folder / "loader.safetensors")})


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for: ranks that own a part need not hold all."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return cast(Tensor, self._file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
        check_space(folder.parent, sum(num_bytes(group.values()) for group in tensors.values()))
        for name, group in tensors.items():
            unshared = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            save_tensors(unshared, temporary / f"{name}.safetensors")
        save_arrays(dict(arrays), temporary / "loader.safetensors")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        (temporary / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        files = {path.name: describe_file(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync_file(path)
        if folder.exists():
            remove(folder)
        os.replace(temporary, folder)
        sync_file(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        steps = saved_steps(folder.parent)
        kept = f"step {steps[-1]} is the last one saved: continue with --resume=auto" if steps else "none is saved yet"
        raise UserError(f"{folder}: could not be saved ({error}); free some space; {kept}") from error


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise OSError (no space left) where the disk of `folder` has less room than that."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        reason = f"{needed_bytes / 1e9:.2f} GB are needed and {free_bytes / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, reason)


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the checkpoint was trained with this tokenizer."""
    if checkpoint.meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{checkpoint.folder}: trained with another tokenizer (fingerprint {checkpoint.meta['tokenizer'][:12]}, "
            f"given {tokenizer.fingerprint[:12]}); use the one saved in that folder, or train a new model"
        )


TRAINERS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


def find_checkpoint(source: str, tag: str = "", step: int | None = None, prefix: str = "model") -> Checkpoint:
    """A saved model: by default the deepest, of equals the newest, at its last step.

    Raises UserError saying what there is. prefix: of the flags that gave tag and step, for that message.
    """
    folder = base_dir() / "checkpoints" / source
    tags = [path for path in folder.iterdir() if path.name[0] != "." and saved_steps(path)] if folder.is_dir() else []
    if not tags:
        elsewhere = ", ".join(s for s in TRAINERS if s != source and (base_dir() / "checkpoints" / s).is_dir())
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
    """Of a run's last checkpoint, whatever the tag; one that cannot be read counts as depth -1."""
    try:
        meta = read_json(folder / f"step_{saved_steps(folder)[-1]:06d}" / "meta.json")
        depth = int(meta["model_config"]["n_layer"])
    except (UserError, KeyError, TypeError, ValueError):
        depth = -1
    return depth, folder.stat().st_mtime


def read_json(path: Path) -> dict[str, Any]:
    # A checkpoint is whole or worthless; run.json stands beside checkpoints that are as good without it.
    advice = "remove that one file" if path.name == "run.json" else f"the checkpoint is damaged, delete {path.parent}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; {advice}")
    return content


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint's folder; at no time does a part of it bear its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
