"""Find out what is wrong with this machine, by running each thing that training and chatting will need.

    python -m scripts.doctor
    python -m scripts.doctor --json                        # the last line is one JSON object
    python -m scripts.doctor --only=compile,attention      # only these
    python -m nanochat.doctor compile                      # one check with all that it prints, a traceback too

Every check runs in a process of its own with a time limit, so that whatever crashes or hangs is told and the others go
on. States: ok; slow, which works but less well than it should; missing, which is not there; failed, which is there and
does not work. The exit code is 0 if nothing that training needs is missing or failed, else 1. docs/doctor.md says what
each check does.
"""

import shutil
import signal
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from nanochat import cli
from nanochat.common import prepare_process, to_json
from nanochat.doctor.checks import CHECKS
from nanochat.doctor.isolation import Finding, examine
from nanochat.doctor.result import Request

COLOURS = {"ok": "32", "slow": "33", "missing": "33", "failed": "31"}
MARGIN = 21  # columns before a finding's words
PAPER = 10**6  # columns where nobody looks


def check_names(text: str) -> tuple[str, ...]:
    """Names of checks with commas between."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    known = [check.name for check in CHECKS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no such check: {', '.join(map(repr, unknown))}; choose some of {', '.join(known)}")
    return names


check_names.__name__ = "name,name"


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    parser.flag("--device-type", cli.one_of("", "cuda", "cpu", "mps", "xpu"), "", "device; empty: the best one here")
    parser.flag("--only", check_names, None, f"some of {', '.join(check.name for check in CHECKS)}; empty: all")
    parser.flag("--time-limit", cli.positive_float, None, "seconds for one check; else each has its own limit")
    parser.switch("--offline", "never use the network")
    parser.switch("--json", "end with one JSON object")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the checks then, too
    findings = []
    checks = [check for check in CHECKS if args.only is None or check.name in args.only]
    for finding in examine(checks, Request(args.device_type, args.offline), args.time_limit or float("inf")):
        show(finding)
        findings.append(finding)
    hindrances = [finding.check.name for finding in findings if finding.prevents_training]
    print(f"\ntraining will not work: see {', '.join(hindrances)}" if hindrances else "\nnothing hinders training")
    if args.json:
        print(to_json({"ok": not hindrances, "checks": [as_record(finding) for finding in findings]}))
    if hindrances:
        raise SystemExit(1)


def show(finding: Finding) -> None:
    """A line or a few: name, state, what was seen, and what to do."""
    name, result = finding.check.name, finding.result
    state = f"{result.state:<7}"
    if sys.stdout.isatty():
        state = f"\033[{COLOURS[result.state]}m{state}\033[0m"
    seen, *more = wrapped(result.seen)
    print(f"{name:<11} {state}  {seen}")
    for line in [*more, *(wrapped(f"-> {result.advice}") if result.advice else [])]:
        print(f"{' ' * MARGIN}{line}")
    sys.stdout.flush()


def wrapped(text: str) -> list[str]:
    """Lines that fit the terminal; one line where it is none."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PAPER
    return textwrap.wrap(text, max(40, width - MARGIN)) or [""]


def as_record(finding: Finding) -> dict[str, Any]:
    """The finding for programs."""
    check, result = finding.check, finding.result
    told = {"name": check.name, "state": result.state, "seen": result.seen, "advice": result.advice}
    return {**told, "needed": check.needed, "seconds": round(finding.seconds, 2), "numbers": result.numbers}


if __name__ == "__main__":
    cli.run(main)
