"""How well a model predicts after so many seconds: the recipes as a user starts them, each run a process of its own.

Seconds are start-up, compilation and training; evaluations, saving and the tokenizer's training do not count. The
trained model is scored in three ways: on the first tokens of the validation text, on rows as the ancestor makes them
(`reference_rows`), and on every byte of whole documents (`compression`).
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, print0, read_record
from nanochat.machine import spread
from nanochat.train.metrics import read_metrics

SCORED_DOCUMENTS = 200
CURVE = ("step", "tokens", "train_s", "elapsed_s", "loss", "val_bpb")  # of a metrics record
KEPT = ("steps", "tokens", "startup_s", "train_s", "tokens_per_s", "peak_rss_bytes", "parameters")  # of a stage's


@dataclass(frozen=True)
class Recipes:
    """Scripts that are run with `base` as their base folder. data: flags that name the text."""

    base: Path
    data: tuple[str, ...]

    def run(self, name: str, *flags: str) -> float:
        """Run scripts.<name>; its output is shown. Returns its seconds, start included."""
        print0(f"scripts.{name} {shlex.join([*self.data, *flags])}")
        began = time.perf_counter()
        # `env` sets the folder: recipes read the environment nowhere but in common.py, and this one changes none
        python = ["env", f"NANOCHAT_BASE_DIR={self.base}", sys.executable]
        code = subprocess.run([*python, "-m", f"scripts.{name}", *self.data, *flags]).returncode
        if code:
            raise UserError(f"scripts.{name}: left with code {code}; its own message above says why")
        return time.perf_counter() - began

    def record(self, stage: str) -> dict[str, Any]:
        """What the stage that ran last has left."""
        return read_record(self.base / "report" / "stages" / f"{stage}.json")


def time_to_bpb(
    recipes: Recipes, seeds: Sequence[int], vocab_size: int, flags: Sequence[str], eval_tokens: int, device_type: str
) -> dict[str, Any]:
    """A tokenizer, and a run of scripts.base_train with these flags for each seed: scores, speed, curves."""
    tokenizer_s = recipes.run("tok_train", f"--vocab-size={vocab_size}")
    runs = [train_once(recipes, seed, flags, eval_tokens, device_type) for seed in seeds]
    val_bpb = {name: spread([run["val_bpb"][name] for run in runs]) for name in runs[0]["val_bpb"]}
    return {"val_bpb": val_bpb, "tok_train_s": tokenizer_s, "runs": runs}


def train_once(recipes: Recipes, seed: int, flags: Sequence[str], eval_tokens: int, device_type: str) -> dict[str, Any]:
    """One seed: what its stage record and its metrics say, and how the model scores."""
    tag = f"--model-tag=seed{seed}"
    same = [f"--eval-tokens={eval_tokens}", f"--device-type={device_type}"]
    wall_s = recipes.run("base_train", f"--seed={seed}", tag, *same, *flags)
    record = recipes.record("base_train")
    evaluated = [metrics for metrics in read_metrics(recipes.base / record["metrics"]) if "val_bpb" in metrics]
    ways: Mapping[str, Sequence[str]] = {
        "reference_rows": ["--reference-rows", f"--split-tokens={eval_tokens}"],
        "compression": ["--compare-compressors", f"--num-documents={SCORED_DOCUMENTS}"],
    }
    for way in ways.values():
        recipes.run("base_loss", tag, f"--device-type={device_type}", *way)
    return {
        "seed": seed,
        "val_bpb": {
            "reference_rows": recipes.record("reference_rows")["val_bpb"],
            "whole_documents": recipes.record("compression")["val_bpb"],
            "first_tokens": record["val_bpb"],
        },
        "seconds": record["startup_s"] + record["train_s"],
        **{key: record[key] for key in KEPT},
        "wall_s": wall_s,
        "over_time": [{key: metrics[key] for key in CURVE if key in metrics} for metrics in evaluated],
    }
