"""runs/speedrun.sh and runs/run1000.sh from a hub to a report: every stage real, at depth 2, the hub on this machine"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Server

from nanochat.dataset import open_corpus

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "DEPTH": "2",
    "RATIO": "0.1",
    "NPROC": "2",
    "TOK_FLAGS": "--max-chars=1000000 --vocab-size=1024",
    "BASE_FLAGS": "--max-seq-len=128 --eval-tokens=2000 --head-dim=32 --aspect-ratio=16",
    "LOSS_FLAGS": "--split-tokens=2000",
    "SFT_FLAGS": "--num-generated=300 --num-iterations=20 --eval-tokens=2000",
    "EVAL_FLAGS": "--max-problems=4",
}


@pytest.fixture
def hub(real_data: Path, tmp_path: Path) -> Iterator[Server]:
    """Ten train shards and one for validation, of real text."""
    texts = open_corpus(real_data / "pretrain").train.documents()
    shards = tmp_path / "hub"
    shards.mkdir()
    for number in range(11):
        part = [next(texts) for _ in range(60)]
        pq.write_table(pa.table({"text": part}), shards / f"shard_{number:05}.parquet")
    with Server(shards) as server:
        yield server


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The scripts in a folder where set-up has nothing to do; `.venv/bin/python` is the Python of the tests."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    for name in ("speedrun.sh", "run1000.sh"):
        shutil.copy(ROOT / "runs" / name, folder / "runs")
    (folder / "runs" / "setup.sh").write_text("")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def run(script: str, project: Path, server: Server, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **SETTINGS, **settings, "NANOCHAT_BASE_DIR": str(project / "base")}
    env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(project / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = ["bash", str(project / "runs" / script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


def assert_complete(project: Path, result: subprocess.CompletedProcess[str], tag: str) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    base = project / "base"
    for source in ("base", "sft"):
        status = json.loads((base / "checkpoints" / source / tag / "run.json").read_text())
        assert status["status"] == "finished", source
    stages = {path.stem for path in (base / "report" / "stages").glob("*.json")}
    assert stages >= {"setup", "tok_train", "base_train", "base_loss", "chat_sft", "chat_eval"}
    assert (base / "report" / "report.md").is_file()


def test_the_speedrun_goes_from_the_hub_to_a_report_and_a_second_start_has_nothing_left_to_train(
    project: Path, hub: Server
) -> None:
    result = run("speedrun.sh", project, hub)
    assert_complete(project, result, "d2")
    assert "base model, processes: 2" in result.stdout and "2 ranks" in result.stdout
    corpus = open_corpus(project / "base" / "base_data_climbmix")
    assert len(corpus.train.sources) == 8  # for the tokenizer; more than the model needs
    assert [source.path.name for source in corpus.val.sources] == ["shard_00010.parquet"]
    fetched = len([request for request in hub.requests if request.startswith("GET") and "parquet" in request])
    again = run("speedrun.sh", project, hub)
    assert_complete(project, again, "d2")
    assert again.stdout.count("nothing to do") == 2
    assert len([r for r in hub.requests if r.startswith("GET") and "parquet" in r]) == fetched


@pytest.mark.slow
def test_run1000_is_the_speedrun_at_another_depth(project: Path, hub: Server) -> None:
    assert_complete(project, run("run1000.sh", project, hub, NPROC="1", RUN="big"), "big")


def test_a_download_that_fails_stops_the_speedrun_before_anything_is_trained(project: Path, hub: Server) -> None:
    hub.fail("shard_00003.parquet", [404] * 99)
    result = run("speedrun.sh", project, hub)
    assert result.returncode == 2 and "shard_00003.parquet" in result.stderr
    assert not (project / "base" / "tokenizer").exists()


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh"])
def test_an_unknown_argument_is_told_and_help_shows_the_settings(script: str) -> None:
    command = ["bash", str(ROOT / "runs" / script)]
    wrong = subprocess.run([*command, "--depth=4"], capture_output=True, text=True, timeout=30)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --depth=4: unknown argument")
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=30)
    assert told.returncode == 0 and "DEPTH" in told.stdout and "DATA_DIR" in told.stdout


@pytest.mark.parametrize(
    "settings", [{"DEPTH": "abc"}, {"BASE_FLAGS": "--num-iterations=3"}, {"SFT_FLAGS": "--dpeth=3"}]
)
def test_a_slip_in_the_settings_is_told_before_anything_is_downloaded(
    settings: dict[str, str], project: Path, hub: Server
) -> None:
    result = run("speedrun.sh", project, hub, **settings)
    assert result.returncode == 2 and result.stderr.startswith("error: --")
    assert not hub.requests
