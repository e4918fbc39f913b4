"""The sandbox as its callers see it: what counts as success, what comes back, levels, and nothing that is left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandboxing import MARK, survivors

from nanochat.common import UserError
from nanochat.sandbox import processes, supervise
from nanochat.sandbox.execute import ExecutionResult, execute_code, execute_cpp
from nanochat.sandbox.locks import landlock_version
from scripts import bench

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks of Linux")
needs_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


# Success and failure -----------------------------------------------------------------------------------------------


def test_a_program_that_comes_to_its_end_succeeds() -> None:
    done = execute_code("import sys\nprint('out')\nprint('err', file=sys.stderr)\nassert __name__ == '__main__'")
    assert done == ExecutionResult(True, "out\n", "err\n", None, False, False, "namespaces")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise ValueError('two\\nlines')", "ValueError: two\\nlines"),
        ("import os; os._exit(3)", "the program left with exit code 3 before all was done"),
        ("import os; os.kill(os.getpid(), 9)", "the program was ended by signal 9 before all was done"),
        ("'\0'", "(SyntaxError|ValueError): source code string cannot contain null bytes"),
        ("'\ud800'", "UnicodeEncodeError: .*"),
    ],
)
def test_a_program_that_fails_is_told_in_one_line(code: str, error: str) -> None:
    done = execute_code(code)
    assert not done.success and re.fullmatch(
        error if ".*" in error or "|" in error else re.escape(error), str(done.error)
    )


def test_a_traceback_shows_the_program_only() -> None:
    frames = re.findall('File "(.*)", line', execute_code("def f():\n    1 / 0\nf()").stderr)
    assert frames == ["<program>", "<program>"]


def test_limits_are_told_apart() -> None:
    late, greedy = execute_code("while True: pass", timeout=0.3), execute_code("bytearray(10**9)")
    assert (late.timeout, late.memory_exceeded, late.error) == (True, False, "it took longer than it may")
    assert (greedy.timeout, greedy.memory_exceeded, greedy.error) == (False, True, "MemoryError")
    assert execute_code("bytearray(5 * 10**8)", maximum_memory_bytes=10**9).success


def test_processes_are_counted() -> None:
    code = """
import os, time
count = 0
try:
    while count < 100:
        if os.fork() == 0:
            time.sleep(10)
        count += 1
except BlockingIOError:
    print(count)
"""
    most = supervise.Limits(1, 2**28).processes
    assert most - 5 < int(execute_code(code).stdout) < most


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"timeout": float("nan")}, {"maximum_memory_bytes": 10}])
def test_impossible_limits_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="must be"):
        execute_code("", **wrong)


def test_programs_run_side_by_side() -> None:
    with ThreadPoolExecutor(8) as pool:
        printed = list(pool.map(lambda n: execute_code(f"print({n})", timeout=30.0).stdout, range(16)))
    assert printed == [f"{n}\n" for n in range(16)]


def test_packages_are_seen_only_if_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "some_package.py").write_text("answer = 42")
    tmp_path.chmod(0o755)
    code = "import some_package; print(some_package.answer)"
    assert execute_code(code).error == "ModuleNotFoundError: No module named 'some_package'"
    assert execute_code(code, packages=[tmp_path]).stdout == "42\n"
    with pytest.raises(UserError, match="is no folder"):
        execute_code(code, packages=[tmp_path / "missing"])
    write = f"open({str(tmp_path / 'new')!r}, 'w')"
    assert "Read-only file system" in str(execute_code(write, packages=[tmp_path]).error)


def test_the_program_has_a_folder_of_its_own_that_is_empty_each_time() -> None:
    code = (
        "import os\nassert os.listdir() == []\nopen('file', 'w').write('x')\nimport tempfile; tempfile.TemporaryFile()"
    )
    assert execute_code(code).success and execute_code(code).success


# Checks ------------------------------------------------------------------------------------------------------------

PROGRAM = """
import math
from collections import Counter, defaultdict
from fractions import Fraction
class Stack:
    def __init__(self): self.items = [1]
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __getitem__(self, place): return self.items[place]
    def __str__(self): return 'a stack'
class Odd(ValueError): pass
class Sneaky(int):
    def __eq__(self, other): return True
