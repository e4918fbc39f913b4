"""The report: what a run achieved, what it cost, and how to do it again.

Each stage leaves a JSON record (`common.record_stage`); this module puts them together as `report.json` (for programs;
docs/report.md has the schema), `report.md` (for people) and `loss.png` in `<base>/report/`.

    python -m nanochat.report reset        forget the records of earlier runs
    python -m nanochat.report setup        note what setting up the environment took (--setup-seconds)
    python -m nanochat.report generate     write the report and copy report.md to the current folder

A record that is damaged, or of another model than the one that was trained, is left out, and the report says
so. Set-up is mostly done already when a run is repeated, so of several times the longest is kept.
"""

import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanochat import cli
from nanochat.common import (
    UserError,
    atomic_write,
    base_dir,
    prepare_matplotlib,
    print0,
    printable,
    read_record,
    record_path,
    report_folder,
    to_json,
    write_record,
)

SCHEMA = 1
STAGES = ("setup", "tok_train", "base_train", "base_loss", "compression", "chat_sft", "chat_eval")
TRAINERS = ("base_train", "chat_sft")
# The stage that trains the model which a stage judges or goes on from, in the pipeline's order.
BUILT_ON = {"base_loss": "base_train", "compression": "base_train", "chat_sft": "base_train", "chat_eval": "chat_sft"}
HEADING = "# nanochat report"
Records = dict[str, dict[str, Any]]


def parse_args(argv: Sequence[str] | None = None) -> tuple[str, Namespace]:
    words = list(sys.argv[1:] if argv is None else argv)
    action = words.pop(0) if words and not words[0].startswith("-") else "generate"
    if action not in ("reset", "setup", "generate"):
        raise UserError(f"{printable(action)}: choose reset, setup or generate")
    parser = cli.Parser(__doc__)
    if action == "generate":
        parser.flag("--command", str, "", "the command that reproduces this run, shown in the report")
    if action == "setup":
        parser.flag("--setup-seconds", cli.non_negative_float, None, "what setting up the environment took")
        parser.check(lambda args: "--setup-seconds: needed" if args.setup_seconds is None else None)
    return action, parser.parse(words)


def main(argv: Sequence[str] | None = None) -> None:
    action, args = parse_args(argv)
    if action == "reset":
        forget()
    elif action == "setup":
        note_setup(args.setup_seconds)
    else:
        generate(args.command)


def forget() -> None:
    """Remove the report and all records."""
    folder = report_folder()
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        print0(f"{folder}: nothing was there")
    except OSError as error:
        raise UserError(f"{folder}: could not be removed ({error.strerror}); remove it yourself") from error


def note_setup(seconds: float) -> None:
    """Record what set-up took, unless it took longer before."""
    earlier: dict[str, Any] = {}
    with suppress(UserError):  # there is none, or it is damaged
        earlier = read_record(record_path("setup"))
    write_record("setup", {"wall_clock_s": max(seconds, earlier.get("wall_clock_s") or 0.0)})


def generate(command: str) -> None:
    """Write the report: the figures first, then what may fail without them being lost."""
    records, notes = read_records()
    curves = loss_curves(records, notes)
    for note in notes:
        print0(f"note: {note}")
    report = build_report(records, notes, command)
    folder = report_folder()
    picture = folder / "loss.png"
    with atomic_write(folder / "report.json") as path:
        path.write_text(to_json(report, indent=1), encoding="utf-8")
    with atomic_write(folder / "report.md") as path:
        path.write_text(render_markdown(report, picture.name if curves else ""), encoding="utf-8")
    print0(f"wrote {folder / 'report.md'} and report.json")
    copy_here(render_markdown(report, os.path.relpath(picture) if curves else ""))
    if curves:
        plot_losses(curves, picture)
        print0(f"wrote {picture}")


def copy_here(text: str) -> None:
    """Put the report into the current folder, unless something else bears its name there."""
    here = Path("report.md")
    try:
        if here.exists() and not here.read_text(encoding="utf-8", errors="replace").startswith(HEADING):
            print0("note: report.md of this folder is no report of ours, so it was left alone")
            return
        with atomic_write(here) as path:
            path.write_text(text, encoding="utf-8")
    except (OSError, UserError) as error:
        reason = error.__cause__ or error
        print0(f"note: report.md was not copied here ({getattr(reason, 'strerror', None) or reason})")


