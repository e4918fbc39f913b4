"""Loggers: what --logger accepts, dashboards that show every step once, and training that none of them can stop.

The libraries are the real ones; tests of those that are missing are skipped, until
`bash runs/setup.sh tensorboard trackio wandb`.
"""

import os
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

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


def test_offline_keeps_every_dashboard_off_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "online")
    prepare_process(offline=True)
    assert os.environ["WANDB_MODE"] == "offline"
    assert not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & set(os.environ)


def test_the_names_of_loggers_come_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "another", Kind(Memory))
    assert logger_names("console, another") == "console,another"
