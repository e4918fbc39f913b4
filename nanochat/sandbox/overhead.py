"""What the sandbox costs: the same small programs as plain processes and in it, in turns."""

import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nanochat.sandbox.execute import CPP_FLAGS, execute_code, execute_cpp
from nanochat.sandbox.view import find_compiler, interpreter

PYTHON = "print(sum(range(1000)))"
CPP = '#include <iostream>\nint main() { std::cout << 499500 << "\\n"; }'


def overhead(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each run, by language: {"python": {"bare_s": [...], "sandbox_s": [...]}, ...}."""
    pairs = {"python": (bare_python, lambda: execute_code(PYTHON).stdout)}
    if compiler := find_compiler():
        pairs["cpp"] = (lambda: bare_cpp(compiler), lambda: execute_cpp(CPP).stdout)
    return {language: in_turns(*pair, repeats) for language, pair in pairs.items()}


def in_turns(bare: Callable[[], str], sandboxed: Callable[[], str], repeats: int) -> dict[str, list[float]]:
    """The first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {"bare_s": [], "sandbox_s": []}
    for turn in range(repeats + 1):
        for kind, run in zip(seconds, (bare, sandboxed)):
            began = time.perf_counter()
            printed = run()
            if turn:
                seconds[kind].append(time.perf_counter() - began)
            assert printed == "499500\n"
    return seconds


def bare_python() -> str:
    return subprocess.run([interpreter(), "-c", PYTHON], capture_output=True, text=True, check=True).stdout


def bare_cpp(compiler: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.cpp").write_text(CPP, encoding="utf-8")
        subprocess.run([compiler, *CPP_FLAGS, "program.cpp", "-o", "program"], cwd=folder, check=True)
        return subprocess.run(["./program"], cwd=folder, capture_output=True, text=True, check=True).stdout
