"""What runs/gpu_check.sh has found, as a table for dev/GPU.md and as one JSON object, the last line.

    python dev/gpu_report.py FOLDER --device=cuda --seconds=431

FOLDER holds NAME.log, NAME.code and NAME.seconds of each part, and the XML of tests. The exit code is 1 if one failed.
"""

import argparse
import json
import sys
import xml.etree.ElementTree as ET
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochat.common import to_json

LAST_WORDS = 15  # lines of a part that failed


def read_part(folder: Path, name: str) -> dict[str, Any]:
    """Exit code, seconds, and the JSON object at the end where there is one."""
    lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    code = int((folder / f"{name}.code").read_text())
    part: dict[str, Any] = {"name": name, "code": code, "seconds": int((folder / f"{name}.seconds").read_text())}
    if result := last_object(lines):
        part["result"] = result
    if code:
        part["last_words"] = lines[-LAST_WORDS:]
    return part


def last_object(lines: list[str]) -> dict[str, Any] | None:
    """The last line that is one. Something may warn behind it, and what ran out of time may leave half of it."""
    for line in reversed(lines):
        if line.startswith("{"):
            with suppress(ValueError):
                return dict(json.loads(line))
    return None


def count_tests(folder: Path) -> dict[str, Any]:
    """Tests by outcome, from pytest's XML, with the names of those that failed and the reasons of those skipped."""
    cases = list[ET.Element]()
    for path in sorted(folder.glob("*.xml")):
        with suppress(ET.ParseError):  # what ran out of time may leave half of it
            cases += ET.parse(path).getroot().iter("testcase")
    name = lambda case: f"{case.get('classname')}::{case.get('name')}"  # noqa: E731
    failed = [name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None]
    reasons = {name(case): found.get("message", "") for case in cases if (found := case.find("skipped")) is not None}
    return {"passed": len(cases) - len(failed) - len(reasons), "failed": failed, "skipped": reasons}


def speed(part: dict[str, Any]) -> dict[str, Any]:
    """The figures of a training benchmark that the table shows."""
    result = part["result"]
    figures, flags = result["figures"], result["flags"]
    return {
        "depth": flags["depth"],
        "precision": part["name"].partition("-")[2],
        "rows": flags["device_batch_size"],
        "length": flags["max_seq_len"],
        "parameters": figures["parameters"],
        "tokens_per_s": figures["tokens_per_s"]["median"],
        "mfu": figures["mfu"]["median"] if "mfu" in figures else None,  # None: a card that nobody knows
        "measured_peak_share": figures["matmul_peak_share"]["median"],
        "peak_device_bytes": figures["peak_device_bytes"],
        "first_step_s": figures["first_step_s"],
    }


def table(speeds: list[dict[str, Any]]) -> list[str]:
    """As Markdown. MFU is against the data sheet's dense bfloat16 peak, in FP8 too."""
    rows = ["| depth | precision | rows x length | tokens/s | MFU | of the measured peak | peak memory | first step |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for s in speeds:
        mfu = f"{s['mfu']:.1%}" if s["mfu"] is not None else "?"
        memory = f"{s['peak_device_bytes'] / 1e9:.1f} GB" if s["peak_device_bytes"] else "?"
        cells = [s["depth"], s["precision"], f"{s['rows']} x {s['length']:,}", f"{s['tokens_per_s']:,.0f}", mfu]
        cells += [f"{s['measured_peak_share']:.1%}", memory, f"{s['first_step_s']:.0f} s"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def report(folder: Path, device: str, seconds: int) -> dict[str, Any]:
    """Everything; `ok` where every part left with 0 and, on a GPU, tests have run."""
    parts = {path.stem: read_part(folder, path.stem) for path in sorted(folder.glob("*.code"))}
    tests = count_tests(folder)
    benchmarks = {name: part for name, part in parts.items() if "-" in name}
    speeds = [speed(part) for part in benchmarks.values() if part["code"] == 0 and "result" in part]
    failed = [name for name, part in parts.items() if part["code"] or (name in benchmarks and "result" not in part)]
    if device == "cuda" and not tests["passed"] and "training" not in failed:
        failed.append("training")  # all its tests were skipped: nothing was found out
    machine = next((part["result"]["machine"] for part in parts.values() if "machine" in part.get("result", {})), {})
    commit = next((part["result"]["commit"] for part in parts.values() if "commit" in part.get("result", {})), None)
    head = {"ok": not failed, "failed": failed, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "seconds": seconds}
    return {**head, "commit": commit, "machine": machine, "tests": tests, "speed": speeds, "parts": parts}


def show(found: dict[str, Any]) -> None:
    machine, tests = found["machine"], found["tests"]
    for name in found["failed"]:
        part = found["parts"][name]
        why = "ran out of time" if part["code"] in (124, 137) else f"left with code {part['code']}"
        why = why if part["code"] else "has found nothing out"
        print(f"\n{name} {why}:", *part.get("last_words", []), sep="\n    ")
    name = ", ".join(machine.get("gpus", [])) or machine.get("processor", "?")
    commit = (found["commit"] or "?")[:10] + ("+changes" if (found["commit"] or "").endswith("+changes") else "")
    print(f"\n### {name}, {found['date']}\n")
    versions = f"torch {machine.get('torch', '?')}, Python {machine.get('python', '?')}"
    print(f"Commit {commit}, {versions}, {found['seconds']} s in all.")
    counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped"
    reasons = "; ".join(sorted(set(tests["skipped"].values())))
    print(f"GPU tests: {counts}{f' ({reasons})' if reasons else ''}.\n")
    print(*table(found["speed"]), sep="\n")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=int, default=0)
    args = parser.parse_args()
    found = report(args.folder, args.device, args.seconds)
    show(found)
    print(to_json(found))
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
