"""Stages leave records, and the report puts them together: what is damaged or of another model is left out and told."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import report
from nanochat.abilities import ABILITIES
from nanochat.checkpoint import run_folder, write_checkpoint
from nanochat.common import UserError, record_path, record_stage, report_folder, write_record
from nanochat.config import ModelConfig
from nanochat.model.gpt import build_model
from nanochat.tokenizer import Tokenizer
from scripts import chat_eval

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"base_train": "base/d4", "chat_sft": "sft/d4"}
LATER = "2999-12-31T23:59:59.000+00:00"
NASTY = "a|b `` <b>\x1b[31m\n# no heading"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where the report is copied to."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write_stages(base: Path) -> None:
    """The records of a whole run."""
    for number, (stage, model) in enumerate(MODELS.items()):
        metrics = f"checkpoints/{model}/metrics.jsonl"
        (base / metrics).parent.mkdir(parents=True)
        steps = [{"step": i, "tokens": 100 * i, "loss": 5.0 - i, "val_bpb": 3.0 - i / 10} for i in range(4)]
        (base / metrics).write_text("".join(json.dumps(step) + "\n" for step in steps))
        with record_stage(stage, time.perf_counter()) as record:
            record.update(metrics=metrics, steps=4, parameters=1234567 + number, val_bpb=2.7, earlier_s=50.0)
    write_record(
        "base_loss",
        {"model": f"{base}/checkpoints/base/d4/step_000004", "val_bpb": 1.3, "wall_clock_s": 2.0, "ended": LATER},
    )
    comparison = {"val_bpb": 1.4, "compressors": {"xz": 1.5, "zstd": 1.6}, "bytes": 10**6, "documents": 7}
    comparison |= {"per_document": {"val_bpb": 1.45, "xz": 2.5, "zstd": 2.6}, "wall_clock_s": 3.0, "ended": LATER}
    write_record("compression", {"model": f"{base}/checkpoints/base/d4/step_000004", **comparison})
    results = {"accuracy": 0.93, "n": 500, "interval": [0.90, 0.95]}
    samples = [{"question": NASTY, "reply": "`", "right": True}, {"question": "Why?", "reply": "", "right": False}]
    judged = {
        "model": f"{base}/checkpoints/sft/d4/step_000004",
        "abilities": {"spelling": results, "docs": results},
        "ended": LATER,
    }
    write_record("chat_eval", {**judged, "samples": samples, "peak_rss_bytes": 3 * 2**30})


def made() -> dict[str, Any]:
    return json.loads((report_folder() / "report.json").read_text())


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of a report's values; a stage's own record is one."""
    if isinstance(value, dict) and not re.fullmatch(r"stages\.\w+", path):
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}" if path else key)
    else:
        yield path


def documented_keys() -> Iterator[str]:
    """The keys that docs/report.md names, braces taken apart."""
    page = (ROOT / "docs" / "report.md").read_text()
    for key in (line.split("`")[1] for line in page.splitlines() if line.startswith("| `")):
        parts = [part.split(",") for part in re.split(r"[{}]", key)]
        yield from ("".join(choice) for choice in itertools.product(*parts))


def test_the_report_has_every_documented_key_and_no_other(base_dir: Path) -> None:
    write_stages(base_dir)
    report.main(["generate"])
    known = {key: re.compile(re.sub(r"<\w+>", r"\\w+", re.escape(key))) for key in documented_keys()}
    paths = list(leaves(made()))
    assert [path for path in paths if not any(pattern.fullmatch(path) for pattern in known.values())] == []
    assert [key for key, pattern in known.items() if not any(map(pattern.fullmatch, paths))] == []


