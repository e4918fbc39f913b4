"""The real dashboards: what a killed and resumed run has left in each is what metrics.jsonl says."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import loggers
from nanochat.checkpoint import run_folder
from nanochat.loggers import dashboard_values
from nanochat.train.metrics import read_metrics
from scripts import tok_train

REPO = Path(__file__).resolve().parents[1]
DASHBOARDS = ("tensorboard", "wandb", "trackio")
TRAIN = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--device-batch-size=2"]
TRAIN += ["--total-batch-size=256", "--eval-tokens=500", "--compile=off", "--device-type=cpu", "--offline"]
TRAIN += ["--data-dir=text.txt"]


@pytest.fixture(scope="module")
def text_and_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp("tokenizer")
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        text = base / "text.txt"
        text.write_text((REPO / "README.md").read_text(encoding="utf-8") * 3, encoding="utf-8")
        tok_train.main([f"--data-dir={text}", "--vocab-size=400"])
        yield base


@pytest.fixture
def prepared(base_dir: Path, text_and_tokenizer: Path) -> Path:
    shutil.copytree(text_and_tokenizer, base_dir)
    return base_dir


@pytest.fixture(params=DASHBOARDS)
def dashboard(request: pytest.FixtureRequest) -> str:
    package = loggers.LOGGERS[request.param].package
    if not loggers.is_installed(package):
        pytest.skip(f"the package {package} is not installed: bash runs/setup.sh {request.param}")
    return str(request.param)


def start(recipe: str, base: Path, *flags: str, **variables: str) -> subprocess.Popen[str]:
    """A recipe as a process of its own: these libraries keep settings for as long as a process lives."""
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "HOME": str(base.parent), "PYTHONPATH": str(REPO)}
    environment |= variables
    command = [sys.executable, "-m", f"scripts.{recipe}", *flags]
    return subprocess.Popen(
        command, cwd=base, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What the process said on stderr."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def run_killed_at(step: int, recipe: str, base: Path, source: str, *flags: str) -> None:
    path = run_folder(source, "d2") / "metrics.jsonl"
    process = start(recipe, base, *flags)
    while process.poll() is None and not (path.exists() and len(path.read_text().splitlines()) > step):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run was over before it could be killed: {errors}"


Shown = list[tuple[int, dict[str, float]]]  # (step, values by name), in the order in which the dashboard holds them


def tensorboard_shows(base: Path, source: str) -> tuple[Shown, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (base / "logs" / "tensorboard" / source / "d2").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    values: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(set(steps)), name
        for event in events.Scalars(name):
            values.setdefault(event.step, {})[name] = event.value
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    return sorted(values.items()), json.loads(text.removeprefix("```json").removesuffix("```"))


def wandb_shows(base: Path, source: str) -> tuple[Shown, Any]:
    shown, config = [], {}
    for folder in sorted((base / "logs" / "wandb").glob("offline-run-*")):
        records = list(wandb_records(next(folder.glob("*.wandb")).read_bytes()))
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        if run.display_name == f"{source}/d2":
            assert run.project == "nanochat" and run.run_id in folder.name
            config = {item.key: json.loads(item.value_json) for item in run.config.update}
            for history in (record.history for record in records if record.WhichOneof("record_type") == "history"):
                values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in history.item}
                shown.append(
                    (history.step.num, {name: value for name, value in values.items() if not name.startswith("_")})
                )
    return shown, config


def wandb_records(data: bytes) -> Iterator[Any]:
    """The records of a .wandb file: pieces (checksum, length, kind) in blocks of 32 KiB, joined and read by W&B."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    assert data.startswith(b":W&B")
    at, joined = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4) if left >= 7 else (left - 7, 0)
        joined += data[at + 7 : at + 7 + length] if kind else b""
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield WandbRecord.FromString(joined)
            joined = b""


