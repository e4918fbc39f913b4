"""The Python tool: a program of the model's goes in, what it prints comes out, as text for `tools.CalculatorHook`.

The program runs as lines typed at Python's own prompt would: an expression that stands alone shows its value. Each call
is a new process, which knows nothing of earlier ones. Who runs it is the caller's choice: a sandbox's `execute_code`.
The reading of the program happens in there too, for it can itself take memory and time.
"""

from collections.abc import Callable
from typing import Any

from nanochat.common import UserError, printable

TIMEOUT_S = 5.0  # wall clock, of one call
MAX_MEMORY_BYTES = 2**28
MAX_ERROR_CHARS = 200
_AS_TYPED = "import ast\nexec(compile(ast.Interactive(ast.parse({program!r}).body), '<call>', 'single'))"


def python_tool(execute: Callable[..., Any]) -> Callable[[str], str]:
    """A function from a program to its output. It never raises, and the output says what went wrong.

    execute: `nanochat.sandbox.execute.execute_code`, or the like. Runs an empty program first: raises UserError where
    `execute` does, or where not even that one succeeds.
    """

    def run(program: str) -> Any:
        return execute(_AS_TYPED.format(program=program), timeout=TIMEOUT_S, maximum_memory_bytes=MAX_MEMORY_BYTES)

    def answer(program: str) -> str:
        try:
            done = run(program)
        except UserError as error:  # it could run the empty one, but not this
            return f"error: {error}"
        return "\n".join(filter(None, (done.stdout.rstrip(), _failure(done))))

    if failure := _failure(run("")):
        raise UserError(f"the Python tool cannot run programs here ({printable(failure)}); leave it off")
    return answer


def _failure(done: Any) -> str:
    if done.success:
        return ""
    if done.timeout:
        return f"error: longer than {TIMEOUT_S:g} s"
    if done.memory_exceeded:
        return f"error: more than {MAX_MEMORY_BYTES >> 20} MB of memory"
    return f"error: {(done.error or 'the program failed')[:MAX_ERROR_CHARS]}"
