"""Loggers: what --logger accepts, dashboards that show every step once, and training that none of them can stop.

The libraries are the real ones; tests of those that are missing are skipped, until
`bash runs/setup.sh tensorboard trackio wandb`.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import cli, loggers
from nanochat.checkpoint import run_folder
from nanochat.common import FlagError, prepare_process
from nanochat.loggers import About, Kind, Record, dashboard_values, format_record, logger_names
from nanochat.parallel import Runtime
from nanochat.train import metrics
from nanochat.train.loop import Loop
from nanochat.train.metrics import open_loggers, read_metrics
from nanochat.train.run import Run
from scripts import tok_train

REPO = Path(__file__).resolve().parents[1]
RT = Runtime(torch.device("cpu"), torch.float32)
DASHBOARDS = ("tensorboard", "wandb", "trackio")


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loggers put into the environment goes with the test, and what stands there does not come in."""
    for name in ("TRACKIO_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_MODE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "to be undone even where it is not set")
        monkeypatch.delenv(name)


def parse(*flags: str) -> Namespace:
    parser = cli.Parser("demo")
    cli.add_run_flags(parser)
    return parser.parse(flags)


def new_run(logger: str, rt: Runtime = RT, tag: str = "d2") -> Run:
    run = Run.open("base", tag, parse(f"--logger={logger}", "--overwrite"), rt)
    run.claim()
    return run


# The flag ---------------------------------------------------------------------------------------------------------


def test_the_flag_takes_none_and_names_with_commas() -> None:
    assert parse().logger == "console"
    assert parse("--logger=none").logger == "none"
    assert parse("--logger=console,console").logger == "console"


@pytest.mark.parametrize("given", ["visdom", "console,visdom", "none,console", "", "console,"])
def test_an_unknown_logger_is_one_error_that_lists_the_known(given: str) -> None:
    with pytest.raises(FlagError) as caught:
        parse(f"--logger={given}")
    assert len(str(caught.value).splitlines()) == 1
    assert "give none, or some of console, tensorboard, wandb, trackio" in str(caught.value)


def test_a_missing_package_is_told_with_its_extra_before_anything_is_written(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Kind(loggers.WandbLogger, "no_such_package"))
    with pytest.raises(FlagError, match=r"not installed: wandb; install with pip install 'nanochat\[wandb\]'"):
        parse("--logger=console,wandb")
    assert not base_dir.exists()


def test_a_folder_that_bears_a_packages_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "left_by_a_tool").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("left_by_a_tool") is not None
    assert not loggers.is_installed("left_by_a_tool")
    assert loggers.is_installed("torch")


def test_every_dashboard_has_an_extra_of_its_name() -> None:
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert set(loggers.LOGGERS) == {"console", *DASHBOARDS}
    for name in DASHBOARDS:
        assert f'\n{name} = ["{loggers.LOGGERS[name].package}>=' in text


def test_a_run_with_the_console_imports_no_dashboard(base_dir: Path) -> None:
    code = """if True:
        import sys
        from test_loggers import new_run, train
        train(new_run("console"), 3)
        dashboards = {"tensorboard", "wandb", "trackio"}
        sys.exit(", ".join(dashboards & {name.split(".")[0] for name in sys.modules}) or 0)"""
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 3/3" in done.stdout
    assert not (base_dir / "logs").exists()


# What a dashboard is told -----------------------------------------------------------------------------------------


def test_names_are_the_ancestors_and_only_finite_numbers_are_shown() -> None:
    record = {"step": 1, "num_steps": 9, "eta_s": 2.0, "elapsed_s": 1.0, "train_s": 1.0, "flops": 7, "lr": 0.5}
    record |= {"loss": 2.0, "loss_raw": float("nan"), "step_s": 0.1, "tokens_per_s": 5.0, "mfu": None, "val_bpb": 1.5}
    assert dashboard_values({**record, "note": "text"}) == {
        "total_training_time": 1.0,
        "total_training_flops": 7,
        "train/lrm": 0.5,
        "train/loss": 2.0,
        "train/dt": 0.1,
        "train/tok_per_sec": 5.0,
        "val/bpb": 1.5,
    }


