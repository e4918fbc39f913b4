"""What a check is told and what it tells."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the user asks for: the flags --device-type and --offline."""

    device_type: str = ""
    offline: bool = False


@dataclass(frozen=True)
class Result:
    """state: ok; slow: works, but less well than it should; missing: not there; failed: there, but does not work.

    seen: one line with numbers. advice: what to do, where it is not ok. numbers: the same for programs.
    """

    state: str
    seen: str
    advice: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
