"""What can be set about answers: each is a flag of the recipe and a slash command of the conversation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat import kinds
from nanochat.serve import limits


@dataclass(frozen=True)
class Setting:
    """name: the field's of `engine.Sampling` where it is one, and with dashes the flag's. word: the slash command's."""

    name: str
    word: str
    kind: Callable[[str], Any]
    default: float
    help: str
    letters: tuple[str, ...] = ()  # short flags

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def metavar(self) -> str:
        return "N" if isinstance(self.default, int) else "X"


_KNOWN = limits.Defaults()
_TEMPERATURE = kinds.number_between(0, limits.MAX_TEMPERATURE)
_TOP_P, _PENALTY = kinds.number_between(0.001, 1), kinds.number_between(1, 2)
SETTINGS = (
    Setting(
        "temperature", "temperature", _TEMPERATURE, _KNOWN.temperature, "0 always takes the likeliest token", ("-t",)
    ),
    Setting(
        "top_k",
        "topk",
        kinds.non_negative_int,
        _KNOWN.top_k,
        "sample among the k likeliest tokens, 0 among all",
        ("-k",),
    ),
    Setting("top_p", "topp", _TOP_P, 1.0, "sample among the likeliest that make up this share of all"),
    Setting("min_p", "minp", kinds.fraction, 0.0, "leave out what is below this share of the likeliest"),
    Setting("repetition_penalty", "repeat", _PENALTY, 1.0, "make tokens that were there already less likely, 1 off"),
    Setting("max_tokens", "max", kinds.positive_int, 256, "longest answer in tokens", ("-m",)),
    Setting("seed", "seed", kinds.seed, _KNOWN.seed, "of the next answer; each later one has the next number"),
)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # the settings that are fields of Sampling