def trackio_shows(base: Path, source: str) -> tuple[Shown, Any]:
    code = """if True:
        import json, sys, trackio
        from trackio.sqlite_storage import SQLiteStorage
        (run,) = [run for run in trackio.Api().runs("nanochat") if run.name.startswith(sys.argv[1])]
        rows = SQLiteStorage.get_logs("nanochat", run.name, run_id=run.id)
        print(json.dumps([rows, run.config]))"""
    environment = {**os.environ, "TRACKIO_DIR": str(base / "logs" / "trackio"), "HOME": str(base.parent)}
    command = [sys.executable, "-c", code, f"{source}-d2-"]
    rows, config = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    shown = [({k: v for k, v in row.items() if k not in ("step", "timestamp")}, row["step"]) for row in rows]
    return [(step, values) for values, step in shown], config


SHOWS = {"tensorboard": tensorboard_shows, "wandb": wandb_shows, "trackio": trackio_shows}


def check_mirror(dashboard: str, base: Path, source: str) -> None:
    """The dashboard holds every step of metrics.jsonl once, in order, with its values, and the run's configuration."""
    records = read_metrics(run_folder(source, "d2") / "metrics.jsonl")
    shown, config = SHOWS[dashboard](base, source)
    assert [step for step, _ in shown] == [record["step"] for record in records] == list(range(len(records)))
    for (step, values), record in zip(shown, records, strict=True):
        assert values == pytest.approx(dashboard_values(record), rel=1e-6), step  # TensorBoard keeps float32
    assert config["flags"]["device_batch_size"] == 2 and config["model"]["n_layer"] == 2


@pytest.mark.slow
def test_killed_and_resumed_recipes_show_every_step_once(dashboard: str, prepared: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for i in range(60):
            question, answer = f"What is {i} + 1?", f"It is {i + 1}."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    shared = [f"--logger={dashboard}", "--eval-every=20", "--save-every=30", "--resume=auto", "--offline"]
    base_flags = [*TRAIN, *shared, "--num-iterations=100"]
    sft_flags = [*shared, f"--data={chats}", "--num-iterations=100", "--device-batch-size=2", "--device-type=cpu"]
    for source, recipe, flags in (("base", "base_train", base_flags), ("sft", "chat_sft", sft_flags)):
        run_killed_at(45, recipe, prepared, source, *flags)
        assert "warning" not in finish(start(recipe, prepared, *flags))
        check_mirror(dashboard, prepared, source)
    left_at_home = {path.name for path in tmp_path.iterdir()}
    assert left_at_home == {"base", "chats.jsonl"}


@pytest.mark.slow
def test_a_dashboard_that_joins_a_resumed_run_has_its_whole_history(dashboard: str, prepared: Path) -> None:
    flags = [*TRAIN, "--eval-every=-1"]
    finish(start("base_train", prepared, *flags, "--num-iterations=3", "--logger=none"))
    finish(start("base_train", prepared, *flags, "--num-iterations=6", f"--logger={dashboard}", "--resume=3"))
    check_mirror(dashboard, prepared, "base")


@pytest.mark.slow
def test_where_a_dashboard_cannot_write_the_run_ends_as_ever(dashboard: str, prepared: Path) -> None:
    (prepared / "logs").write_text("in the way")
    errors = finish(
        start("base_train", prepared, *TRAIN, "--eval-every=-1", "--num-iterations=4", f"--logger={dashboard}")
    )
    assert errors.lower().count("warning: ") == 1, errors  # Trackio gives its own and goes on
    assert dashboard in errors and "Traceback" not in errors
    assert len(read_metrics(run_folder("base", "d2") / "metrics.jsonl")) == 5


@pytest.mark.slow
def test_without_a_login_weights_and_biases_is_warned_of_and_asks_nothing(prepared: Path) -> None:
    if not loggers.is_installed("wandb"):
        pytest.skip("the package wandb is not installed: bash runs/setup.sh wandb")
    flags = [*TRAIN, "--eval-every=-1", "--num-iterations=4", "--logger=wandb"]
    flags.remove("--offline")
    errors = finish(start("base_train", prepared, *flags, WANDB_BASE_URL="http://127.0.0.1:9"))
    assert errors.count("warning: --logger=wandb: not logged in; use `wandb login`") == 1, errors
