"""Visits of the doctor as a user makes them: a process, in a world where something is broken."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


class Visit:
    """A run of the doctor as a process: exit code, what it printed, and the checks by name."""

    def __init__(
        self, *flags: str, limits: Callable[[], None] | None = None, inside: Sequence[str] = (), **environment: str
    ) -> None:
        command = [*inside, sys.executable, "-m", "scripts.doctor", "--json", *flags]
        dropped = ("NANOCHAT_DTYPE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CXX")
        given = {name: value for name, value in os.environ.items() if name not in dropped} | environment
        done = subprocess.run(
            command, cwd=REPO, env=given, capture_output=True, text=True, timeout=300, preexec_fn=limits
        )
        assert done.stdout, done.stderr
        self.code, self.printed, self.errors = done.returncode, done.stdout, done.stderr
        self.record = json.loads(done.stdout.splitlines()[-1])
        self.checks: dict[str, dict[str, Any]] = {check["name"]: check for check in self.record["checks"]}

    def states(self) -> dict[str, str]:
        return {name: check["state"] for name, check in self.checks.items()}


def fake_package(folder: Path, name: str, source: str) -> dict[str, str]:
    """The environment in which this is the package of that name."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def assert_gone(pids: Sequence[int]) -> None:
    """That these processes end; they are not ours to wait for. An orphan is a zombie until somebody collects it."""
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if state(pid) not in ("Z", "X", "")]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.01)


def state(pid: int) -> str:
    """Of a process, as Linux has it; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(*paths: Path) -> list[int]:
    """The numbers that others write into these files, once they all have; each file appears whole."""
    deadline = time.monotonic() + 240
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{[path.name for path in paths if not path.exists()]} never came"
        time.sleep(0.05)
    return [int(word) for path in paths for word in path.read_text().split()]
