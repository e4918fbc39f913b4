"""A rank does not outlive torchrun, whenever that dies. The launchers and ranks here are real processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.stdin.read()
"""

ARMED = """
import time
from nanochat.parallel import end_with_launcher
end_with_launcher()
print("works", flush=True)
time.sleep(30)
print("lives on", flush=True)
"""

LATE = """
import os, time
from nanochat.parallel import PARENT, end_with_launcher
print("works", flush=True)
while os.getppid() == PARENT:
    time.sleep(0.01)
end_with_launcher()
print("lives on", flush=True)
"""


@contextmanager
def launched(rank: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher and its rank, which has said its first word."""
    command = [sys.executable, "-c", LAUNCHER, rank]
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}  # as torchrun has it
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=REPO, env=env, text=True, **pipes) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "works\n"
        yield launcher


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_rank_ends_when_its_launcher_is_killed() -> None:
    with launched(ARMED) as launcher:
        launcher.kill()
        assert launcher.stdout is not None and launcher.stdout.read() == ""  # the pipe ends with the rank


def test_a_rank_whose_launcher_has_died_before_it_could_ask_ends_as_well() -> None:
    with launched(LATE) as launcher:
        launcher.kill()
        assert launcher.stdout is not None and launcher.stdout.read() == ""
