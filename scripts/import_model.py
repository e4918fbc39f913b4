"""Take over a model of the ancestor, karpathy/nanochat: its weights, sizes and tokenizer become a checkpoint of ours.

    python -m scripts.import_model --from=chatsft_checkpoints/d20 --tag=d20
    python -m scripts.import_model --from=nanochat-d32 --tag=d32 --source=sft --step=650
    python -m scripts.import_model --from=base_checkpoints/d20 --tag=d20 --tokenizer=tokenizer

Then `python -m scripts.chat_cli --model-tag=d20`, and all other recipes that take a model. The folder has
model_NNNNNN.pt, meta_NNNNNN.json and tokenizer.pkl. Nothing in them is run: pickles are read, never loaded. What our
model would compute otherwise is refused. docs/checkpoints.md says which models can be taken over.
"""

import math
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat import cli
from nanochat.common import UserError, atomic_write, check_writable, to_json

if TYPE_CHECKING:
    from nanochat.ancestor import AncestorModel
    from nanochat.tokenizer import Tokenizer

SOURCE_OF = {
    "base_checkpoints": "base",
    "mid_checkpoints": "mid",
    "chatsft_checkpoints": "sft",
    "chatrl_checkpoints": "rl",
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    parser.flag("--from", cli.some_text, None, "folder of the ancestor's model", metavar="FOLDER")
    parser.flag("--tag", cli.folder_name, None, "its name here")
    parser.flag("--step", cli.non_negative_int, None, "which of several; else the newest")
    whence = "stage it comes from; empty: by the name of the folder around, as the ancestor has it"
    parser.flag("--source", cli.one_of("", "base", "mid", "sft", "rl"), "", whence)
    where = "folder of tokenizer.pkl; empty: the model's, or tokenizer/ two levels up"
    parser.flag("--tokenizer", str, "", where, metavar="FOLDER")
    parser.check(lambda args: None if vars(args)["from"] else "--from: not given; name the folder of the model")
    parser.check(lambda args: None if args.tag else "--tag: not given; choose a name for the model")
    parser.check(
        lambda args: (
            None
            if args.source or not vars(args)["from"] or source_of(Path(vars(args)["from"]))
            else f"--source: not given, and {vars(args)['from']} does not say it; choose one of base, mid, sft, rl"
        )
    )
    return parser.parse(argv)


def source_of(folder: Path) -> str:
    """The stage that a folder of the ancestor belongs to, or nothing."""
    return SOURCE_OF.get(folder.resolve().parent.name, "")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    folder = Path(vars(args)["from"])
    from nanochat.ancestor import read_model, read_tokenizer
    from nanochat.checkpoint import run_folder
    from nanochat.runlock import hold

    source = args.source or source_of(folder)
    target = run_folder(source, args.tag)
    check_free(target)
    check_writable(target)
    model = read_model(folder, args.step)
    tokenizer = read_tokenizer(tokenizer_folder(folder, args.tokenizer))
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{folder}: the model knows {model.config.vocab_size:,} tokens, its tokenizer {tokenizer.vocab_size:,}; "
            "give the folder of the right one with --tokenizer"
        )
    with hold(target):
        check_free(target)
        write(model, tokenizer, target, folder)
    parameters = sum(math.prod(tensor.shape) for tensor in model.stored.values())
    bpb = "" if model.val_bpb is None else f", val bpb {model.val_bpb:.4f} by its own meta"
    print(f"imported step {model.step} of {folder}: depth {model.config.n_layer}, {parameters:,} parameters{bpb}")
    print(f"a model of {model.era.name}; it is {target}")
    print(f"try: python -m scripts.chat_cli --source={source} --model-tag={args.tag}")


def check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(
            f"{target}: exists already; choose another --tag, or delete it with `python -m scripts.models "
            f"--delete={target.parent.name}/{target.name}`"
        )


def tokenizer_folder(folder: Path, given: str) -> Path:
    """Released models have the tokenizer beside them, the ancestor's base folder has one for all."""
    shared = folder.resolve().parent.parent / "tokenizer"
    is_beside = (folder / "tokenizer.pkl").exists() or not (shared / "tokenizer.pkl").exists()
    return Path(given) if given else folder if is_beside else shared


def write(model: "AncestorModel", tokenizer: "Tokenizer", target: Path, folder: Path) -> None:
    """The run's folder: made under a hidden name, so that it is there as a whole or not at all."""
    from nanochat.checkpoint import write_checkpoint

    meta = {
        "step": model.step,
        "model_config": model.config.to_dict(),
        "args": {},
        "progress": {},
        "tokenizer": tokenizer.fingerprint,
        "loader": {},
        "plan": model.plan(),
        "imported": {"from": str(folder), "era": model.era.name, "val_bpb": model.val_bpb},
    }
    hidden = target.with_name(f".{target.name}.new")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        tensors = {"model": model.tensors(), "optimizer": {}}
        write_checkpoint(hidden / f"step_{model.step:06d}", tensors, {}, meta, tokenizer)
        with atomic_write(hidden / "run.json") as path:
            path.write_text(to_json({"status": "finished", "args": {}, "inputs": {}}, indent=1), encoding="utf-8")
        os.replace(hidden, target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