def test_the_report_has_the_stages_figures(base_dir: Path, here: Path) -> None:
    write_stages(base_dir)
    report.main(["setup", "--setup-seconds=12.5"])
    report.main(["generate", "--command=bash runs/x.sh"])
    figures = made()
    assert (figures["val_bpb"], figures["compressors"]) == (1.4, {"xz": 1.5, "zstd": 1.6})
    assert figures["abilities"]["spelling"] == {"accuracy": 0.93, "n": 500, "interval": [0.90, 0.95]}
    clock = figures["wall_clock_s"]
    assert clock["setup"] == 12.5 and 50 <= clock["base_train"] < 60
    assert clock["total"] == pytest.approx(sum(clock.values()) - clock["total"])
    assert list(figures["stages"]) == list(report.STAGES[:1] + report.STAGES[2:])  # there is no tok_train
    assert figures["peak_rss_bytes"] == 3 * 2**30 and figures["notes"] == []
    text = (here / "report.md").read_text()
    for shown in ("**1.4000**", "93.0 %", "90.0 to 95.0 %", "1,234,567", "`bash runs/x.sh`", "3.00 GiB", "is recall"):
        assert shown in text
    assert (report_folder() / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_text_of_the_model_cannot_leave_its_code_span(base_dir: Path, here: Path) -> None:
    write_stages(base_dir)
    report.main(["generate", f"--command={NASTY}"])
    text = (here / "report.md").read_text()
    assert text.count("```a|b `` <b>\\x1b[31m\\n# no heading```") == 2  # the command and the question
    assert "  right: `` ` ``\n" in text and "  wrong: (nothing)\n" in text
    assert "\x1b" not in text and "\n# no heading" not in text
    assert report.table(["a|b"], [["c|d"]]).count("\\|") == 2


def test_without_the_compressors_the_plain_figure_is_reported(base_dir: Path, here: Path) -> None:
    write_stages(base_dir)
    record_path("compression").unlink()
    report.main([])
    figures = made()
    assert figures["val_bpb"] == 1.3
    assert (figures["compressors"], figures["per_document"], figures["held_out_bytes"]) == ({}, {}, None)
    assert "**1.3000**" in (here / "report.md").read_text()


def test_records_of_another_model_are_left_out_and_named(
    base_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stages(base_dir)
    write_record("compression", {"model": "elsewhere/checkpoints/base/other/step_000004", "val_bpb": 9.0})
    write_record("base_loss", {"model": "elsewhere/checkpoints/base/d4/step_000002", "val_bpb": 9.0})
    write_record("chat_eval", {"model": f"{base_dir}/checkpoints/base/d4/step_000004", "abilities": {"docs": {}}})
    report.main([])
    figures = made()
    assert (figures["val_bpb"], figures["abilities"]) == (None, {})
    assert figures["notes"] == [
        "base_loss is left out: it used base/d4/step_000002, but base_train trained base/d4/step_000004; "
        "run base_loss again",
        "compression is left out: it used base/other/step_000004, but base_train trained base/d4/step_000004; "
        "run compression again",
        "chat_eval is left out: it used base/d4/step_000004, but chat_sft trained sft/d4/step_000004; "
        "run chat_eval again",
    ]
    assert capsys.readouterr().out.count("note: ") == 3
    assert (here / "report.md").read_text().count("- note: ") == 3


def test_a_record_of_a_model_that_was_trained_anew_since_is_left_out(base_dir: Path) -> None:
    write_stages(base_dir)
    old = json.loads(record_path("compression").read_text())
    write_record("compression", {**old, "ended": "2001-01-01T00:00:00.000+00:00"})
    report.main([])
    assert made()["compressors"] == {}
    (note,) = made()["notes"]
    assert note.startswith("compression is left out") and "base_train trained base/d4/step_000004 after that" in note


def test_fine_tuning_of_another_base_model_is_left_out_with_what_judged_it(base_dir: Path) -> None:
    write_stages(base_dir)
    tuned = json.loads(record_path("chat_sft").read_text())
    write_record("chat_sft", {**tuned, "base_model": f"{base_dir}/checkpoints/base/other/step_000004"})
    report.main([])
    figures = made()
    assert figures["abilities"] == {} and "chat_sft" not in figures["stages"]
    assert figures["notes"] == [
        "chat_sft is left out: it used base/other/step_000004, but base_train trained base/d4/step_000004; "
        "run chat_sft again",
        "chat_eval is left out: chat_sft is, too",
    ]


def test_a_base_folder_that_was_moved_holds_the_same_models(base_dir: Path) -> None:
    write_stages(base_dir)
    moved = json.loads(record_path("compression").read_text())
    write_record("compression", {**moved, "model": "/elsewhere/checkpoints/base/d4/step_000004"})
    report.main([])
    assert made()["notes"] == [] and made()["val_bpb"] == 1.4


def test_what_is_half_written_is_left_out_and_told(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stages(base_dir)
    record_path("compression").write_text('{"val_bpb": 1.')
    record_path("tok_train").write_text("[1]")
    record_path("chat_eval").write_bytes(b"\xff")
    base, sft = (base_dir / "checkpoints" / model / "metrics.jsonl" for model in MODELS.values())
    base.write_bytes(b'{"step": 0, "tokens": 1, "loss": 5.0}\nno json\n{"step": 1, "tokens": 2, "lo')
    sft.unlink()
    report.main([])
    assert (report_folder() / "loss.png").exists()
    notes = "\n".join(made()["notes"])
    for told in ("compression.json: cannot be read", "tok_train.json: holds no JSON", "chat_eval.json: cannot be read"):
        assert told in notes
    assert f"no loss curve of chat_sft: {sft} is missing" in notes and len(made()["notes"]) == 4
    assert (made()["val_bpb"], made()["abilities"]) == (1.3, {})
    base.write_bytes(b"\xff\n")
    report.main([])
    assert "no loss curve of base_train" in "\n".join(made()["notes"])
    assert "loss.png" not in capsys.readouterr().out.partition("wrote")[2].partition("wrote")[2].partition("wrote")[2]


def test_a_picture_that_cannot_be_written_costs_the_picture_only(base_dir: Path, here: Path) -> None:
    write_stages(base_dir)
    (report_folder() / "loss.png" / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"loss\.png: could not be written \(Is a directory\)"):
        report.main([])
    assert made()["val_bpb"] == 1.4 and (report_folder() / "report.md").exists() and (here / "report.md").exists()
    assert sorted(path.name for path in report_folder().iterdir()) == ["loss.png", "report.json", "report.md", "stages"]


def test_without_training_there_is_no_picture(base_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record("tok_train", {"vocab_size": 400, "wall_clock_s": 1.0})
    report.main([])
    assert "loss.png" not in capsys.readouterr().out + (here / "report.md").read_text()
    assert not (report_folder() / "loss.png").exists()
    figures = made()
    for key in ("val_bpb", "held_out_bytes", "peak_rss_bytes"):
        assert figures[key] is None


def test_the_copy_links_the_picture_and_replaces_reports_only(
    base_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stages(base_dir)
    for _ in range(2):
        report.main([])
        linked = re.search(r"!\[loss curves\]\((.*)\)", (here / "report.md").read_text())
        assert linked and (here / linked[1]).samefile(report_folder() / "loss.png")
        assert "(loss.png)" in (report_folder() / "report.md").read_text()
    assert "note" not in capsys.readouterr().out
    (here / "report.md").write_text("my own notes")
    report.main([])
    assert (here / "report.md").read_text() == "my own notes"
    assert "was left alone" in capsys.readouterr().out
    (here / "report.md").unlink()
    (here / "report.md").mkdir()
    report.main([])
    assert "was not copied here (Is a directory)" in capsys.readouterr().out


def test_set_up_is_remembered_and_the_longest_counts(base_dir: Path) -> None:
    report.main(["setup", "--setup-seconds=31"])
    report.main(["setup", "--setup-seconds=2"])
    report.main(["generate"])
    assert made()["wall_clock_s"] == {"setup": 31, "total": 31}
    report.main(["setup", "--setup-seconds=40"])
    assert report.read_records()[0]["setup"] == {"wall_clock_s": 40}


def test_a_report_of_nothing_is_refused_and_reset_forgets(base_dir: Path) -> None:
    with pytest.raises(UserError, match="no stage"):
        report.main(["generate"])
    write_stages(base_dir)
    report.main(["reset"])
    assert not report_folder().exists()
    report.main(["reset"])  # nothing to forget is no mistake
    report_folder().write_text("in the way")
    with pytest.raises(UserError, match=r"report: could not be removed \(Not a directory\)"):
        report.main(["reset"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["frobnicate"], "frobnicate: choose reset, setup or generate"),
        (["reset", "--command=x", "--setup-seconds=3"], "--command=x: unknown flag"),
        (["generate", "--setup-seconds=3"], "--setup-seconds=3: unknown flag"),
        (["setup"], "--setup-seconds: needed"),
        (["setup", "--setup-seconds=3", "--command=x"], "--command=x: unknown flag"),
    ],
)
def test_an_action_takes_its_own_flags_only(words: list[str], told: str, base_dir: Path) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        report.main(words)
    assert not base_dir.exists()


def test_a_home_that_cannot_be_written_is_no_matter(base_dir: Path, here: Path) -> None:
    write_stages(base_dir)
    command = [sys.executable, "-m", "nanochat.report", "generate"]
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    environment |= {"HOME": "/proc/no-home", "PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(base_dir)}
    environment |= {"XDG_CONFIG_HOME": "/proc/no-home", "XDG_CACHE_HOME": "/proc/no-home"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (report_folder() / "loss.png").exists()


# The questions of scripts.chat_eval ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABILITIES)
def test_no_question_is_asked_twice(name: str) -> None:
    questions = chat_eval.distinct_questions(ABILITIES[name], "test", 500)
    asked = [chat_eval.question_of(question) for question in questions]
    assert len(asked) == 500 == len({question.lower().rstrip("?.!") for question in asked})
    drawn = [chat_eval.question_of(ABILITIES[name].conversation("test", i)) for i in range(20)]
    assert set(asked[:10]) <= set(drawn)  # the first ones, none passed over but copies


def test_an_ability_with_few_questions_is_asked_those() -> None:
    class Parrot:
        name = "parrot"

        def conversation(self, split: str, index: int) -> Any:
            question = ("Who?", "who", "Why?")[index % 3]
            return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "me"}]}

        def judge(self, conversation: Any, reply: Any) -> bool:
            return True

    questions = chat_eval.distinct_questions(Parrot(), "test", 500)
    assert [chat_eval.question_of(question) for question in questions] == ["Who?", "Why?"]


def test_a_part_of_the_evaluation_does_not_replace_the_whole(
    base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(ModelConfig(256, 280, 2, 2, 2, 16), torch.device("cpu"), torch.float32)
    meta = {"step": 3, "model_config": model.config.to_dict()}
    tensors = {"model": dict(model.named_parameters()), "optimizer": {}}
    tokenizer = Tokenizer.train(["How do you spell banana? What is 3 + 4?"] * 9, 280)
    write_checkpoint(run_folder("sft", "d2") / "step_000003", tensors, {}, meta, tokenizer)
    whole = ["--max-problems=2", "--max-new-tokens=8"]
    for part in (["--abilities=spelling,docs"], ["--split=val"]):
        chat_eval.main([*whole, *part])
        *_, note, result = capsys.readouterr().out.splitlines()
        assert note.startswith("note: a part of the evaluation") and json.loads(result)["step"] == 3
        assert not record_path("chat_eval").exists()
    for smaller in ([], ["--max-problems=1"]):
        chat_eval.main([*whole, *smaller])
        assert ("or a smaller one" in capsys.readouterr().out) == bool(smaller)
        record = json.loads(record_path("chat_eval").read_text())
        assert record["flags"]["max_problems"] == record["abilities"]["docs"]["n"] == 2
    assert set(record["abilities"]) == set(ABILITIES)
    assert report.model_used(record) == "sft/d2/step_000003"
    write_record("chat_eval", {**record, "fingerprint": "of another model"})
    chat_eval.main([*whole, "--max-problems=1"])
    assert json.loads(record_path("chat_eval").read_text())["flags"]["max_problems"] == 1
