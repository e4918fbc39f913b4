"""Base training in a process that may take only so much more memory than it holds when everything is imported.

    python tests/limited.py MEGABYTES FLAG ...

The limit is set from inside: what libraries have reserved by then, on machines with GPUs far more addresses than there
is memory, does not count.
"""

import importlib
import resource
import sys
from pathlib import Path

import torch

from scripts import base_train

USED = ("dataset", "evals.bpb", "kernels.attention_ladder", "kernels.fp8", "loader", "loggers", "machine", "model.gpt")
USED += ("optim", "parallel", "tokenizer", "train.loop", "train.metrics", "train.passes", "train.run")


def main(megabytes: str, *flags: str) -> None:
    for name in USED:
        importlib.import_module(f"nanochat.{name}")
    torch.accelerator.current_accelerator(check_available=True)  # which wakes a GPU's driver
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + int(megabytes) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    base_train.main(flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
