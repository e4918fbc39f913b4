"""The command line: what is accepted, how values are read, and what a wrong line hears."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.cli import (
    Parser,
    add_architecture_flags,
    add_data_flags,
    add_model_choice_flags,
    add_plan_flags,
    add_run_flags,
    cadence,
    fraction,
    non_negative_float,
    number_between,
    one_of,
    positive_float,
    positive_int,
    resume_point,
)
from nanochat.common import UserError

ROOT = Path(__file__).resolve().parents[1]

RECIPE = '''
"""A recipe for tests, 100% small.

python recipe.py --depth=4
"""
import argparse
from nanochat.cli import Parser, one_of, positive_int, run
from nanochat.common import UserError

def parse_args(argv):
    parser = Parser(__doc__)
    parser.flag("--depth", positive_int, 4, "layers, 50% of the dial")
    parser.flag("--device-type", one_of("", "cpu", "cuda"), "", "where")
    parser.flag("--prompt", str, "", "text", "-p")
    parser.switch("--dry-run", "do 0% of the work")
    parser.check(lambda args: "--depth=13: unlucky" if args.depth == 13 else None)
    return parser.parse(argv)

def main(argv=None):
    args = parse_args(argv)
    if args.prompt == "disk":
        raise UserError("disk: full\\nmemory: full")
    if args.prompt == "stop":
        raise KeyboardInterrupt
    print(f"depth={args.depth} device={args.device_type!r} prompt={args.prompt!r} dry={args.dry_run}")

if __name__ == "__main__":
    run(main)
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory):
    """Runs the recipe above as a process of its own."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE, encoding="utf-8")

    def call(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "]
        command[-1] += "run_name='__main__')"
        return subprocess.run([*command, str(path), *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)

    return call


def make_parser() -> Parser:
    parser = Parser("100% of the tests")
    parser.flag("--depth", positive_int, 4, "layers", "-d")
    parser.flag("--device-batch-size", positive_int, 32, "rows")
    parser.flag("--num-iterations", number_between(-1, whole=True), -1, "steps", "-n")
    parser.flag("--dropout", fraction, 0.0, "share")
    parser.flag("--prompt", str, "", "text", "-p")
    parser.flag("--resume", resume_point, "no", "from where", "--resume-from-step")
    parser.switch("--dry-run", "nothing is written", "-y")
    return parser


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        make_parser().parse(argv)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "argv",
    [
        ["--device-batch-size=8"],
        ["--device_batch_size=8"],
        ["--device-batch-size", "8"],
        ["--device_batch_size", "8"],
        ["--device-batch_size=8"],
        ["--device-batch-size=1_0", "--device_batch_size=8"],
    ],
)
def test_both_spellings_of_a_flag_are_one_flag(argv):
    assert make_parser().parse(argv).device_batch_size == 8


def test_defaults_stand_where_nothing_is_given():
    args = make_parser().parse([])
    assert (args.depth, args.num_iterations, args.prompt, args.resume, args.dry_run) == (4, -1, "", "no", False)


def test_an_alias_fills_the_flag_it_belongs_to():
    assert make_parser().parse(["--resume_from_step=7"]).resume == 7
    assert make_parser().parse(["-y"]).dry_run is True


@pytest.mark.parametrize("flag", ["--prompt", "-p"])
@pytest.mark.parametrize(
    "text",
    [
        "hi",
        "two words",
        " padded ",
        "",
        "-5 degrees",
        "-",
        "--x",
        "--x=1",
        "-nothing known",
        "=x",
        "a=b",
        "under_score",
        "é\nnext line",
        "50%",
        "-p is a flag",
    ],
)
def test_any_text_can_be_a_value(flag, text):
    assert make_parser().parse([flag, text]).prompt == text
    assert make_parser().parse([f"{flag}={text}"]).prompt == text


@pytest.mark.parametrize("text", ["--depth=2", "--depth", "-y", "--"])
def test_what_looks_like_a_flag_is_a_value_when_joined(text):
    assert make_parser().parse([f"--prompt={text}"]).prompt == text
    assert make_parser().parse([f"-p={text}"]).prompt == text


@pytest.mark.parametrize("argv", [["-n8"], ["-n=8"], ["-n", "8"]])
def test_short_flags_take_joined_and_separate_values(argv):
    assert make_parser().parse(argv).num_iterations == 8


@pytest.mark.parametrize("argv", [["--num-iterations", "-1"], ["--num-iterations=-1"], ["-n", "-1"], ["-n-1"]])
def test_negative_numbers_are_values(argv):
    assert make_parser().parse(["--depth=2", *argv]).num_iterations == -1


def test_the_separator_that_torchrun_passes_on_is_dropped():
    assert make_parser().parse(["--", "--depth=6"]).depth == 6
    assert make_parser().parse(["--"]).depth == 4


def test_the_last_of_two_values_wins():
    assert make_parser().parse(["--depth=2", "-d", "6"]).depth == 6


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--dep=6", "did you mean --depth?"),
        ("--device=6", "did you mean --device-batch-size?"),
        ("--depht=6", "did you mean --depth?"),
        ("--dry", "did you mean --dry-run?"),
        ("-depth=6", "did you mean --depth?"),
        ("-dry_run", "did you mean --dry-run?"),
        ("-yy", "unknown flag"),
        ("--zzz", "unknown flag; flags are never"),
        ("-", "unknown flag"),
    ],
)
def test_abbreviations_and_slips_are_refused_with_a_hint(word, hint):
    (problem,) = problems(word)
    assert problem.startswith(f"{word}: ") and hint in problem


