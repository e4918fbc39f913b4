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
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir, prepare_process, print0

Check = Callable[[argparse.Namespace], str | None]


class Parser:
    """argparse with both spellings of a flag, no abbreviations, and all problems reported together."""

    def __init__(self, description: str | None) -> None:
        self._argparse = argparse.ArgumentParser(
            prog=_program(),
            usage="%(prog)s [--flag=value ...]",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._checks: list[Check] = []
        self._problems: list[str] = []
        self._kinds: dict[str, Callable[[str], Any]] = {}

    def flag(
        self, name: str, kind: Callable[[str], Any], default: Any, help: str, *aliases: str, metavar: str | None = None
    ) -> None:
        """A flag with a value. `kind` turns the text into the value or raises ValueError saying what is allowed."""
        assert name.startswith("--") and "_" not in name, name
        shown = help if default in (None, "") else f"{help} (default {default})"

        def convert(text: str) -> Any:
            try:
                return kind(text)
            except ValueError as error:
                self._problems.append(f"{name}={_on_one_line(text)}: {error}")
                return default

        action = self._argparse.add_argument(
            name,
            *aliases,
            type=convert,
            default=default,
            help=shown.replace("%", "%%"),
            metavar=metavar or _metavar(kind),
        )
        self._kinds[action.dest] = convert

    def switch(self, name: str, help: str, *aliases: str) -> None:
        """A flag without a value: False unless given."""
        self._argparse.add_argument(name, *aliases, action="store_true", help=help.replace("%", "%%"))

    def check(self, check: Check) -> None:
        """Add a rule over several flags; it returns a sentence when broken. Runs once every single flag is right."""
        self._checks.append(check)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `argv` (the process's own by default). Raises UserError listing every problem, one line each."""
        self._problems.clear()
        given = self._given(list(sys.argv[1:] if argv is None else argv))
        args = self._argparse.parse_args(["--help"] if any(action.dest == "help" for action, _ in given) else [])
        for action, text in given:
            setattr(args, action.dest, True if text is None else self._kinds[action.dest](text))
        if not self._problems:
            self._problems += [problem for check in self._checks if (problem := check(args))]
        if self._problems:
            raise UserError("\n".join(self._problems))
        return args

    def _given(self, argv: list[str]) -> list[tuple[argparse.Action, str | None]]:
        """The flags in `argv` and their texts (None for a switch); every other word becomes a problem.

        argparse only declares and shows flags: it reads `-p ""`, `--prompt=--` and `-p =x` in ways of its own.
        """
        given: list[tuple[argparse.Action, str | None]] = []
        words = deque(argv[1:] if argv[:1] == ["--"] else argv)  # torchrun passes its separator on
        while words:
            word = words.popleft()
            name, joined, value = self._split(word)
            action = self._actions.get(name)
            if action is None:
                self._problems.append(self._unknown(word, name))
            elif action.nargs == 0:
                if joined:
                    self._problems.append(f"{_on_one_line(word)}: {name} takes no value")
                else:
                    given.append((action, None))
            elif joined:
                given.append((action, value))
            elif words and words[0].partition("=")[0].replace("_", "-") not in self._actions:
                given.append((action, words.popleft()))
            else:
                self._problems.append(f"{name}: needs a value, as in {action.option_strings[0]}={action.metavar}")
        return given

    def _split(self, word: str) -> tuple[str, bool, str]:
        """(flag's name, whether a value is joined to it, that value): --a_b=1, -n=8 and -n8 all carry theirs."""
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            return name.replace("_", "-"), bool(equals), value
        action = self._actions.get(word[:2])
        meant_long = f"-{name}".replace("_", "-") in self._actions  # -depth=4 is a slip, not -d epth=4
        if word.startswith("-") and len(name) > 2 and action and action.nargs != 0 and not meant_long:
            return word[:2], True, word[2:]
        return name, bool(equals), value

    @property
    def _actions(self) -> dict[str, argparse.Action]:
        return self._argparse._option_string_actions

    def _unknown(self, word: str, name: str) -> str:
        if not name.startswith("-"):
            return f"{_on_one_line(word) or repr(word)}: not a flag; flags look like --name=value, see --help"
        names = [known for known in self._actions if known.startswith("--")]
        longer = [known for known in names if known.startswith(name)]
        close = longer if 0 < len(longer) <= 3 else difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"{_on_one_line(word)}: unknown flag; {hint}flags are never abbreviated, --help lists them"


def _program() -> str | None:
    """`python -m scripts.name` where that is how the process was started; None leaves it to argparse."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


def _metavar(kind: Callable[[str], Any]) -> str:
    name = "text" if kind is str else getattr(kind, "__name__", "value")
    return name if "|" in name else name.rpartition("_")[2].upper()  # a choice is shown as it must be typed


def _on_one_line(text: str) -> str:
    return "\\n".join(text.splitlines())


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
        allowed = f"a {'whole ' if whole else ''}number of at least {low:.15g}"
        allowed += f" and at most {high:.15g}" if high < float("inf") else ""
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
            raise ValueError(f"choose one of {', '.join(choice or repr(choice) for choice in choices)}")
        return text

    word.__name__ = "|".join(choice for choice in choices if choice)
    return word


def folder_name(text: str) -> str:
    """A name that can be one folder."""
    if text in (".", "..") or text.startswith(".") or "/" in text or "\\" in text:
        raise ValueError("must be a plain folder name, without slashes and leading dots")
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
        raise ValueError("must be auto, no, or a step number (-2: the newest)")
    return "newest" if step == -2 else step


# Flag groups that recipes share --------------------------------------------------------------------------------


def add_device_flags(parser: Parser) -> None:
    parser.flag("--device-type", one_of("", "cuda", "cpu", "mps", "xpu"), "", "device; empty: the best one here")
    parser.flag("--seed", non_negative_int, 42, "seed of every random choice")
    parser.switch("--offline", "never use the network")


def add_run_flags(parser: Parser) -> None:
    """Flags of every recipe that trains."""
    add_device_flags(parser)
    parser.flag("--run", str, "", "name shown by the loggers; empty: the model tag")
    parser.flag("--model-tag", folder_name, "", "checkpoint folder to write; empty: d<depth>", "-g")
    parser.flag("--resume", resume_point, "no", "auto, a step number, or no", "--resume-from-step", metavar="auto|STEP")
    parser.switch("--overwrite", "replace an earlier run of the same tag")
    parser.flag("--logger", one_of("console", "none"), "console", "who shows progress; metrics.jsonl is always written")
    parser.flag("--compile", one_of("auto", "on", "off"), "auto", "torch.compile; auto: on GPUs")


def add_model_choice_flags(parser: Parser, default: str) -> None:
    """Flags that pick a checkpoint to load."""
    parser.flag("--source", one_of("base", "mid", "sft", "rl"), default, "stage the model comes from", "-i")
    parser.flag("--model-tag", folder_name, "", "its folder; empty: the deepest, then the newest", "-g")
    parser.flag("--step", non_negative_int, None, "checkpoint step; else the newest", "-s", "--model-step")


DEVICE_BATCH_SIZE = 32  # rows per device where nothing says otherwise


def add_data_flags(parser: Parser) -> None:
    parser.flag("--data-dir", str, "", "parquet, jsonl or txt file, or a folder of them; empty: the downloaded shards")


def data_folder(args: argparse.Namespace) -> Path:
    """Where the pretraining text is."""
    folder = Path(args.data_dir) if args.data_dir else base_dir() / "base_data_climbmix"
    if not args.data_dir and not folder.exists():
        raise UserError(f"--data-dir: not given, and {folder} does not exist; give a file or folder of text")
    return folder


def add_plan_flags(parser: Parser, eval_every: int, save_every: int) -> None:
    """Batch, learning rates and cadences. What is not given follows from the depth."""
    parser.flag("--num-iterations", unless_minus_one(positive_int), None, "optimizer steps")
    parser.flag(
        "--device-batch-size", positive_int, None, f"rows per device and pass; else at most {DEVICE_BATCH_SIZE}"
    )
    parser.flag("--total-batch-size", unless_minus_one(positive_int), None, "tokens per step; else derived")
    parser.flag("--embedding-lr", positive_float, None, "token embeddings (value embeddings get half)")
    parser.flag("--unembedding-lr", positive_float, None, "head")
    parser.flag("--matrix-lr", positive_float, None, "matrices inside blocks (Muon)")
    parser.flag("--scalar-lr", positive_float, None, "residual scalars")
    parser.flag("--eval-every", cadence, eval_every, "steps between evaluations, -1 never")
    parser.flag("--eval-tokens", positive_int, 80 * 2**19, "validation tokens per evaluation")
    parser.flag("--save-every", cadence, save_every, "steps between checkpoints, -1 only the end")


def given_rates(args: argparse.Namespace) -> dict[str, float]:
    """The learning rates that were given, by the names of `scaling.BaseRates`."""
    rates = {
        "embedding": args.embedding_lr,
        "unembedding": args.unembedding_lr,
        "matrix": args.matrix_lr,
        "scalar": args.scalar_lr,
    }
    return {name: rate for name, rate in rates.items() if rate is not None}


def add_architecture_flags(parser: Parser) -> None:
    """Switches of `ModelConfig`; the defaults are the best known, the rest is for experiments."""
    parser.flag("--aspect-ratio", positive_int, 64, "width per layer")
    parser.flag("--head-dim", number_between(2, whole=True), 128, "width per attention head")
    parser.flag("--layer-pattern", str, "A", "mixer letters, tiled over the layers")
    parser.flag("--window-pattern", str, "SSSL", "S short or L full attention, tiled; the last layer is always L")
    parser.flag("--residual", str, "lambdas", "residual scheme")
    parser.flag("--mlp-activation", str, "relu2", "activation of the MLP")
    parser.flag("--softcap", non_negative_float, 15.0, "logit cap, 0 off")
    parser.switch("--doc-mask", "attention and positions stop at document borders")
    parser.switch("--no-qk-norm", "without the norm on queries and keys")
    parser.switch("--no-value-embeddings", "without value embeddings")
    parser.switch("--no-smear", "without mixing in the previous token")
    parser.switch("--no-backout", "without taking out the middle layer")
    parser.switch("--tied-head", "head and embedding share one table")


def architecture_switches(args: argparse.Namespace) -> dict[str, Any]:
    """The given switches as fields of `ModelConfig`."""
    same_name = ("layer_pattern", "window_pattern", "residual", "mlp_activation", "softcap", "doc_mask", "tied_head")
    off = ("qk_norm", "value_embeddings", "smear", "backout")
    return {name: getattr(args, name) for name in same_name} | {name: not getattr(args, f"no_{name}") for name in off}


def report(rows: dict[str, tuple[object, bool]]) -> None:
    """Print what a run will use: name, value, and whether it was given or derived."""
    for name, (value, is_given) in rows.items():
        print0(f"  {name:<18} {value}  ({'given' if is_given else 'derived'})")
