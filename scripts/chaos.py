"""Kill real training runs at random moments, fail their disk, and show that nothing is lost.

    python -m scripts.chaos --trials=50 --seed=1
    python -m scripts.chaos --trials=12 --stages=base --json
    python -m scripts.chaos --seed=1 --only-trial=17 --keep-failures      # one trial of a series again

A trial starts a stage as a process of its own with --resume=auto, lets a fault befall it, starts it again, until it has
finished; then weights, optimizer, data position and every step's loss must be those of a run that nothing befell. After
every death the newest checkpoint has to be whole and no older than before. The seed decides stage, faults and moments
(nanochat/chaos/faults.py); what must hold is in nanochat/chaos/verify.py and told in docs/resume.md. All happens in a
temporary folder. Leaves with 0 only if nothing was lost.
"""

import shutil
import signal
import sys
import tempfile
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from nanochat import cli
from nanochat.common import UserError, prepare_process, to_json

if TYPE_CHECKING:
    from nanochat.chaos.trials import Outcome

REPOSITORY = Path(__file__).resolve().parents[1]


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    parser.flag("--trials", cli.positive_int, 50, "how many")
    parser.flag("--seed", cli.seed, 1, "of stages, faults and moments")
    parser.flag("--stages", cli.some_text, "base,sft", "stages to strike, joined by commas")
    parser.flag("--jobs", cli.number_between(1, 64, whole=True), 2, "trials at a time")
    parser.flag("--only-trial", cli.non_negative_int, None, "run this trial of the series only, numbered from 0")
    parser.switch("--strict-exits", "demand of every fault the exit code it should lead to, and no stray files")
    parser.switch("--keep-failures", "keep the folders of trials that failed, and say where they are")
    parser.switch("--json", "print one JSON object as the last line")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process()
    from nanochat.chaos.faults import build_shim
    from nanochat.chaos.trials import STAGES, World, draw_trial, usable_kinds

    began = monotonic()
    names = [name.strip() for name in args.stages.split(",")]
    if unknown := [name for name in names if name not in STAGES]:
        raise UserError(f"--stages={args.stages}: {', '.join(unknown)} unknown; there are {', '.join(STAGES)}")
    root = Path(tempfile.mkdtemp(prefix="nanochat-chaos-")).resolve()
    stop, outcomes, is_kept = threading.Event(), [], False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up then, too
    pool = ThreadPoolExecutor(args.jobs)
    try:
        shim = build_shim(root)
        kinds = usable_kinds(shim)
        if shim is None:
            print("note: no C compiler, or not Linux: of a failing disk only file-size-limit (RLIMIT_FSIZE) is tried")
        numbers = range(args.trials) if args.only_trial is None else [args.only_trial]
        trials = [draw_trial(args.seed, number, names, kinds) for number in numbers]
        world = World(root, REPOSITORY, sys.executable, shim, stop)
        world.prepare(trials, pool)
        print(
            f"references made in {monotonic() - began:.0f} s; {len(trials)} trials, {args.jobs} at a time", flush=True
        )
        for future in as_completed([pool.submit(trial.run, world, args.strict_exits) for trial in trials]):
            outcomes.append(future.result())
            show(outcomes[-1], args)
        is_kept = args.keep_failures and any(outcome.loss for outcome in outcomes)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
        if not is_kept:
            shutil.rmtree(root, ignore_errors=True)
    summary = summarize(outcomes) | {"shim": shim is not None, "seed": args.seed, "seconds": monotonic() - began}
    show_table(summary)
    if args.json:
        print(to_json(summary))
    if summary["failed"]:
        raise SystemExit(1)


def show(outcome: "Outcome", args: Namespace) -> None:
    """One line per trial; of one that failed, what happened and how to see it again. Its folder goes, unless kept."""
    print(outcome)
    if outcome.loss:
        again = f"python -m scripts.chaos --seed={args.seed} --stages={args.stages} --only-trial={outcome.number}"
        strict = " --strict-exits" if args.strict_exits else ""
        print(f"    {outcome.message}\n    again: {again}{strict} --keep-failures")
        print(f"    kept in {outcome.folder}" if args.keep_failures else outcome.log_tail)
    sys.stdout.flush()
    if not (outcome.loss and args.keep_failures):
        shutil.rmtree(outcome.folder, ignore_errors=True)


def summarize(outcomes: Sequence["Outcome"]) -> dict:
    """All trials as one record; `faults` counts those that truly struck, of those that were planned."""
    from nanochat.chaos.faults import KINDS
    from nanochat.chaos.verify import Lost

    planned = Counter(fault.kind.name for outcome in outcomes for fault in outcome.faults)
    struck = Counter(fault.kind.name for outcome in outcomes for fault in outcome.faults if fault.struck)
    losses = Counter(outcome.loss for outcome in outcomes if outcome.loss)
    return {
        "trials": len(outcomes),
        "failed": sum(losses.values()),
        "restarts": sum(outcome.restarts for outcome in outcomes),
        "faults": {name: [struck[name], planned[name]] for name in KINDS if planned[name]},
        "kills": sum(struck[name] for name in KINDS if name.startswith("kill")),
        "kills_in_a_save": sum(outcome.kills_in_save for outcome in outcomes),
        **{kind.replace(" ", "_"): losses[kind] for kind in Lost.KINDS},
        "unexpected_exits": sum(len(outcome.unexpected_exits) for outcome in outcomes),
        "stray_files": sum(len(outcome.stray_files) for outcome in outcomes),
    }


def show_table(summary: dict) -> None:
    print("\nfault              struck  planned")
    for name, (struck, planned) in summary["faults"].items():
        print(f"{name:<18} {struck:>6} {planned:>8}")
    print()
    for name, value in summary.items():
        if name != "faults":
            print(f"{name.replace('_', ' '):<24} {f'{value:.0f}' if name == 'seconds' else value}")


if __name__ == "__main__":
    cli.run(main)
