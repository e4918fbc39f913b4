"""The sandbox holds: C++ sources and programs get nothing out of it, and leave this machine as it was.

As in Python, the same attempts succeed where nothing holds them.
"""

import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import escapes_python
import pytest
from escapes_cpp import COMPILE_BOMBS, FLAGS, LIARS, PRELUDE, PROGRAMS, RUN_BOMBS, SOURCES, X86_PROGRAMS
from sandboxing import MARK, SECRET, Host, attacked_host, survivors

from nanochat.sandbox import execute, supervise
from nanochat.sandbox.execute import ExecutionResult, execute_cpp

ONLY_AS_ROOT = {"root's user"}
EVERY_PROGRAM = {**PROGRAMS, **(X86_PROGRAMS if os.uname().machine == "x86_64" else {})}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="locks of Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    mark = f"{MARK}={uuid.uuid4()}"
    monkeypatch.setitem(supervise.ENVIRONMENT, MARK, mark.partition("=")[2])
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "1")
    with attacked_host(tmp_path, mark) as host:
        yield host


def told(host: Host, source: str) -> str:
    """A source that knows its targets."""
    names = {**host.names(), "SECRET_FILE": host.private / "secret.txt"}
    for name in ("SECRET_FILE", "PRIVATE", "CALLER", "VICTIM", "PORT"):
        source = source.replace(name, str(names[name]))
    return source


def program(body: str) -> str:
    return f"{PRELUDE}\nint main() {{\n{body}\nreturn 0;\n}}"


def attempted(host: Host, source: str, **options: object) -> ExecutionResult:
    before = host.state()
    done = execute_cpp(told(host, source), **options)  # type: ignore[arg-type]
    assert host.state() == before
    assert before["survivors"] == []
    return done


def freely(host: Host, source: str, folder: Path, *flags: str) -> str:
    """What comes of it without the sandbox, errors of the compiler included."""
    (folder / "program.cpp").write_text(told(host, source), encoding="utf-8")
    compiled = subprocess.run(
        ["g++", *flags, "program.cpp", "-o", "program"], cwd=folder, capture_output=True, text=True
    )
    if not (folder / "program").exists():
        return compiled.stderr
    environment = {**os.environ, MARK: host.mark.partition("=")[2]}
    with (folder / "output").open("wb") as file:
        process = subprocess.Popen(
            ["./program"], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file, close_fds=False
        )
        process.communicate(b"some input\n", timeout=60)
    for left in survivors(host.mark):
        os.kill(left, 9)
    return (folder / "output").read_text(encoding="utf-8", errors="replace") + f"left with {process.returncode}"


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_gets_nothing_from_private_files(host: Host, source: str) -> None:
    done = attempted(host, SOURCES[source])
    assert SECRET not in done.stdout + done.stderr + str(done.error)


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_get_nothing_from_private_files(host: Host, flags: str) -> None:
    source, *given = FLAGS[flags]
    done = attempted(host, source, flags=[told(host, flag) for flag in given])
    assert not done.success and shown(done.stderr) == set()


def shown(printed: str) -> set[str]:
    """Words of the private text; error messages quote them one by one."""
    return {word for word in SECRET.split() if re.search(rf"[\s:'‘]{word}[\s:'’]", f" {printed} ")} - {"the"}


def test_one_program_that_tries_it_all_gets_nothing(host: Host) -> None:
    apart = [
        f"if (fork() == 0) {{\n{body}\nfflush(stdout); _exit(0);\n}}\nwait(nullptr);" for body in EVERY_PROGRAM.values()
    ]
    done = attempted(host, program("\n".join([*apart, 'puts("all tried");'])), timeout=20.0)
    assert (done.success, done.stdout) == (True, "all tried\n")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", EVERY_PROGRAM)
def test_a_program_gets_nothing(host: Host, attempt: str) -> None:
    assert "ESCAPED" not in attempted(host, program(EVERY_PROGRAM[attempt])).stdout


@pytest.mark.slow
@pytest.mark.parametrize("attempt", RUN_BOMBS)
def test_a_program_stops_at_its_limits(host: Host, attempt: str) -> None:
    assert "ESCAPED" not in attempted(host, program(RUN_BOMBS[attempt]), timeout=20.0).stdout


@pytest.mark.slow
@pytest.mark.parametrize("bomb", COMPILE_BOMBS)
def test_a_source_stops_the_compiler_only(host: Host, bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "COMPILE", supervise.Limits(seconds=5.0, memory_bytes=2**29))
    done = attempted(host, COMPILE_BOMBS[bomb])
    assert not done.success and done.error


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [*SOURCES, *EVERY_PROGRAM, *RUN_BOMBS])
def test_without_the_sandbox_the_attempt_gets_what_it_wants(host: Host, attempt: str, tmp_path: Path) -> None:
    if os.getuid() and attempt in ONLY_AS_ROOT:
        pytest.skip("needs root outside too")
    bodies = {**EVERY_PROGRAM, **RUN_BOMBS}
    (folder := tmp_path / "folder").mkdir()
    source = program(bodies[attempt]) if attempt in bodies else SOURCES[attempt]
    printed = freely(host, source, folder, *execute.CPP_FLAGS)
    if attempt == "embed it" and "invalid preprocessing directive" in printed:
        pytest.skip("this compiler has no #embed")
    assert ("ESCAPED" if attempt in bodies else SECRET) in printed


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_without_the_sandbox_flags_show_private_files(host: Host, flags: str, tmp_path: Path) -> None:
    source, *given = FLAGS[flags]
    (folder := tmp_path / "folder").mkdir()
    assert shown(freely(host, source, folder, *(told(host, flag) for flag in given)))


# Lies ------------------------------------------------------------------------------------------------------------


def test_a_program_that_ends_well_is_believed(host: Host) -> None:
    done = attempted(host, '#include <iostream>\nint main() { std::cout << "42\\n"; }')
    assert (done.success, done.stdout, done.level) == (True, "42\n", "namespaces")


@pytest.mark.parametrize(
    "lie", [pytest.param(lie, marks=() if lie == "leave before main" else pytest.mark.slow) for lie in LIARS]
)
def test_a_program_that_lies_is_not_believed(host: Host, lie: str) -> None:
    done = attempted(host, f"{PRELUDE}\n{LIARS[lie]}")
    assert not done.success and done.error


# The page ----------------------------------------------------------------------------------------------------------


def test_the_page_lists_every_attempt() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "sandbox.md").read_text(encoding="utf-8")
    python = (escapes_python.FILES, escapes_python.PROGRAMS, escapes_python.NETWORK, escapes_python.PROCESSES)
    python += (
        [call.split()[0] for call in escapes_python.CALLS.split(",")],
        escapes_python.BOMBS,
        escapes_python.LIARS,
    )
    cpp = (SOURCES, FLAGS, {**PROGRAMS, **X86_PROGRAMS}, COMPILE_BOMBS, RUN_BOMBS, LIARS)
    for attempts in (*python, *cpp):
        assert f"| {len(attempts)} | {'; '.join(attempts)} |" in page
    assert sum(map(len, python)) >= 40 and sum(map(len, cpp)) >= 15