def echo(value): return value
def fail(kind): raise kind('why')
def odd(): raise Odd('odd')
def numbers(n): yield from range(n)
def counts(text): return Counter(text)
def groups(): return defaultdict(list, {1: [2]})
def half(): return Fraction(1, 2)
def stack(): return Stack()
def size_of(stack): return len(stack.items)
def sneaky(): return Sneaky(1)
def slow_fail(): raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'why')
def name_of(function): return function.__name__
answer = 42
abs = math.fabs = lambda number: 0
"""


@pytest.mark.parametrize(
    "check",
    [
        "for value in (1, -2.5, 'a', b'b', None, (1, [2]), {3: {4}}, frozenset([5]), 1 + 2j, range(3), True):\n"
        "    assert echo(value) == value and type(echo(value)) is type(value)",
        "assert str(echo(float('nan'))) == 'nan' and echo(float('inf')) > 10**300 and echo(10**400) == 10**400",
        "assert counts('aab') == {'a': 2, 'b': 1} and groups()[1] == [2] and groups() == {1: [2]} and half() == 0.5",
        "assert answer == 42 and echo(value=answer) == 42",
        "assert list(numbers(3)) == [0, 1, 2] and [next(numbers(1))] == [0]",
        "s = stack(); s.push(2).push(3); assert len(s) == 3 and s[-1] == 3 and s.items == [1, 2, 3]",
        "assert str(Stack()) == 'a stack' and size_of(stack()) == 1 and name_of(echo) == 'echo'",
        "try: echo(1, 2)\nexcept TypeError as error: assert 'positional' in str(error)\nelse: assert 0",
        "try: odd()\nexcept ValueError as error: assert str(error) == 'Odd: odd'\nelse: assert 0",
        "try: slow_fail()\nexcept RuntimeError as error: assert 'UnicodeDecodeError' in str(error)\nelse: assert 0",
        "def check(candidate):\n    assert candidate([1]) == [1] and abs(-1) == math.fabs(-1) == 1\ncheck(echo)",
    ],
)
def test_checks_call_the_program_and_get_its_values(check: str) -> None:
    done = execute_code(PROGRAM, checks=check)
    assert done.success, done


@pytest.mark.parametrize(
    ("check", "error"),
    [
        ("assert echo(1) == 1\nassert echo(1) == 2", "AssertionError (line 2 of the checks)"),
        ("assert missing(1)", "NameError: name 'missing' is not defined (line 1 of the checks)"),
        ("assert sneaky() == 1", "AssertionError (line 1 of the checks)"),
        ("echo(lambda: 1)", "TypeError: checks can give a program plain values, not a function (line 1 of the checks)"),
        ("fail(1)", "TypeError: 'int' object is not callable (line 1 of the checks)"),
        ("1 +", "SyntaxError: invalid syntax (<checks>, line 1)"),
        ("raise SystemExit(0)", "SystemExit: 0 (line 1 of the checks)"),
        ("__import__('os')._exit(0)", "it left with exit code 0 before all was done"),
    ],
)
def test_checks_that_fail_are_told_in_one_line(check: str, error: str) -> None:
    done = execute_code(PROGRAM, checks=check)
    assert (done.success, done.error) == (False, error)


def test_checks_that_catch_everything_are_no_way_round_a_program_that_has_gone() -> None:
    done = execute_code("import os\ndef f(): os._exit(0)", checks="try: f()\nexcept BaseException: pass")
    assert (done.success, done.error) == (False, "the program left with exit code 0 before all was done")


def test_checks_are_out_of_the_programs_sight() -> None:
    code = """
import gc
def texts():
    found = [value for held in gc.get_objects() if type(held) is dict for value in held.values() if type(value) is str]
    return [text for text in found if 'need' 'le' in text]
own = 'a need' 'le of its own'
"""
    assert execute_code(code, checks="assert texts() == ['a needle of its own'], 'needle in the haystack'").success


# C++ ---------------------------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("int main() { return 0; }", None),
        ("int main(int count, char **) { if (count != 1) return 1; }", None),
        ("int main() { return 3; }", "it left with exit code 3 before all was done"),
        ("int main() { __builtin_trap(); }", "it was ended by signal 4"),
        ("int main() { throw 1; }", "it was ended by signal 6"),
        ("char *held; int main() { held = new char[1ul << 40]; }", "std::bad_alloc"),
        ("int main() { return x; }", "program.cpp:1:21: error: ‘x’ was not declared in this scope"),
    ],
)
def test_a_cpp_program_is_judged_by_its_exit(code: str, error: str | None) -> None:
    done = execute_cpp(code)
    assert (done.success, done.error) == (
        error is None,
        error and error.replace("program.cpp", "does not compile: program.cpp"),
    )
    assert done.memory_exceeded == (error == "std::bad_alloc")


# Levels ------------------------------------------------------------------------------------------------------------


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UserError, match="level 'some': choose one of none, limits, landlock, namespaces"):
        execute_code("", lowest_level="some")
    with pytest.raises(UserError, match="lowest level 'namespaces' is above the highest, 'limits'"):
        execute_code("", highest_level="limits")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@needs_cpp
@pytest.mark.parametrize("level", ["landlock", "limits", "none"])
def test_a_lower_level_holds_what_it_says(level: str, open_folder: Path) -> None:
    (secret := open_folder / "secret.txt").write_text("x")
    code = f"""
        #include <cstdio>
        #include <sys/resource.h>
        #include <sys/socket.h>
        #include <unistd.h>
        int main() {{
            rlimit limit;
            getrlimit(RLIMIT_CPU, &limit);
            printf("%d%d", !!fopen("{secret}", "r"), socket(AF_INET, SOCK_STREAM, 0) >= 0);
            printf("%d%d", limit.rlim_cur == RLIM_INFINITY, !!fopen("own.txt", "w"));
            return getuid() == 0;
        }}
    """
    done = execute_cpp(code, lowest_level=level, highest_level=level)
    assert done.level == level
    assert done.stdout == {"landlock": "0001", "limits": "1101", "none": "1111"}[level]
    assert done.success == (level != "none" or os.getuid() != 0)


IN_A_KERNEL_WITHOUT_NAMESPACES = """
from nanochat.common import UserError
from nanochat.sandbox.execute import execute_code
try:
    execute_code("")
