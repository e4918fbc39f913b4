"""What models there are, and deleting them.

    python -m scripts.models                               # all checkpoints of the base folder, as a table
    python -m scripts.models --json
    python -m scripts.models --verify                      # read every byte and compare it with the manifests
    python -m scripts.models --delete=base/d12             # the whole run; asks first
    python -m scripts.models --delete=base/d12 --step=1000 --yes
    python -m scripts.models --clean                       # what runs that died left behind

A run that a live process is writing is never touched. What is deleted loses its name first, so a part of a model is
never taken for one. docs/checkpoints.md has the layout.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from nanochat import cli
from nanochat.common import UserError, base_dir, printable, to_json

if TYPE_CHECKING:
    from nanochat.inventory import Leftover, Model

SOURCES = ("base", "mid", "sft", "rl")
STATES = {
    "running": "running",
    "damaged": "damaged",
    "imported": "imported",
    "finished": "finished",
    "stopped": "stopped, --resume=auto goes on",
}


def run_name(text: str) -> tuple[str, str]:
    """A source and a tag."""
    source, slash, tag = text.partition("/")
    if not slash or source not in SOURCES or not tag:
        raise ValueError(f"must be SOURCE/TAG with one of {', '.join(SOURCES)}, for example base/d12")
    return source, cli.folder_name(tag)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    parser.flag("--delete", run_name, None, "the run to delete", metavar="SOURCE/TAG")
    parser.flag("--step", cli.non_negative_int, None, "with --delete: only this checkpoint of it")
    parser.switch("--clean", "remove what dead processes left behind")
    parser.switch("--yes", "do not ask", "-y")
    parser.switch("--json", "print JSON instead of a table")
    parser.switch("--verify", "compare every file with its manifest, not only the sizes")
    parser.check(lambda args: "--step: only with --delete" if args.step is not None and not args.delete else None)
    parser.check(lambda args: "--delete, --clean: give one of them" if args.delete and args.clean else None)
    parser.check(
        lambda args: (
            "--json, --verify: only to list" if (args.json or args.verify) and (args.delete or args.clean) else None
        )
    )
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from nanochat.inventory import find_leftovers, find_models

    if args.delete:
        delete_run(args)
    elif args.clean:
        clean_up(args)
    else:
        models, leftovers = find_models(args.verify), find_leftovers()
        if args.json:
            print(
                to_json({"models": [asdict(m) for m in models], "leftovers": [as_record(left) for left in leftovers]})
            )
        else:
            show(models, leftovers)


def as_record(leftover: "Leftover") -> dict[str, object]:
    return {"path": str(leftover.path), "bytes": leftover.bytes, "keep": leftover.keep}


# Listing ---------------------------------------------------------------------------------------------------------


def show(models: "list[Model]", leftovers: "list[Leftover]") -> None:
    print(f"{base_dir() / 'checkpoints'}: {len(models) or 'no'} model{'s' if len(models) != 1 else ''}")
    if models:
        heads = ("model", "steps", "depth", "parameters", "size", "val bpb", "saved (UTC)", "state")
        print_table([heads, *map(table_row, models)], right={2, 3, 4, 5})
    for leftover in leftovers:
        print(f"left over: {in_words(leftover)}")
    if any(not leftover.keep for leftover in leftovers):
        print("remove what is left over with --clean")


def in_words(leftover: "Leftover") -> str:
    kept = f": kept, it {leftover.keep}" if leftover.keep else ""
    return f"{printable(str(leftover.path))} ({size(leftover.bytes)}){kept}"


def table_row(model: "Model") -> tuple[str, ...]:
    state = STATES[model.state]
    if model.state == "running" and model.pid:
        state += f" (process {model.pid})"
    if model.damaged:
        steps = ", ".join(map(str, model.damaged))
        state += f" (step {steps})" if model.state == "damaged" else f", damaged: step {steps}"
    return (
        printable(model.name),
        steps_in_words(model.steps),
        "?" if model.depth is None else str(model.depth),
        "?" if model.parameters is None else f"{model.parameters:,}",
        size(model.bytes),
        "-" if model.val_bpb is None else f"{model.val_bpb:.4f}",
        (model.saved or "?").replace("T", " ")[:16],
        state,
    )


def steps_in_words(steps: list[int]) -> str:
    """All of a few, else the first and the last ones."""
    shown = [f"{step:,}" for step in steps]
    return " ".join(shown if len(shown) <= 4 else [shown[0], "...", *shown[-2:]]) or "none"


def size(count: int) -> str:
    """Bytes for people."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "B" else f"{value:.1f} {units[0]}"


def print_table(rows: "Sequence[Sequence[str]]", right: set[int]) -> None:
    """Aligned columns, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


# Deleting --------------------------------------------------------------------------------------------------------


def delete_run(args: Namespace) -> None:
    from nanochat.inventory import delete, describe, find_run, find_target

    source, tag = args.delete
    folder = find_run(source, tag)
    target, model = find_target(folder, args.step), describe(folder)
    if model.state != "running":  # else `delete` says who writes it
        details = f" ({len(model.steps)} checkpoints, {size(model.bytes)})" if args.step is None else ""
        confirm(f"delete {target}{details}?", args.yes)
    delete(folder, args.step)
    print(f"deleted {target}")


def clean_up(args: Namespace) -> None:
    from nanochat.inventory import clean, find_leftovers

    leftovers = find_leftovers()
    removable = [leftover for leftover in leftovers if not leftover.keep]
    for leftover in leftovers:
        print(in_words(leftover))
    if not removable:
        print("nothing to remove")
        return
    confirm(f"remove {len(removable)} of them?", args.yes)
    for leftover in removable:
        clean(leftover)
    print(f"removed {len(removable)}, {size(sum(leftover.bytes for leftover in removable))}")


def confirm(question: str, is_confirmed: bool) -> None:
    """Ask on the terminal. Raises UserError where the answer is not yes, or where nobody can be asked."""
    if is_confirmed:
        return
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted: nobody can be asked here, so confirm it with --yes")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("nothing was deleted")


if __name__ == "__main__":
    cli.run(main)
