"""Checks that crash, hang or are killed are findings, and leave nothing running."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from visiting import REPO, Visit, assert_gone, fake_package, wait_for

from nanochat.doctor.checks import Check, find_check
from nanochat.doctor.isolation import Child, examine, has_room
from nanochat.doctor.result import Request, Result

NEVER = float("inf")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import ctypes; ctypes.string_at(0)", "its process was ended by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, as Linux does when memory runs out"),
        ("import os; os._exit(7)", "it left with code 7"),
        ("raise RuntimeError('the driver is too old')", "RuntimeError: the driver is too old"),
    ],
)
def test_a_torch_that_crashes_is_told_and_the_other_checks_go_on(tmp_path: Path, source: str, told: str) -> None:
    visit = Visit("--only=device,fp8,port", **fake_package(tmp_path, "torch", source))
    assert visit.code == 1 and not visit.record["ok"]
    for name in ("device", "fp8"):
        assert visit.checks[name]["state"] == "failed" and told in visit.checks[name]["seen"]
        assert f"python -m nanochat.doctor {name}" in visit.checks[name]["advice"]
    assert visit.checks["port"]["state"] in ("ok", "missing")
    assert "training will not work: see device" in visit.printed


HANGING = """
import os, pathlib, subprocess, time
grandchild = subprocess.Popen(["sleep", "300"])
pids = pathlib.Path(__file__).with_name("new")
pids.write_text(f"{os.getpid()} {grandchild.pid}")
pids.rename(pids.with_name("pids"))
time.sleep(300)
"""

HANGING_RANKS = """
import os, pathlib, signal, time
if "RANK" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pid = pathlib.Path(__file__).with_name("new" + os.environ["RANK"])
    pid.write_text(str(os.getpid()))
    pid.rename(pid.with_name("rank" + os.environ["RANK"]))
    time.sleep(300)
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which checks of this process import first. Who writes its number there is gone afterwards."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(REPO)
    yield tmp_path
    for path in [*tmp_path.glob("pids"), *tmp_path.glob("rank*")]:
        for word in path.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)


def test_a_check_that_hangs_is_told_and_the_others_go_on(world: Path) -> None:
    fake_package(world, "torch", HANGING)
    checks = [replace(find_check("device"), limit_s=0), replace(find_check("port"), limit_s=600)]
    hanging, other = examine(checks, Request())
    assert hanging.result.state == "failed" and hanging.prevents_training
    assert hanging.result.seen == "no answer within 0 s, so it was stopped"
    assert other.check.name == "port" and other.result.state in ("ok", "missing")


def test_the_users_time_limit_holds_where_it_is_stricter(tmp_path: Path) -> None:
    visit = Visit("--only=device", "--time-limit=0.5", **fake_package(tmp_path, "torch", HANGING))
    assert visit.code == 1 and "no answer within 0.5 s" in visit.checks["device"]["seen"]


def test_a_check_is_stopped_with_all_it_has_started(world: Path) -> None:
    fake_package(world, "torch", HANGING)
    child = Child(find_check("device"), Request(), NEVER)
    pids = wait_for(world / "pids")
    assert not child.is_over() and len(pids) == 2
    child.finding()  # stops it
    assert_gone(pids)


def test_ranks_that_hang_and_hear_no_signal_do_not_outlive_their_check(world: Path) -> None:
    """torchrun gives each a session of its own, so that it is in no group of the check's."""
    (world / "sitecustomize.py").write_text(HANGING_RANKS, encoding="utf-8")
    child = Child(find_check("ranks"), Request("cpu"), NEVER)
    pids = wait_for(world / "rank0", world / "rank1")
    child.finding()  # stops it
    assert_gone(pids)


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_a_doctor_that_is_stopped_leaves_no_check_behind(tmp_path: Path, blow: int) -> None:
    command = [sys.executable, "-m", "scripts.doctor", "--only=device"]
    environment = os.environ | fake_package(tmp_path, "torch", HANGING)
    visit = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    pids = wait_for(tmp_path / "pids")
    visit.send_signal(blow)
    assert visit.communicate(timeout=60)[1].strip() == b"interrupted" and visit.returncode == 130
    assert_gone(pids)


def test_what_measures_runs_alone_and_two_others_side_by_side() -> None:
    quiet, loud = (
        Check(name, lambda request: Result("ok", ""), 1, alone=name == "quiet") for name in ("quiet", "loud")
    )
    assert has_room(quiet, []) and has_room(loud, []) and has_room(loud, [loud])
    assert not has_room(quiet, [loud]) and not has_room(loud, [quiet]) and not has_room(loud, [loud, loud])
