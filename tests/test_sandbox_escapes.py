"""The sandbox holds: attempts to get out of it in Python get nothing, and leave this machine as it was.

The same attempts get what they want where nothing holds them (`test_without_the_sandbox_...`).
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from escapes_python import BOMBS, CALLS, CHECKS, FILES, LIARS, NETWORK, PRELUDE, PROCESSES, PROGRAMS
from sandboxing import MARK, Host, attacked_host, survivors

from nanochat.sandbox import supervise
from nanochat.sandbox.execute import ExecutionResult, execute_code

ATTEMPTS = {**FILES, **PROGRAMS, **NETWORK, **PROCESSES}
OUTPUT_BYTES = supervise.Limits(1, 2**28).output_bytes
# Attempts that need rights which the tests may not have outside either.
ONLY_AS_ROOT = {"root's user", "root's rights", "read another process's memory"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks of Linux")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A machine to be attacked, which is as it was at the end."""
    mark = f"{MARK}={uuid.uuid4()}"
    monkeypatch.setitem(supervise.ENVIRONMENT, MARK, mark.partition("=")[2])
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "1")
    with attacked_host(tmp_path, mark) as host:
        yield host


def program(host: Host, attempt: str) -> str:
    names = "".join(f"{name} = {value!r}\n" for name, value in host.names().items())
    return names + PRELUDE + attempt


def attempted(host: Host, attempt: str, **options: object) -> ExecutionResult:
    """What an attempt does in the sandbox; the machine is the same before and after."""
    before = host.state()
    done = execute_code(program(host, attempt), **options)  # type: ignore[arg-type]
    assert host.state() == before
    assert before["survivors"] == []
    assert done.level == "namespaces"
    return done


def freely(host: Host, attempt: str, folder: Path) -> str:
    """What it prints as a plain process with our environment and open files."""
    environment = {**os.environ, MARK: host.mark.partition("=")[2]}
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", program(host, attempt)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            close_fds=False,
        )
        process.communicate(b"some input\n", timeout=60)
    for left in survivors(host.mark):
        os.kill(left, 9)
    return output.read_text(encoding="utf-8")


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_to_get_out_gets_nothing(host: Host, attempt: str) -> None:
    done = attempted(host, ATTEMPTS[attempt])
    assert "ESCAPED" not in done.stdout or attempt == "a child that survives", done


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [*ATTEMPTS, *BOMBS])
def test_without_the_sandbox_the_attempt_gets_what_it_wants(host: Host, attempt: str, tmp_path: Path) -> None:
    if os.getuid() and attempt in ONLY_AS_ROOT:
        pytest.skip("needs root outside too")
    (tmp_path / "folder").mkdir()
    assert "ESCAPED" in freely(host, {**ATTEMPTS, **BOMBS}[attempt], tmp_path / "folder")


# System calls ----------------------------------------------------------------------------------------------------

EVERY_CALL = f"""
for line in {CALLS.replace(",", " ,").split(" ,")!r}:
    name, *numbers = line.split()
    print(name, call(*map(int, numbers))[1])
"""


def refusals(printed: str) -> dict[str, int]:
    return {name: int(error) for name, error in (line.split() for line in printed.splitlines())}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
def test_calls_that_no_program_needs_are_refused(host: Host) -> None:
    done = attempted(host, EVERY_CALL)
    kept = {name: error for name, error in refusals(done.stdout).items() if error not in (1, 38)}
    assert (len(refusals(done.stdout)), kept) == (len(CALLS.split(",")), {})


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64" or os.getuid() != 0, reason="numbers of x86-64, rights of root")
def test_without_the_sandbox_these_calls_are_answered(host: Host, tmp_path: Path) -> None:
    refused = {name for name, error in refusals(freely(host, EVERY_CALL, tmp_path)).items() if error == 1}
    assert refused == set()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
@pytest.mark.parametrize("flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000])
def test_a_clone_into_a_namespace_is_refused(host: Host, flag: int) -> None:
    attempt = f"result = call(56, {flag} | 17, 0, 0, 0, 0)\nresult[0] == 0 and os._exit(0)\nprint(*result)"
    assert attempted(host, attempt).stdout == "-1 1\n"
    assert attempted(host, attempt.replace(str(flag), "0")).stdout != "-1 1\n"  # a plain child is none


# Bombs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("attempt", BOMBS)
def test_a_bomb_stops_at_a_limit(host: Host, attempt: str) -> None:
    assert "ESCAPED" not in attempted(host, BOMBS[attempt], timeout=20.0).stdout


def test_a_program_without_end_is_ended(host: Host) -> None:
    stubborn = (
        "import signal\nfor number in range(1, 32):\n try: signal.signal(number, signal.SIG_IGN)\n except OSError: 0"
    )
    done = attempted(host, f"{stubborn}\nprint('begun', flush=True)\nwhile True: pass", timeout=0.5)
    assert (done.stdout, done.timeout, done.success) == ("begun\n", True, False)
    assert attempted(host, "os.kill(os.getpid(), 19)", timeout=0.5).timeout
    assert attempted(host, "os.kill(os.getppid(), 19)", timeout=0.5).timeout


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_without_end_is_cut(host: Host, stream: str) -> None:
    attempt = f"for _ in range(2000): sys.{stream}.write('x' * 10_000)"
    done = attempted(host, attempt, timeout=20.0)
    assert done.success and getattr(done, stream) == "x" * OUTPUT_BYTES
    done = attempted(host, f"while True: sys.{stream}.write('x' * 10_000)", timeout=0.5)
    assert done.timeout and getattr(done, stream) == "x" * OUTPUT_BYTES


def test_there_is_no_input(host: Host) -> None:
    assert attempted(host, "input()").error == "EOFError: EOF when reading a line"


# Lies ------------------------------------------------------------------------------------------------------------


def test_a_program_that_solves_its_task_is_believed(host: Host) -> None:
    assert attempted(host, "def double(x): return 2 * x", checks=CHECKS).success


@pytest.mark.parametrize("lie", LIARS)
def test_a_program_that_lies_is_not_believed(host: Host, lie: str) -> None:
    done = attempted(host, LIARS[lie], checks=CHECKS)
    assert not done.success and done.error and "ESCAPED" not in done.stdout


def test_the_sentinel_is_nowhere_to_be_found(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sentinel = "0123456789abcdef" * 4
    monkeypatch.setattr("secrets.token_hex", lambda size: sentinel)
    found = attempted(host, LIARS["look for the sentinel and write it"], checks=CHECKS).stdout
    assert "many texts" in found and sentinel not in found


@pytest.mark.parametrize("lie", [lie for lie in LIARS if "leave" in lie or "guess" in lie or "sentinel" in lie])
def test_without_checks_leaving_early_is_no_success(host: Host, lie: str) -> None:
    done = attempted(host, LIARS[lie] + "\ndouble(4)")
    assert not done.success and done.error
