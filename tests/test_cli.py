"""The command line: what is accepted, how values are read, and what a wrong line hears."""

import pytest

from nanochat.cli import (
    Parser,
    add_architecture_flags,
    add_data_flags,
    add_model_choice_flags,
    add_plan_flags,
    add_run_flags,
    architecture_switches,
    at_most_one,
    cadence,
    depth,
    flops,
    folder_name,
    fraction,
    head_dim,
    non_negative_float,
    number_between,
    one_of,
    positive_float,
    positive_int,
    resume_point,
    run_tag,
    seed,
    sequence_length,
    some_text,
    vocabulary_size,
)
from nanochat.common import UserError
from nanochat.config import ModelConfig, layer_pattern, window_pattern


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


def test_rules_over_several_flags_are_told_together_with_wrong_flags_which_count_as_not_given():
    parser = make_parser()
    parser.check(lambda args: f"--depth={args.depth}: odd" if args.depth % 2 else None)
    with pytest.raises(UserError, match="--depth=3: odd"):
        parser.parse(["--depth=3"])
    with pytest.raises(UserError) as caught:
        parser.parse(["--depth=3", "--dropout=x"])
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["--dropout=x", "--depth=3"]
    with pytest.raises(UserError) as caught:
        parser.parse(["--depth=x"])
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
        (seed, {"0": 0, "9223372036854775807": 2**63 - 1}, ["-1", "9223372036854775808", "9" * 5000]),
        (depth, {"1": 1, "1000": 1000}, ["0", "1001"]),
        (sequence_length, {"2": 2, "16777216": 2**24}, ["1", "16777217"]),
        (vocabulary_size, {"265": 265, "1048576": 2**20}, ["0", "1048577"]),
        (flops, {"1e18": 1e18}, ["0", "1e31", "inf"]),
        (positive_int, {"1000000000000": 10**12}, ["1000000000001"]),
        (positive_float, {"1e-9": 1e-9, "1e12": 1e12}, ["1e-10", "1e13", "5e-324"]),
        (head_dim, {"2": 2, "128": 128}, ["0", "15", "65538", "x"]),
        (some_text, {"a": "a", " b ": " b "}, ["", "  \n"]),
        (layer_pattern, {"A": "A", "AAM": "AAM"}, ["", "A A", "A\n", "A1"]),
        (window_pattern, {"L": "L", "SSSL": "SSSL"}, ["", "Q", "sl", "SL\n"]),
        (
            folder_name,
            {"": "", "d12": "d12", "über": "über"},
            [".", "..", ".a", "a/b", "a\\b", "a\nb", "a\033", "ü" * 101],
        ),
    ],
)
def test_kinds_of_value_take_what_is_in_range_and_refuse_the_rest(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(ValueError, match=r"must (not )?be|choose one of"):
            kind(text)


def test_a_long_or_unprintable_mistake_is_told_in_short_and_on_one_line():
    told = problems(f"--depth={'9' * 5000}", "--depth=\033[31m", "--" + "x" * 5000)
    assert len(told) == 3 and all(len(problem) < 250 and problem.isprintable() for problem in told)


def test_going_on_with_a_run_and_replacing_it_exclude_each_other():
    parser = Parser("groups")
    add_run_flags(parser)
    assert parser.parse(["--overwrite", "--resume=no"]).overwrite
    for resume in ("auto", "7", "-2"):
        with pytest.raises(UserError, match=r"^--resume, --overwrite: give one of them"):
            parser.parse([f"--resume={resume}", "--overwrite"])


@pytest.mark.parametrize(
    ("argv", "tag"),
    [
        ([], "d4"),
        (["--run=dummy"], "d4"),
        (["--run=mine"], "mine"),
        (["--run=mine", "--model-tag=other"], "other"),
        (["--run=dummy", "--model-tag=dummy"], "dummy"),
    ],
)
def test_a_run_is_kept_under_its_tag_else_its_name_else_the_default(argv, tag):
    parser = Parser("groups")
    add_run_flags(parser)
    assert run_tag(parser.parse(argv), "d4") == tag


def test_of_flags_that_mean_the_same_thing_one_may_be_given():
    parser = make_parser()
    parser.flag("--first-way", positive_int, None, "a")
    parser.flag("--second-way", positive_int, None, "b")
    parser.check(lambda args: at_most_one(args, ("first_way", "second_way")))
    assert parser.parse(["--first-way=1"]).second_way is None
    with pytest.raises(UserError, match=r"^--first-way, --second-way: give one of them$"):
        parser.parse(["--first-way=1", "--second-way=2"])


def test_the_switches_without_flags_are_the_model_configuration_s_own():
    parser = Parser("groups")
    add_architecture_flags(parser)
    assert ModelConfig(**architecture_switches(parser.parse([]))) == ModelConfig()


def test_every_mistake_in_a_model_configuration_is_told_at_once_by_its_flag():
    with pytest.raises(UserError) as caught:
        ModelConfig(sequence_len=0, vocab_size=-1, n_layer=0, layer_pattern="", window_pattern="Q", softcap=-1)
    told = str(caught.value).splitlines()
    flags = [
        "--max-seq-len=0",
        "--vocab-size=-1",
        "--depth=0",
        "--layer-pattern=",
        "--window-pattern=Q",
        "--softcap=-1",
    ]
    assert [line.split(":")[0] for line in told] == flags
    with pytest.raises(UserError, match=r"^--head-dim=15: must be even"):
        ModelConfig(n_head=2, n_kv_head=2, n_embd=30)
    with pytest.raises(UserError, match=r"^--head-dim=14: must be a multiple of 4"):
        ModelConfig(n_head=2, n_kv_head=2, n_embd=28, key_offset=True)
    with pytest.raises(UserError, match=r"^n_embd=30: .*\nn_head=4: must be a multiple of n_kv_head=3$"):
        ModelConfig(n_head=4, n_kv_head=3, n_embd=30)


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
