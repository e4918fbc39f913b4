"""Kinds of value that a flag can have: functions from the text on the command line to the value.

Each raises ValueError saying what is allowed where the text is something else. Recipes find them in `cli`.
"""

from collections.abc import Callable
from typing import Any

from nanochat import config


def number_between(low: float, high: float = float("inf"), whole: bool = False) -> Callable[[str], Any]:
    """A kind for numbers in [low, high]."""

    def number(text: str) -> float | int:
        shown = str if whole else "{:.15g}".format
        allowed = f"a {'whole ' if whole else ''}number of at least {shown(low)}"
        allowed += f" and at most {shown(high)}" if high < float("inf") else ""
        try:
            value: float | int = int(text.replace("_", "")) if whole else float(text)
        except ValueError:
            raise ValueError(f"must be {allowed}") from None
        if not low <= value <= high or value == float("inf"):
            raise ValueError(f"must be {allowed}")
        return value

    number.__name__ = "n" if whole else "x"
    return number


# Bounds far beyond any use, and far below what overflows or never ends.
positive_int = number_between(1, 10**12, whole=True)
non_negative_int = number_between(0, 10**12, whole=True)
positive_float = number_between(1e-9, 1e12)
non_negative_float = number_between(0, 1e12)
fraction = number_between(0, 1)
flops = number_between(1, 1e30)
depth = number_between(1, 1000, whole=True)
sequence_length = number_between(2, 2**24, whole=True)
vocabulary_size = number_between(1, 2**20, whole=True)
seed = number_between(0, 2**63 - 1, whole=True)


def head_dim(text: str) -> int:
    """Channels of an attention head."""
    value = int(number_between(2, 2**16, whole=True)(text))
    if value % 2:
        raise ValueError(config.EVEN_HEAD_DIM)
    return value


def some_text(text: str) -> str:
    """Any text but none."""
    if not text.strip():
        raise ValueError("must not be empty; leave the flag out or give it a text")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """A kind for a word from a fixed list."""

    def word(text: str) -> str:
        if text not in choices:
            raise ValueError(f"choose one of {', '.join(filter(None, choices))}")
        return text

    word.__name__ = "|".join(choice for choice in choices if choice)
    return word


def folder_name(text: str) -> str:
    """A name that can be one folder."""
    if text.startswith(".") or "/" in text or "\\" in text or not text.isprintable() or len(text.encode()) > 200:
        raise ValueError(
            "must be a plain folder name: no slashes, leading dots or control characters, 200 bytes at most"
        )
    return text


def cadence(text: str) -> int:
    """How often something happens: every N steps, or -1 for never."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1 and value != -1:
        raise ValueError("must be a number of steps of at least 1, or -1 for never")
    return value


def unless_minus_one(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same kind, where -1 means not given (the ancestor's spelling)."""

    def optional(text: str) -> Any:
        return None if text in ("-1", "-1.0") else kind(text)

    optional.__name__ = getattr(kind, "__name__", "value")
    return optional


def resume_point(text: str) -> str | int | None:
    """`auto` continues from the newest checkpoint if there is one, a step number from that one, `no` starts afresh."""
    if text in ("auto", "no"):
        return text
    try:
        step = int(text)
    except ValueError:
        step = -3
    if step == -1:  # the ancestor's default: no resume
        return "no"
    if step < 0 and step != -2:
        raise ValueError("must be auto, no, or the number of a step that was saved")
    return "newest" if step == -2 else step