# Records -------------------------------------------------------------------------------------------------------


def read_records() -> tuple[Records, list[str]]:
    """The stages' records in the pipeline's order, and what was left out of them and why."""
    folder = report_folder() / "stages"
    found: Records = {}
    notes: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = read_record(path)
        except UserError as error:
            notes.append(f"{path.stem} is left out: {error}")
    outdated = set()
    for name, trainer in BUILT_ON.items():
        used, trained = model_used(found.get(name, {})), model_trained(found.get(trainer, {}))
        if trainer in outdated and name in found:
            told = f"{trainer} is, too"
        elif used and trained and used != trained:
            told = f"it used {used}, but {trainer} trained {trained}; run {name} again"
        elif used and trained and ended(found[name]) < ended(found[trainer]):
            told = f"it used {used}, but {trainer} trained {trained} after that; run {name} again"
        else:
            continue
        outdated.add(name)
        notes.append(f"{name} is left out: {told}")
    for name in outdated:
        del found[name]
    if not found:
        raise UserError("\n".join([*notes, f"{folder}: no stage has left a record yet; train something first"]))
    known = {name: found[name] for name in STAGES if name in found}
    return known | found, notes


def model_used(record: dict[str, Any]) -> str:
    """`base/d4/step_000100`: the model that a stage has judged or gone on from; empty where it does not say."""
    folder = record.get("base_model", record.get("model"))
    return "/".join(Path(folder).parts[-3:]) if isinstance(folder, str) else ""


def model_trained(record: dict[str, Any]) -> str:
    """The model that a stage has made, likewise."""
    if "metrics" not in record or "steps" not in record:
        return ""
    return "/".join([*Path(record["metrics"]).parts[-3:-1], f"step_{record['steps']:06d}"])


def ended(record: dict[str, Any]) -> str:
    return str(record.get("ended", ""))


def build_report(records: Records, notes: Sequence[str], command: str) -> dict[str, Any]:
    """The content of report.json."""
    from nanochat.machine import describe_machine, git_commit

    comparison, evaluation = records.get("compression", {}), records.get("chat_eval", {})
    clock = {name: record["wall_clock_s"] for name, record in records.items() if "wall_clock_s" in record}
    peaks = [record["peak_rss_bytes"] for record in records.values() if "peak_rss_bytes" in record]
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": git_commit(),
        "machine": describe_machine(),
        "val_bpb": (comparison or records.get("base_loss", {})).get("val_bpb"),
        "compressors": comparison.get("compressors", {}),
        "per_document": comparison.get("per_document", {}),
        "held_out_bytes": comparison.get("bytes"),
        "abilities": evaluation.get("abilities", {}),
        "wall_clock_s": {**clock, "total": sum(clock.values())},
        "peak_rss_bytes": max(peaks, default=None),
        "notes": list(notes),
        "stages": records,
    }


# Curves --------------------------------------------------------------------------------------------------------

Points = list[tuple[float, float]]  # (tokens, value)


def loss_curves(records: Records, notes: list[str]) -> dict[str, tuple[Points, Points]]:
    """Training loss and validation bits per byte of the training stages; a note for one that has none."""
    from nanochat.train.metrics import read_metrics

    curves = {}
    for name in TRAINERS:
        if "metrics" not in records.get(name, {}):
            continue
        path = base_dir() / records[name]["metrics"]
        try:
            steps = [step for step in read_metrics(path) if "tokens" in step]
        except UserError as error:
            notes.append(f"no loss curve of {name}: {error}")
            continue
        loss, bpb = (
            [(step["tokens"], step[key]) for step in steps if step.get(key) is not None] for key in ("loss", "val_bpb")
        )
        if loss:
            curves[name] = loss, bpb
        else:
            notes.append(f"no loss curve of {name}: {path} {'holds no step' if path.exists() else 'is missing'}")
    return curves


