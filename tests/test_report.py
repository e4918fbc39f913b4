"""Stages leave records, and the report puts them together."""

import json
from pathlib import Path

import pytest

from nanochat import report
from nanochat.common import UserError, record_stage, report_folder


def write_stages(base: Path) -> None:
    metrics = base / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    steps = [{"step": i, "tokens": 100 * i, "loss": 5.0 - i, "val_bpb": 3.0 - i / 10} for i in range(4)]
    metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))
    with record_stage("base_train") as record:
        record.update(metrics="metrics.jsonl", parameters=1234567, val_bpb=2.7, earlier_s=50.0)
    with record_stage("base_loss") as record:
        record.update(val_bpb=1.4, compressors={"xz": 1.5, "zstd": 1.6}, bytes=10**6, documents=7)
        record["per_document"] = {"val_bpb": 1.45, "xz": 2.5, "zstd": 2.6}
    with record_stage("chat_eval") as record:
        record["abilities"] = {"spelling": {"accuracy": 0.93, "n": 500, "interval": [0.90, 0.95]}}
        record["samples"] = [{"question": "Spell 'a|b'.", "reply": "a b", "right": True}]


def test_the_report_has_every_documented_key_and_the_stages_figures(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_stages(base_dir)
    report.main(["generate", "--command=bash runs/x.sh", "--setup-seconds=12.5"])
    made = json.loads((report_folder() / "report.json").read_text())
    documented = (Path(report.__file__).parents[1] / "docs" / "report.md").read_text()
    keys = [line.split("`")[1].split(".")[0] for line in documented.splitlines() if line.startswith("| `")]
    assert set(keys) == set(made)
    assert (made["val_bpb"], made["compressors"]) == (1.4, {"xz": 1.5, "zstd": 1.6})
    assert made["abilities"]["spelling"] == {"accuracy": 0.93, "n": 500, "interval": [0.90, 0.95]}
    clock = made["wall_clock_s"]
    assert clock["setup"] == 12.5 and 50 <= clock["base_train"] < 60
    assert clock["total"] == pytest.approx(sum(clock.values()) - clock["total"])
    assert made["peak_rss_bytes"] > 10**7
    text = (tmp_path / "report.md").read_text()
    for shown in ("**1.4000**", "93.0 %", "90.0 to 95.0 %", "1,234,567", "bash runs/x.sh"):
        assert shown in text
    assert (report_folder() / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_is_refused_and_reset_forgets(base_dir: Path) -> None:
    with pytest.raises(UserError, match="no stage"):
        report.main(["generate"])
    write_stages(base_dir)
    report.main(["reset"])
    assert not report_folder().exists()
    with pytest.raises(UserError, match="reset or generate"):
        report.main(["frobnicate"])


def test_a_stage_that_did_nothing_leaves_the_old_record(base_dir: Path) -> None:
    write_stages(base_dir)
    with record_stage("base_train"):
        pass
    assert report.read_records()["base_train"]["parameters"] == 1234567
