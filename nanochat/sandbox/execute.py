"""Run a program that a model has written and say how it went.

    execute_code("def double(x): return 2 * x", checks="assert double(4) == 8")
    execute_cpp("int main() { return 0; }")

`success` needs more than an exit code: a random text, drawn here for each call, that comes back from the sandbox only
after the checks have passed (`harness`), or, in C++, after `main` has returned 0.
"""

import marshal
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, printable
from nanochat.sandbox.supervise import LEVELS, Limits, Outcome, Program, Stage, run
from nanochat.sandbox.view import cpp_view, find_compiler, interpreter, python_view

LEAST_MEMORY_BYTES = 2**26  # the interpreter takes some
COMPILE = Limits(seconds=30.0, memory_bytes=2**30)
CPP_FLAGS = ("-std=c++17", "-O1", "-pipe")
OUT_OF_MEMORY = ("MemoryError", "std::bad_alloc", "virtual memory exhausted", "out of memory")
CPU_SIGNAL = 24

# Comes before the program's first line, so that no macro of its reaches it, and declares what it needs by itself, so
# that it adds no name to the program's. The linker puts it between the C library's start and the program's `main`.
CPP_HARNESS = """
extern "C" long read(int, void *, unsigned long);
extern "C" long write(int, const void *, unsigned long);
extern "C" int __real_main(int, char **, char **);
extern "C" int __wrap_main(int argc, char **argv, char **environment) {
    char sentinel[256];
    int code = __real_main(argc, argv, environment);
    if (code == 0) {
        long size = read(3, sentinel, sizeof sentinel);
        if (size <= 0 || write(4, sentinel, size) != size) code = 1;
    }
    return code;
}
"""


@dataclass(frozen=True)
class ExecutionResult:
    """success: the program did what it should. error: one line, or None. level: of the sandbox it ran in.

    Of what is printed, only the first bytes are kept (`Limits.output_bytes`).
    """

    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False
    level: str = LEVELS[-1]


def execute_code(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int = 2**28,
    *,
    checks: str = "",
    packages: Sequence[Path] = (),
    lowest_level: str = LEVELS[-1],
    highest_level: str = LEVELS[-1],
) -> ExecutionResult:
    """Run Python code, then `checks`, which know its names, in another process; success if neither raises.

    Without checks, success only says that the code has come to its end, on its own word. packages: folders from which
    it may import. lowest_level: below it nothing is run and UserError is raised.
    """
    limits = checked_limits(timeout, maximum_memory_bytes)
    sentinel = secrets.token_hex(32)
    harness = Path(__file__).with_name("harness.py").read_text(encoding="utf-8")
    view = python_view(packages)
    arguments = [interpreter(), "-s", "-S", "-B", "-c", harness, *view.packages]
    job = marshal.dumps({"code": code, "checks": checks, "sentinel": sentinel})
    program = Program([Stage("run", arguments, limits)], view, job)
    return result(run(program, lowest_level, highest_level), sentinel)


def execute_cpp(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int = 2**28,
    *,
    flags: Sequence[str] = CPP_FLAGS,
    lowest_level: str = LEVELS[-1],
    highest_level: str = LEVELS[-1],
) -> ExecutionResult:
    """Compile a C++ program and run it, both in the sandbox; success if `main` returns 0.

    The program is judged by its own exit. Where that is not enough, compare `stdout` with what it should be.
    """
    compiler = find_compiler()
    if compiler is None:
        raise UserError("no C++ compiler: install g++ or clang++")
    limits = checked_limits(timeout, maximum_memory_bytes)
    sentinel = secrets.token_hex(32)
    sources = {"program.cpp": code.encode(errors="surrogatepass"), "harness.h": CPP_HARNESS.encode()}
    compiling = [compiler, *flags, "-include", "harness.h", "program.cpp", "-Wl,--wrap=main", "-o", "program"]
    stages = [Stage("compile", compiling, COMPILE), Stage("run", ["./program"], limits)]
    program = Program(stages, cpp_view(compiler), sentinel.encode(), sources)
    return result(run(program, lowest_level, highest_level), sentinel)


def checked_limits(timeout: float, maximum_memory_bytes: int) -> Limits:
    if not 0 < timeout < float("inf"):
        raise UserError(f"timeout {timeout}: must be a number of seconds above 0")
    if maximum_memory_bytes < LEAST_MEMORY_BYTES:
        raise UserError(f"maximum_memory_bytes {maximum_memory_bytes:,}: must be at least {LEAST_MEMORY_BYTES:,}")
    return Limits(timeout, maximum_memory_bytes)


def result(outcome: Outcome, sentinel: str) -> ExecutionResult:
    """What the outcome means."""
    stdout, stderr, report = (
        text.decode(errors="replace") for text in (outcome.stdout, outcome.stderr, outcome.report)
    )
    is_success = report == sentinel and outcome.codes.get("run") == 0
    late = outcome.timeout or -CPU_SIGNAL in outcome.codes.values()
    error = None if is_success else what_is_wrong(outcome, stderr, report.removeprefix(sentinel), late)
    no_memory = outcome.memory_exceeded or (error or "").startswith(OUT_OF_MEMORY)
    return ExecutionResult(is_success, stdout, stderr, error, late, no_memory, str(outcome.level))


def what_is_wrong(outcome: Outcome, stderr: str, report: str, late: bool) -> str:
    """One line."""
    if outcome.memory_exceeded:
        return "MemoryError: its processes together took more than they may"
    if late:
        return "it took longer than it may"
    if report:  # the judge's
        return printable(report)
    if told := re.search("|".join(OUT_OF_MEMORY[1:]), stderr):  # C++ and its compiler
        return told[0]
    code = outcome.codes.get("run")
    if code is None and "compile" in outcome.codes:
        return f"does not compile: {next(iter(re.findall('.*error: .*', stderr)), 'the compiler was stopped')}"
    if code is None:
        return "it was stopped from outside"
    return f"it was ended by signal {-code}" if code < 0 else f"it left with exit code {code} before all was done"