def test_a_second_separator_is_refused_without_listing_every_flag():
    (problem,) = problems("--depth=2", "--")
    assert "unknown flag; flags are never" in problem


@pytest.mark.parametrize("word", ["depth=6", "6", ""])
def test_words_that_are_no_flags_are_refused(word):
    (problem,) = problems(word)
    assert problem == f"{word or repr(word)}: not a flag; flags look like --name=value, see --help"


@pytest.mark.parametrize("argv", [["--depth"], ["-d"], ["--depth", "--dry-run"], ["-d", "--device_batch_size=3"]])
def test_a_missing_value_is_named_and_no_flag_is_swallowed_as_a_value(argv):
    (problem,) = problems(*argv)
    assert problem == f"{argv[0]}: needs a value, as in --depth=N"


def test_a_switch_takes_no_value():
    assert problems("--dry-run=yes") == ["--dry-run=yes: --dry-run takes no value"]


def test_every_problem_is_told_at_once_on_one_line_each():
    told = problems("--depth=0", "--bogus", "7", "--dropout=2", "--dry-run=1", "--resume=soon\nor later", "-n")
    assert len(told) == 7
    for named in ("--depth=0: must be a whole number of at least 1", "--bogus: unknown", "7: not a flag", "-n: needs"):
        assert any(problem.startswith(named) for problem in told), named


def test_rules_over_several_flags_run_only_when_each_flag_is_right():
    parser = make_parser()
    parser.check(lambda args: f"--depth={args.depth}: odd" if args.depth % 2 else None)
    with pytest.raises(UserError, match="--depth=3: odd"):
        parser.parse(["--depth=3"])
    with pytest.raises(UserError) as caught:
        parser.parse(["--depth=3", "--dropout=x"])
    assert "odd" not in str(caught.value)
    assert parser.parse(["--depth=2"]).depth == 2  # nothing is left of the earlier lines


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "1_000": 1000}, ["0", "-1", "1.5", "1e3", "x", "", "inf", "nan"]),
        (non_negative_float, {"0": 0.0, "1e-3": 1e-3}, ["-0.1", "nan", "inf", "x"]),
        (positive_float, {"0.5": 0.5}, ["0", "-1", "nan", "inf", ""]),
        (fraction, {"0": 0, "1": 1, ".25": 0.25}, ["1.01", "-1", "nan"]),
        (cadence, {"1": 1, "-1": -1}, ["0", "-2", "1.5", ""]),
        (resume_point, {"auto": "auto", "no": "no", "0": 0, "12": 12, "-1": "no", "-2": "newest"}, ["-3", "x", ""]),
        (one_of("", "cpu"), {"": "", "cpu": "cpu"}, ["CPU", "c", "gpu"]),
    ],
)
def test_kinds_of_value_take_what_is_in_range_and_refuse_the_rest(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(ValueError, match=r"must be|choose one of"):
            kind(text)


def test_limits_are_shown_in_full():
    with pytest.raises(ValueError, match=r"at most 1234567$"):
        number_between(1, 1_234_567, whole=True)("0")


def test_all_flag_groups_of_training_fit_together_and_accept_no_flags_at_all():
    parser = Parser("groups")
    add_run_flags(parser)
    add_data_flags(parser)
    add_plan_flags(parser, eval_every=250, save_every=-1)
    add_architecture_flags(parser)
    args = parser.parse([])
    assert (args.eval_every, args.save_every, args.overwrite) == (250, -1, False)
    assert parser.parse(["--model-tag=", "--seed=42", "--softcap", "15", "--num_iterations=-1"]) == args


def test_a_checkpoint_is_picked_by_long_and_short_flags_alike():
    parser = Parser("groups")
    add_model_choice_flags(parser, "sft")
    assert parser.parse(["-i", "base", "-g", "d4", "-s", "7"]) == parser.parse(
        ["--source=base", "--model_tag=d4", "--model-step=7"]
    )
    assert parser.parse([]).source == "sft"


# As a process -----------------------------------------------------------------------------------------------------


def test_a_good_line_runs_and_leaves_with_0(recipe):
    done = recipe("--", "--device_type", "cpu", "-p", "two words", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "depth=4 device='cpu' prompt='two words' dry=True\n"


def test_a_bad_line_leaves_with_2_and_one_line_for_each_problem(recipe):
    done = recipe("--depth=0", "--depht=3", "--device-type=gpu")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(lines) == 3
    assert all(line.startswith("error: --") for line in lines)
    assert "error: --device-type=gpu: choose one of '', cpu, cuda" in lines


def test_a_broken_rule_or_a_user_error_leaves_with_2_and_no_traceback(recipe):
    done = recipe("--depth=13")
    assert (done.returncode, done.stderr) == (2, "error: --depth=13: unlucky\n")
    done = recipe("-p", "disk")
    assert (done.returncode, done.stderr) == (2, "error: disk: full\nerror: memory: full\n")


def test_an_interrupt_leaves_with_130_and_no_traceback(recipe):
    done = recipe("-p", "stop")
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


def test_help_shows_percent_signs_choices_as_typed_and_the_docstring(recipe):
    done = recipe("--depth=0", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("100% small", "50% of the dial (default 4)", "0% of the work", "cpu|cuda", "--prompt TEXT"):
        assert shown in done.stdout, shown