def plot_losses(curves: dict[str, tuple[Points, Points]], path: Path) -> None:
    """The curves side by side, as a PNG."""
    prepare_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(curves), 4), layout="constrained")
    for place, (name, (loss, bpb)) in enumerate(curves.items()):
        loss_axis = figure.add_subplot(1, len(curves), place + 1)
        loss_axis.set_title(name)
        loss_axis.set_xlabel("tokens")
        loss_axis.set_ylabel("training loss (nats per token)", color="tab:blue")
        loss_axis.plot([x for x, _ in loss], [y for _, y in loss], color="tab:blue")
        bpb_axis = loss_axis.twinx()
        bpb_axis.set_ylabel("validation bits per byte", color="tab:orange")
        bpb_axis.plot([x for x, _ in bpb], [y for _, y in bpb], "o-", color="tab:orange")
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


# Markdown ------------------------------------------------------------------------------------------------------


def render_markdown(report: dict[str, Any], picture: str) -> str:
    """report.md of a report. picture: the path of the loss curves from where it will lie; empty: there are none."""
    source = f"commit {code(report['commit'])}" if report["commit"] else "sources outside a git checkout"
    sections = [
        HEADING,
        f"Made {report['created']} from {source}."
        + (f" To reproduce: {code(report['command'])}." if report["command"] else ""),
        "\n".join(f"- note: {code(note)}" for note in report["notes"]),
        compression_section(report),
        abilities_section(report),
        training_section(report["stages"]),
        cost_section(report),
        f"![loss curves]({quote(picture)})" if picture else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """`text` as a code span, whatever it holds: control characters are escapes, the fence is longer than any in it."""
    shown = printable(text)
    if not shown.strip():
        return "(nothing)"
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{space}{shown}{space}{fence}"


def compression_section(report: dict[str, Any]) -> str:
    title, ours, per_document = "## Held-out text, bits per byte\n\n", report["val_bpb"], report["per_document"]
    if not report["compressors"]:
        return f"{title}The base model: **{ours:.4f}**, on the first tokens of the text, in rows." if ours else ""
    rows = [["this model", f"**{bits(ours)}**", bits(per_document["val_bpb"])]]
    rows += [[name, bits(bpb), bits(per_document[name])] for name, bpb in report["compressors"].items()]
    size = f"{report['held_out_bytes']:,} bytes in {report['stages']['compression']['documents']:,} documents"
    header = ["", "all documents together", "mean over documents"]
    return f"{title}{size}, every byte scored once.\n\n" + table(header, rows)


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
    text = (
        "## Abilities\n\nQuestions in wordings that were held out of training, no question twice.\n\n"
        + table(["", "right", "95 % interval", "questions"], rows)
        + "\n\ndocs is recall: the docstrings were trained on, only the wordings of the questions were not."
        * ("docs" in report["abilities"])
    )
    samples = report["stages"]["chat_eval"].get("samples", [])
    quotes = [
        f"- {code(sample['question'])}\n  {'right' if sample['right'] else 'wrong'}: {code(sample['reply'])}"
        for sample in samples
    ]
    return text + ("\n\n" + "\n".join(quotes) if quotes else "")


def training_section(stages: Records) -> str:
    names = ("parameters", "steps", "tokens", "flops", "tokens_per_s", "val_bpb")
    trained = [stage for stage in TRAINERS if stage in stages]
    if not trained:
        return ""
    rows = [[name.replace("_", " "), *(format_number(stages[s].get(name)) for s in trained)] for name in names]
    return "## Training\n\n" + table(["", *trained], rows)


def cost_section(report: dict[str, Any]) -> str:
    peaks = {name: stage.get("peak_rss_bytes") for name, stage in report["stages"].items()}
    peaks["total"] = report["peak_rss_bytes"]
    rows = [
        [name, f"{seconds:,.0f} s", f"{peaks[name] / 2**30:.2f} GiB" if peaks[name] else "-"]
        for name, seconds in report["wall_clock_s"].items()
    ]
    memory = (
        "Peak memory: the resident sets of a stage's process and of all that it started, added up; looked at twice a "
        "second, and what several of them share counts for each. In the last line, the largest of the stages."
    )
    lines = [f"- {name}: {value}" for name, value in report["machine"].items() if value]
    costs = table(["stage", "time", "peak memory"], rows)
    return f"## Time and memory\n\n{costs}\n\n{memory}\n\n## Machine\n\n" + "\n".join(lines)


def bits(value: float | None) -> str:
    """Bits per byte; a model that is broken has none."""
    return "-" if value is None else f"{value:.4f}"


def format_number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    cli.run(main)