class Memory:
    """A dashboard that keeps what it is given, and does what `at_step` says."""

    def __init__(self, about: About, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.about, self.at_step, self.closed = about, at_step, False
        self.steps = [record["step"] for record in about.past]

    def log(self, record: Record) -> None:
        self.at_step(record["step"])
        self.steps.append(record["step"])

    def close(self) -> None:
        self.closed = True


def remember(monkeypatch: pytest.MonkeyPatch, at_step: Callable[[int], None] = lambda step: None) -> list[Memory]:
    """Adds the logger `memory`; returns those that were opened, with time."""
    opened: list[Memory] = []

    def open_memory(about: About) -> Memory:
        opened.append(Memory(about, at_step))
        return opened[-1]

    monkeypatch.setitem(loggers.LOGGERS, "memory", Kind(open_memory, "torch"))
    return opened


def train(run: Run, num_steps: int, until: int | None = None) -> None:
    """The loop of a recipe, to the end or until a step in which it is given up."""
    loop = Loop(num_steps, run.start, RT, open_loggers(run, {"n_layer": 2}))
    for step in loop:
        if step.last or step.index == until:
            break
        step.log(loss=3.0)
    loop.check_completed()


def steps_of(run: Run) -> list[int]:
    return [record["step"] for record in read_metrics(run.metrics_path)]


def test_a_second_epoch_is_said_on_the_console() -> None:
    assert "epoch" not in format_record({"step": 3, "num_steps": 9, "epoch": 0})
    assert "epoch 2" in format_record({"step": 3, "num_steps": 9, "epoch": 1, "loss": 2.0})


@pytest.mark.usefixtures("base_dir")
def test_a_dashboard_is_told_of_the_run_and_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = remember(monkeypatch)
    train(new_run("memory"), 5)
    (memory,) = opened
    assert (memory.steps, memory.closed) == ([0, 1, 2, 3, 4, 5], True)
    assert (memory.about.source, memory.about.tag, memory.about.past) == ("base", "d2", [])
    assert memory.about.config["flags"]["logger"] == "memory" and memory.about.config["model"] == {"n_layer": 2}


@pytest.mark.usefixtures("base_dir")
def test_a_resumed_run_keeps_its_id_and_gives_a_dashboard_what_stands_from_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class At3:  # as much of a checkpoint as the run looks at here
        step = 3

    opened = remember(monkeypatch)
    train(new_run("memory"), 9, until=5)
    hidden = run_folder("base", ".d2.new")
    first = opened[0].about
    train(new_run("memory"), 9, until=5)
    run_folder("base", "d2").parent.mkdir(exist_ok=True)
    shutil.move(hidden, run_folder("base", "d2"))  # as the first checkpoint does
    run = Run(run_folder("base", "d2"), parse("--logger=memory"), RT, At3(), False, {})  # type: ignore[arg-type]
    train(run, 9)
    assert opened[1].about.id != first.id, "a run that starts anew is another one"
    assert opened[2].about.id == opened[1].about.id
    assert opened[2].steps == list(range(10)) and len(opened[2].about.past) == 3


@pytest.mark.usefixtures("base_dir")
def test_only_the_first_rank_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = remember(monkeypatch)
    run = new_run("memory,console")
    run.rt = Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2)
    assert open_loggers(run, {}) == []
    assert opened == [] and not run.metrics_path.exists()


# No dashboard stops the training ----------------------------------------------------------------------------------


def break_at_2(step: int) -> None:
    if step == 2:
        raise ConnectionError("the network\nis down")


@pytest.mark.usefixtures("base_dir")
def test_a_dashboard_that_fails_is_warned_of_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = remember(monkeypatch, break_at_2)
    run = new_run("memory")
    train(run, 9)
    assert steps_of(run) == list(range(10)) and opened[0].steps == [0, 1]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: --logger=memory: the network\\nis down; the run goes on without it")


def waiting_for(event: threading.Event) -> Callable[[int], None]:
    def wait(step: int) -> None:
        event.wait()

    return wait


@pytest.mark.usefixtures("base_dir")
def test_a_dashboard_that_hangs_holds_up_neither_the_steps_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = threading.Event()
    remember(monkeypatch, waiting_for(go_on))
    monkeypatch.setattr(metrics, "CLOSE_S", 0.1)
    run = new_run("memory")
    train(run, 9)
    go_on.set()
    assert steps_of(run) == list(range(10))
    assert capsys.readouterr().err.count("it has not finished within 0.1 s") == 1


@pytest.mark.usefixtures("base_dir")
def test_a_dashboard_that_falls_far_behind_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = threading.Event()
    opened = remember(monkeypatch, waiting_for(go_on))
    monkeypatch.setattr(metrics, "MAX_WAITING", 3)
    run = new_run("memory")
    train(run, 9)
    go_on.set()
    assert steps_of(run) == list(range(10))
    assert sum(len(memory.steps) for memory in opened) < 10  # it may not even have been opened yet
    assert capsys.readouterr().err.count("warning: --logger=memory: it does not keep up") == 1


HANGS = """
import os, signal, sys, threading
from test_loggers import Kind, Loop, Memory, RT, loggers, new_run, open_loggers, waiting_for
from nanochat.common import run

def main():
    kind = Kind(lambda about: Memory(about, waiting_for(threading.Event())), "torch")
    loggers.LOGGERS["memory"] = kind
    run = new_run("memory")
    loop = Loop(9, 0, RT, open_loggers(run, {}), grace_s=0.5)
    for step in loop:
        if step.over:
            break
        if step.index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step.log(loss=3.0)
    loop.check_completed()

run(main)
"""


@pytest.mark.usefixtures("base_dir")
def test_a_dashboard_that_hangs_has_no_longer_than_the_grace_time_after_a_signal() -> None:
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    command, environment = [sys.executable, "-c", HANGS], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert "not done 0.5 s after SIGTERM, so the run ends here; the newest checkpoint stands" in done.stderr


@pytest.mark.usefixtures("base_dir")
def test_damaged_bytes_among_the_records_cost_their_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("none")
    train(run, 5)
    run.metrics_path.write_bytes(run.metrics_path.read_bytes() + b"\xff\xfe\n")
    assert steps_of(run) == list(range(6))
    metrics.JsonlLogger(run.metrics_path, 4).close()
    assert steps_of(run) == list(range(4))


# The real ones ----------------------------------------------------------------------------------------------------

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


def test_offline_keeps_every_dashboard_off_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "online")
    prepare_process(offline=True)
    assert os.environ["WANDB_MODE"] == "offline"
    assert not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & set(os.environ)


def test_the_names_of_loggers_come_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "another", Kind(Memory))
    assert logger_names("console, another") == "console,another"