except UserError as error:
    print(error)
print(execute_code("", lowest_level="limits").level)
"""


def test_where_a_level_cannot_be_had_nothing_is_run_unless_a_lower_one_will_do() -> None:
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this kernel has no namespaces for us to forbid")
    command = [*inside, sys.executable, "-c", IN_A_KERNEL_WITHOUT_NAMESPACES]
    refusal, level = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert "no sandbox of level 'namespaces' or above can be had here (namespaces: [Errno 28]" in refusal
    assert level == ("landlock" if landlock_version() else "limits")


BY_BUBBLEWRAP = """
from nanochat.sandbox.execute import execute_code, execute_cpp
for done in (execute_code("import os; print(os.getuid(), os.listdir('/code'))"), execute_cpp("int main() {}")):
    print(done.success, done.level, done.stdout, done.error)
print(execute_code("open('/etc/passwd')").error)
"""


def test_bubblewrap_is_used_where_only_it_may_make_namespaces(tmp_path: Path) -> None:
    """As an ordinary user, with a launcher that may not."""
    shutil.copytree(ROOT / "nanochat", tmp_path / "nanochat", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "nanochat" / "sandbox" / "kernel.py").open("a") as file:
        file.write("\ndef fork_into_namespaces() -> int:\n    raise OSError(1, 'forbidden')\n")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-B", "-c", "import sys; print(sys.version_info >= (3, 10))"]
        try:
            usable = subprocess.run(command, capture_output=True, text=True, **user).stdout == "True\n"  # type: ignore[call-overload]
        except OSError:
            usable = False
        if usable and shutil.which("bwrap") and shutil.which("g++"):
            break
    else:
        pytest.skip("needs bubblewrap, g++ and a Python that an ordinary user may start")
    done = subprocess.run(  # type: ignore[call-overload]
        [python, "-B", "-c", BY_BUBBLEWRAP], cwd=tmp_path, capture_output=True, text=True, **user
    )
    assert done.stdout.splitlines() == [
        "True namespaces 1000 ['nanochat']",
        " None",
        "True namespaces  None",
        "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'",
    ], done.stderr


# What it costs -----------------------------------------------------------------------------------------------------


def test_its_cost_is_measured_beside_plain_processes(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--only=sandbox", "--device-type=cpu", "--peak-seconds=0", "--repeats=2"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert "python" in figures
    for seconds in figures.values():
        both = [
            spread[name] for spread in (seconds["sandbox_s"], seconds["bare_s"]) for name in ("min", "median", "max")
        ]
        assert min(both) > 0.001 and both[0] - both[5] <= seconds["added_s"] <= both[2] - both[3]


# Nothing is left ---------------------------------------------------------------------------------------------------


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("level", ["namespaces", "none"])
def test_a_run_leaves_no_process_file_or_folder(level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(supervise.ENVIRONMENT, MARK, "test-leaves-nothing")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, children = open_files(), processes.children(os.getpid())
    for code in ("import os, time\nif os.fork() == 0: os.setsid(); time.sleep(60)", "import time; time.sleep(60)"):
        execute_code(code, timeout=0.3, lowest_level="none", highest_level=level)
    with pytest.raises(UserError):
        execute_code("", lowest_level="some")
    assert (open_files(), os.listdir(tmp_path), survivors("test-leaves-nothing")) == (before, [], [])
    assert processes.children(os.getpid()) == children


def test_a_caller_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(supervise.ENVIRONMENT, MARK, "test-interrupted")
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            execute_code("import time; time.sleep(60)", timeout=60.0)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert survivors("test-interrupted") == []


@pytest.mark.parametrize("level", ["namespaces", "none"])
def test_a_caller_that_is_killed_takes_the_program_with_it(level: str, tmp_path: Path) -> None:
    code = f"""
from nanochat.sandbox import supervise
from nanochat.sandbox.execute import execute_code
supervise.ENVIRONMENT[{MARK!r}] = "test-killed-{level}"
execute_code("import time; time.sleep(60)", timeout=60.0, lowest_level="none", highest_level={level!r})
"""
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    while len(found := survivors(f"test-killed-{level}")) < 2:  # the judge and the program
        assert caller.poll() is None
        time.sleep(0.02)
    assert {Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in found} == {"1000\n"}
    caller.kill()
    caller.wait()
    ends = time.monotonic() + 20
    while survivors(f"test-killed-{level}") and time.monotonic() < ends:
        time.sleep(0.02)
    assert survivors(f"test-killed-{level}") == []
