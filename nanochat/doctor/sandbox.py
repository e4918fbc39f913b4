"""Which levels of the sandbox this machine can have: in each, a program tries what the level should prevent."""

import sys

from nanochat.common import UserError
from nanochat.doctor.result import Request, Result
from nanochat.sandbox.execute import execute_code
from nanochat.sandbox.locks import landlock_version
from nanochat.sandbox.supervise import LEVELS

TOO_MANY_BYTES = 2**31
REFUSED = """
def refused(attempt, *arguments):
    try:
        attempt(*arguments)
    except (OSError, MemoryError):
        return True
"""
# What each level holds beyond the one below it. OUTSIDE is a file that exists and is none of the program's.
TRIALS = {
    "limits": f"{REFUSED}assert refused(bytearray, {TOO_MANY_BYTES}), 'it took too much memory'",
    "landlock": "import socket\nassert refused(open, OUTSIDE) and refused(socket.socket), 'it opened something'",
    "namespaces": "import os\nassert not os.path.exists(OUTSIDE) and os.getppid() < 10, 'it saw a file or a process'",
}


def sandbox(request: Request) -> Result:
    """Try every level; the strongest one that holds is the machine's."""
    faults = {level: fault(level) for level in TRIALS}
    level = next((name for name in reversed(TRIALS) if faults[name] is None), LEVELS[0])
    version = landlock_version() if sys.platform == "linux" else 0
    seen = f"level {level}" + (f"; Landlock's version is {version}" if version else "")
    if level != LEVELS[-1]:
        seen += f"; no {LEVELS[-1]}: {faults[LEVELS[-1]]}"
    numbers = {"level": level, "landlock_version": version, **{name: faults[name] is None for name in faults}}
    weak = LEVELS.index(level) < LEVELS.index("landlock")
    advice = "programs that a model writes could read your files here: run them in a container or a virtual machine"
    return Result("missing" if weak else "ok", seen, advice if weak else "", numbers)


def fault(level: str) -> str | None:
    """Why this level does not hold, or None."""
    names = list(TRIALS)
    trial = "\n".join(TRIALS[name] for name in names[: names.index(level) + 1])
    try:
        done = execute_code(f"OUTSIDE = {__file__!r}\n{trial}", lowest_level=level, highest_level=level)
    except UserError as error:
        return str(error)
    return done.error
