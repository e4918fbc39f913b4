"""Command lines: one `Parser` for every recipe, and the flag groups they share.

`--device-batch-size` and `--device_batch_size` are the same flag, nothing may be abbreviated, and a command line with
five mistakes hears of all five at once, one line each, before anything is written. Never imports torch.

    >>> parser = Parser("demo")
    >>> _ = parser.flag("--depth", positive_int, 4, "layers")
    >>> parser.parse(["--depth=6"]).depth
    6
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.common import UserError, prepare_process

Check = Callable[[argparse.Namespace], str | None]


class Parser:
    """argparse with both spellings of a flag, no abbreviations, and all problems reported together."""

    def __init__(self, description: str | None) -> None:
        self._argparse = argparse.ArgumentParser(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._checks: list[Check] = []
        self._problems: list[str] = []

    def flag(
        self, name: str, kind: Callable[[str], Any], default: Any, help: str, *aliases: str, metavar: str | None = None
    ) -> None:
        """A flag with a value. `kind` turns the text into the value or raises ValueError saying what is allowed."""
        shown = help if default in (None, "") else f"{help} (default {default})"

        def convert(text: str) -> Any:
            try:
                return kind(text)
            except ValueError as error:
                self._problems.append(f"{name}={text}: {error}")
                return default

        convert.__name__ = getattr(kind, "__name__", "value")
        self._argparse.add_argument(
            name,
            *aliases,
            type=convert,
            default=default,
            help=shown.replace("%", "%%"),
            metavar=metavar or convert.__name__.upper(),
        )

    def switch(self, name: str, help: str, *aliases: str) -> None:
        """A flag without a value: False unless given."""
        self._argparse.add_argument(name, *aliases, action="store_true", help=help)

    def check(self, check: Check) -> None:
        """Add a rule over several flags; it returns a sentence when broken. Runs once every single flag is right."""
        self._checks.append(check)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `argv` (the process's own by default). Raises UserError listing every problem, one line each."""
        self._problems.clear()
        args = self._argparse.parse_args(self._known(list(sys.argv[1:] if argv is None else argv)))
        if not self._problems:
            self._problems += [problem for check in self._checks if (problem := check(args))]
        if self._problems:
            raise UserError("\n".join(self._problems))
        return args

    def _known(self, argv: list[str]) -> list[str]:
        """The part of `argv` that argparse can take, spelled with dashes; every other part becomes a problem."""
        actions = self._argparse._option_string_actions
        known: list[str] = []
        words = iter(argv[1:] if argv[:1] == ["--"] else argv)  # torchrun passes its separator on
        for word in words:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            action = actions.get(name)
            if action is None:
                self._problems.append(self._unknown(word, name))
            elif action.nargs == 0:
                if equals:
                    self._problems.append(f"{word}: {name} takes no value")
                else:
                    known.append(name)
            elif equals or (value := next(words, None)) is not None:  # type: ignore[assignment]
                known.append(f"{name}={value}" if name.startswith("--") else f"{name}{value}")
            else:
                self._problems.append(f"{name}: needs a value, as in {name}={action.metavar}")
        return known

    def _unknown(self, word: str, name: str) -> str:
        if not name.startswith("-"):
            return f"{word}: not a flag; flags look like --name=value, see --help"
        names = [known for known in self._argparse._option_string_actions if known.startswith("--")]
        longer = [known for known in names if known.startswith(name)]
        close = longer or difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"{word}: unknown flag; {hint}flags are never abbreviated, --help lists them"


def run(main: Callable[[], None]) -> None:
    """Call a recipe's `main` as the process: a UserError becomes lines on stderr and exit code 2."""
    prepare_process()
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


# Kinds of value ------------------------------------------------------------------------------------------------


def number_between(low: float, high: float = float("inf"), whole: bool = False) -> Callable[[str], Any]:
    """A kind for numbers in [low, high]."""

    def number(text: str) -> float | int:
        allowed = f"a {'whole ' if whole else ''}number of at least {low:g}"
        allowed += f" and at most {high:g}" if high < float("inf") else ""
        try:
            value: float | int = int(text.replace("_", "")) if whole else float(text)
        except ValueError:
            raise ValueError(f"must be {allowed}") from None
        if not low <= value <= high or value == float("inf"):
            raise ValueError(f"must be {allowed}")
        return value

    number.__name__ = "n" if whole else "x"
    return number


positive_int = number_between(1, whole=True)
non_negative_int = number_between(0, whole=True)
non_negative_float = number_between(0)
fraction = number_between(0, 1)


def positive_float(text: str) -> float:
    """A number above zero."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number above 0") from None
    if not 0 < value < float("inf"):
        raise ValueError("must be a number above 0")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """A kind for a word from a fixed list."""

    def word(text: str) -> str:
        if text not in choices:
            raise ValueError(f"choose one of {', '.join(repr(choice) if not choice else choice for choice in choices)}")
        return text

    word.__name__ = "|".join(choice for choice in choices if choice)
    return word


def cadence(text: str) -> int:
    """How often something happens: every N steps, or -1 for never."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1 and value != -1:
        raise ValueError("must be a number of steps of at least 1, or -1 for never")
    return value


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
        raise ValueError("must be auto, no, or a step number (-2: the newest)")
    return "newest" if step == -2 else step


# Flag groups that recipes share --------------------------------------------------------------------------------


def add_device_flags(parser: Parser) -> None:
    parser.flag("--device-type", one_of("", "cuda", "cpu", "mps", "xpu"), "", "device; empty: the best one here")
    parser.flag("--seed", non_negative_int, 42, "seed of every random choice")


def add_run_flags(parser: Parser) -> None:
    """Flags of every recipe that trains."""
    add_device_flags(parser)
    parser.flag("--run", str, "", "name shown by the loggers; empty: the model tag")
    parser.flag("--model-tag", str, "", "checkpoint folder; empty: d<depth>", "-g")
    parser.flag("--resume", resume_point, "no", "auto, a step number, or no", "--resume-from-step", metavar="auto|STEP")
    parser.switch("--overwrite", "replace a finished or foreign run of the same tag")
    parser.flag("--logger", one_of("console", "none"), "console", "who shows progress; metrics.jsonl is always written")
    parser.switch("--offline", "never use the network")
    parser.flag("--compile", one_of("auto", "on", "off"), "auto", "torch.compile; auto: on GPUs")


def add_model_choice_flags(parser: Parser, sources: tuple[str, ...], default: str) -> None:
    """Flags that pick a checkpoint to load."""
    parser.flag("--source", one_of(*sources), default, "stage the model comes from", "-i")
    parser.flag("--model-tag", str, "", "checkpoint folder; empty: the deepest, then the newest", "-g")
    parser.flag("--step", non_negative_int, None, "checkpoint step; default: the newest", "-s", "--model-step")
