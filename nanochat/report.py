"""The report: what a run achieved, what it cost, and how to do it again.

Each stage leaves a JSON record (`common.record_stage`); this module puts them together as `report.json` (for programs;
docs/report.md has the schema), `report.md` (for people) and `loss.png` in `<base>/report/`.

    python -m nanochat.report reset        forget the records of earlier runs
    python -m nanochat.report generate     write the report and copy report.md to the current folder
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.common import UserError, atomic_write, base_dir, print0, report_folder

SCHEMA = 1
STAGES = ("setup", "tok_train", "tok_eval", "base_train", "base_loss", "chat_sft", "chat_eval")


def parse_args(argv: Sequence[str] | None = None) -> tuple[str, Namespace]:
    parser = cli.Parser(__doc__)
    parser.flag("--command", str, "", "the command that reproduces this run, shown in the report")
    parser.flag("--setup-seconds", cli.non_negative_float, None, "what setting up the environment took")
    words = list(sys.argv[1:] if argv is None else argv)
    action = words.pop(0) if words and not words[0].startswith("-") else "generate"
    if action not in ("reset", "generate"):
        raise UserError(f"{action}: choose reset or generate")
    return action, parser.parse(words)


def main(argv: Sequence[str] | None = None) -> None:
    action, args = parse_args(argv)
    if action == "reset":
        shutil.rmtree(report_folder(), ignore_errors=True)
        return
    records = read_records()
    if args.setup_seconds is not None:
        records["setup"] = {"wall_clock_s": args.setup_seconds}
    report = build_report(records, args.command)
    folder = report_folder()
    plot_losses(records, folder / "loss.png")
    with atomic_write(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    with atomic_write(folder / "report.md") as path:
        path.write_text(render_markdown(report), encoding="utf-8")
    try:
        shutil.copyfile(folder / "report.md", "report.md")
    except OSError as error:
        print0(f"note: report.md was not copied here ({error.strerror})")
    print0(f"wrote {folder / 'report.md'}, report.json and loss.png")


def read_records() -> dict[str, dict[str, Any]]:
    """The stages' records, in the pipeline's order."""
    folder = report_folder() / "stages"
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise UserError(f"{folder}: no stage has left a record yet; train something first")
    known = {name: found[name] for name in STAGES if name in found}
    return known | found


def build_report(records: dict[str, dict[str, Any]], command: str) -> dict[str, Any]:
    """The content of report.json."""
    comparison, evaluation = records.get("base_loss", {}), records.get("chat_eval", {})
    clock = {name: record["wall_clock_s"] for name, record in records.items() if "wall_clock_s" in record}
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": git_commit(),
        "machine": describe_machine(),
        "val_bpb": comparison.get("val_bpb"),
        "compressors": comparison.get("compressors", {}),
        "per_document": comparison.get("per_document", {}),
        "held_out_bytes": comparison.get("bytes"),
        "abilities": evaluation.get("abilities", {}),
        "wall_clock_s": {**clock, "total": sum(clock.values())},
        "peak_rss_bytes": max((r["peak_rss_bytes"] for r in records.values() if "peak_rss_bytes" in r), default=None),
        "stages": records,
    }


def git_commit() -> str | None:
    """The commit of the sources, with `+changes` if the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+changes" if changes.stdout.strip() else "")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, and the versions that matter."""
    import torch

    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE") if pages else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def plot_losses(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Training loss and validation bits per byte of the training stages, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    stages = [name for name in ("base_train", "chat_sft") if "metrics" in records.get(name, {})]
    if not stages:
        return
    figure = Figure(figsize=(6 * len(stages), 4), layout="constrained")
    for place, name in enumerate(stages):
        lines = (base_dir() / records[name]["metrics"]).read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        loss_axis = figure.add_subplot(1, len(stages), place + 1)
        loss_axis.set_title(name)
        loss_axis.set_xlabel("tokens")
        loss_axis.set_ylabel("training loss (nats per token)", color="tab:blue")
        trained = [step for step in steps if "loss" in step]
        loss_axis.plot([s["tokens"] for s in trained], [s["loss"] for s in trained], color="tab:blue")
        bpb_axis = loss_axis.twinx()
        bpb_axis.set_ylabel("validation bits per byte", color="tab:orange")
        evaluated = [step for step in steps if "val_bpb" in step]
        bpb_axis.plot([s["tokens"] for s in evaluated], [s["val_bpb"] for s in evaluated], "o-", color="tab:orange")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


# Markdown ------------------------------------------------------------------------------------------------------


def render_markdown(report: dict[str, Any]) -> str:
    """report.md of a report."""
    sections = [
        "# nanochat report",
        f"Made {report['created']} from commit `{report['commit']}`."
        + (f" To reproduce: `{report['command']}`." if report["command"] else ""),
        compression_section(report),
        abilities_section(report),
        training_section(report["stages"]),
        cost_section(report),
        "![loss curves](loss.png)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def compression_section(report: dict[str, Any]) -> str:
    if report["val_bpb"] is None:
        return ""
    per_document = report["per_document"]
    rows = [["this model", f"**{report['val_bpb']:.4f}**", f"{per_document['val_bpb']:.4f}"]]
    rows += [[name, f"{bpb:.4f}", f"{per_document[name]:.4f}"] for name, bpb in report["compressors"].items()]
    size = f"{report['held_out_bytes']:,} bytes in {report['stages']['base_loss']['documents']:,} documents"
    header = ["", "all documents together", "mean over documents"]
    return f"## Held-out text, bits per byte\n\n{size}, every byte scored once.\n\n" + table(header, rows)


def abilities_section(report: dict[str, Any]) -> str:
    if not report["abilities"]:
        return ""
    rows = [
        [
            name,
            f"{100 * a['accuracy']:.1f} %",
            f"{100 * a['interval'][0]:.1f} to {100 * a['interval'][1]:.1f} %",
            a["n"],
        ]
        for name, a in report["abilities"].items()
    ]
    text = "## Abilities\n\n" + table(["", "right", "95 % interval", "questions"], rows)
    samples = report["stages"]["chat_eval"].get("samples", [])
    quotes = [
        f"- {sample['question']!r}\n  {'right' if sample['right'] else 'wrong'}: {sample['reply']!r}"
        for sample in samples
    ]
    return text + ("\n\n" + "\n".join(quotes) if quotes else "")


def training_section(stages: dict[str, dict[str, Any]]) -> str:
    names = ("parameters", "steps", "tokens", "flops", "tokens_per_s", "val_bpb")
    trained = [stage for stage in ("base_train", "chat_sft") if stage in stages]
    if not trained:
        return ""
    rows = [[name.replace("_", " "), *(format_number(stages[s].get(name)) for s in trained)] for name in names]
    return "## Training\n\n" + table(["", *trained], rows)


def cost_section(report: dict[str, Any]) -> str:
    rows = [[name, f"{seconds:,.0f} s"] for name, seconds in report["wall_clock_s"].items()]
    machine = report["machine"]
    lines = [f"- {name}: {value}" for name, value in machine.items() if value]
    peak = report["peak_rss_bytes"]
    memory = f"\n\nPeak memory of a process: {peak / 2**30:.2f} GiB." if peak else ""
    return "## Wall clock\n\n" + table(["stage", "time"], rows) + memory + "\n\n## Machine\n\n" + "\n".join(lines)


def format_number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    cli.run(main)
