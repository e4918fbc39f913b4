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
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanochat import config
from nanochat.common import FlagError, UserError, base_dir, print0, printable
from nanochat.common import run as run  # how every recipe ends
from nanochat.kinds import (  # noqa: F401 - recipes find them here
    cadence,
    depth,
    flops,
    folder_name,
    fraction,
    head_dim,
    non_negative_float,
    non_negative_int,
    number_between,
    one_of,
    positive_float,
    positive_int,
    resume_point,
    seed,
    sequence_length,
    some_text,
    unless_minus_one,
    vocabulary_size,
)
from nanochat.loggers import LOGGERS, logger_names

Check = Callable[[argparse.Namespace], str | None]
SHOWN_CHARS = 100  # of a mistaken word


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
        """Add a rule over several flags: a sentence when broken. Not heard of flags that are wrong by themselves."""
        self._checks.append(check)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `argv` (the process's own by default). Raises UserError listing every problem, one line each."""
        self._problems.clear()
        given = self._given(list(sys.argv[1:] if argv is None else argv))
        args = self._argparse.parse_args(["--help"] if any(action.dest == "help" for action, _ in given) else [])
        for action, text in given:
            setattr(args, action.dest, True if text is None else self._kinds[action.dest](text))
        wrong = [problem.partition("=")[0].partition(":")[0] for problem in self._problems]
        told = [problem for check in self._checks if (problem := check(args))]
        self._problems += [problem for problem in told if not any(name in problem for name in wrong)]
        if self._problems:
            raise FlagError("\n".join(self._problems))
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
    return printable(text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}...")


# Flag groups that recipes share --------------------------------------------------------------------------------


def add_device_flags(parser: Parser) -> None:
    parser.flag("--device-type", one_of("", "cuda", "cpu", "mps", "xpu"), "", "device; empty: the best one here")
    parser.flag("--seed", seed, 42, "seed of every random choice")
    parser.switch("--offline", "never use the network")


def add_engine_flags(parser: Parser) -> None:
    """How answers are computed."""
    told = "the same answer to the bit whatever else runs beside it; slower where several run"
    parser.switch("--deterministic", told)
    parser.switch("--int8", "write with weights of one byte: faster on a CPU, and slightly off")


def add_run_flags(parser: Parser) -> None:
    """Flags of every recipe that trains."""
    add_device_flags(parser)
    parser.flag("--run", folder_name, "", "name of the run: the model tag where none is given; dummy: no name")
    parser.flag("--model-tag", folder_name, "", "checkpoint folder to write; empty: --run, else derived", "-g")
    resume = "auto: go on from the newest checkpoint if there is one; STEP: from that one; -2: from the newest"
    parser.flag("--resume", resume_point, "no", resume, "--resume-from-step", metavar="auto|STEP|no")
    parser.switch("--overwrite", "replace an earlier run of the same tag")
    parser.check(_resume_or_overwrite)
    parser.flag("--keep-last", positive_int, 2, "checkpoints kept: the last N; and the best one in any case")
    parser.flag("--keep-every", cadence, -1, "checkpoints kept in addition: those of every N-th step; -1: none")
    grace = "seconds that SIGTERM or Ctrl-C leave for the running step and a checkpoint"
    parser.flag("--grace-period", positive_float, 25.0, grace)
    reduce = "what gradients travel between ranks in; empty: their own dtype"
    parser.flag("--reduce-dtype", one_of("", "bfloat16"), "", reduce)
    shows = "who shows progress, by name with commas between; metrics.jsonl is always written"
    parser.flag("--logger", logger_names, "console", shows, metavar=f"none|{'|'.join(LOGGERS)}")
    parser.flag("--compile", one_of("auto", "on", "off"), "auto", "torch.compile; auto: on GPUs")


def _resume_or_overwrite(args: argparse.Namespace) -> str | None:
    both = args.overwrite and args.resume != "no"
    return "--resume, --overwrite: give one of them; one goes on with a run, the other replaces it" if both else None


def run_tag(args: argparse.Namespace, default: str) -> str:
    """The folder of the run that the flags ask for. --run=dummy is the ancestor's way to give no name."""
    return str(args.model_tag or ("" if args.run == "dummy" else args.run) or default)


def at_most_one(args: argparse.Namespace, names: Sequence[str]) -> str | None:
    """The rule that no two of these flags are given, None being their default."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    return f"{', '.join(given)}: give one of them" if len(given) > 1 else None


def add_precision_flags(parser: Parser) -> None:
    """Flags of `kernels.fp8`. The compute dtype is the environment's: $NANOCHAT_DTYPE."""
    parser.switch("--fp8", "matrix products of training in FP8, on GPUs that have it")
    parser.flag("--fp8-recipe", one_of("tensorwise", "rowwise"), "tensorwise", "what shares a scale in FP8")
    parser.switch("--fp8-emulate", "with --fp8: the same numbers by ordinary arithmetic, on any device, slowly")
    alone = "--fp8-recipe, --fp8-emulate: only with --fp8"
    parser.check(lambda a: alone if not a.fp8 and (a.fp8_emulate or a.fp8_recipe != "tensorwise") else None)


def add_model_choice_flags(parser: Parser, default: str) -> None:
    """Flags that pick a checkpoint to load."""
    parser.flag("--source", one_of("base", "mid", "sft", "rl"), default, "stage the model comes from", "-i")
    parser.flag("--model-tag", folder_name, "", "its folder; empty: the deepest, then the newest", "-g")
    parser.flag("--step", non_negative_int, None, "checkpoint step; else the newest", "-s", "--model-step")


DEVICE_BATCH_SIZE = 32  # rows per device where nothing says otherwise
NUM_GENERATED = 60_000  # conversations that the word `abilities` stands for


def add_data_flags(parser: Parser) -> None:
    where = "parquet, jsonl or txt file, a folder of them, or stdlib: the running Python's own library"
    parser.flag("--data-dir", str, "", f"{where}; empty: <base>/base_data_climbmix if it is there, else stdlib")


def data_folder(args: argparse.Namespace) -> Path:
    """Where the pretraining text is: a path, or the word `stdlib`."""
    shards = base_dir() / "base_data_climbmix"
    return Path(args.data_dir or (shards if os.path.exists(shards) else "stdlib"))


def problem_of(build: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """What the UserError says that a call ends with; for `Parser.check`."""
    try:
        build(*args, **kwargs)
    except UserError as error:
        return str(error)
    return None


def add_plan_flags(parser: Parser, eval_every: int, save_every: int) -> None:
    """Batch, learning rates and cadences. What is not given follows from the depth."""
    parser.flag("--num-iterations", unless_minus_one(positive_int), None, "optimizer steps")
    parser.flag(
        "--device-batch-size",
        positive_int,
        None,
        f"rows per device and pass; else what fits, on a CPU at most {DEVICE_BATCH_SIZE}",
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
    """Switches of `ModelConfig`: what is not given is as there, or as the laws have it; the rest is for experiments."""
    known = config.ModelConfig()
    parser.flag("--layer-pattern", config.layer_pattern, known.layer_pattern, "mixer letters, tiled over the layers")
    windows = "S short or L full attention, tiled; the last layer is always L"
    parser.flag("--window-pattern", config.window_pattern, known.window_pattern, windows)
    parser.flag("--residual", one_of(*config.RESIDUALS), known.residual, "residual scheme")
    parser.flag("--mlp-activation", one_of(*config.ACTIVATIONS), known.mlp_activation, "activation of the MLP")
    parser.flag("--softcap", non_negative_float, known.softcap, "logit cap, 0 off")
    parser.switch("--doc-mask", "attention and positions stop at document borders")
    parser.switch("--no-qk-norm", "without the norm on queries and keys")
    parser.switch("--no-key-offset", "without offset keys, which --laws=nanochat gives every model")
    parser.switch("--no-value-embeddings", "without value embeddings")
    parser.switch("--no-smear", "without mixing in the previous token")
    parser.switch("--no-backout", "without taking out the middle layer")
    parser.switch("--tied-head", "head and embedding share one table")


def architecture_switches(args: argparse.Namespace) -> dict[str, Any]:
    """The given switches as fields of `ModelConfig`."""
    same_name = ("layer_pattern", "window_pattern", "residual", "mlp_activation", "softcap", "doc_mask", "tied_head")
    off = ("qk_norm", "value_embeddings", "smear", "backout", "key_offset")
    switches = {name: getattr(args, name) for name in same_name}
    switches |= {name: not getattr(args, f"no_{name}") for name in off}
    for name in ("key_offset", "backout"):
        if switches[name]:
            del switches[name]  # as the laws have it
    return switches


def report(rows: dict[str, tuple[object, bool]]) -> None:
    """Print what a run will use: name, value, and whether it was given or derived."""
    for name, (value, is_given) in rows.items():
        print0(f"  {name:<18} {value}  ({'given' if is_given else 'derived'})")
