"""The table of checks, in the order in which they are told. A new check is a function and a line here.

A check's limit is for what hangs: about ten times what it takes on two quiet cores, since a busy machine is no fault.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat.common import UserError, printable
from nanochat.doctor import device, installed, kernels, network, resources, sandbox
from nanochat.doctor.result import Request, Result


@dataclass(frozen=True)
class Check:
    """limit_s: a check that takes longer is stopped. needed: nothing can be trained without.

    alone: it measures, so that nothing else should run meanwhile.
    """

    name: str
    run: Callable[[Request], Result]
    limit_s: float
    needed: bool = False
    alone: bool = False


CHECKS = (
    Check("packages", installed.packages, 60, needed=True),
    Check("device", device.device, 60, needed=True, alone=True),
    Check("dtype", device.dtypes, 60, needed=True, alone=True),
    Check("threads", device.threads, 40, alone=True),
    Check("memory", resources.memory, 40, needed=True, alone=True),
    Check("disk", resources.disk, 60, needed=True, alone=True),
    Check("compile", kernels.compiler, 180),
    Check("attention", kernels.attention_kernels, 180, needed=True),
    Check("fp8", kernels.fp8, 90),
    Check("ranks", network.ranks, 120),
    Check("network", network.hub, 40),
    Check("port", network.port, 30),
    Check("sandbox", sandbox.sandbox, 30),
    Check("extras", installed.extras, 60),
    Check("tokenizer", installed.tokenizer, 40),
    Check("text", installed.text, 60, needed=True),
    Check("models", installed.models, 60),
)


def find_check(name: str) -> Check:
    """The check of this name. Raises UserError where there is none."""
    for check in CHECKS:
        if check.name == name:
            return check
    raise UserError(f"{printable(name)!r}: no such check; choose one of {', '.join(c.name for c in CHECKS)}")
