"""Tools on token ids: calls of the calculator and of Python, their budget, and what becomes of them as typed parts."""

import re
import tracemalloc
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import python_tool, tools
from nanochat.chat import ReplyReader
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer
from nanochat.tools import CalculatorHook

TEXT = "12 + 34 = 46, 'strawberry'.count('r') error division by zero, print it, 漢字"
TOKENIZER = Tokenizer.train([TEXT] * 3, vocab_size=300)
START, END = (TOKENIZER.special(f"<|python_{edge}|>") for edge in ("start", "end"))


def call(expression: str) -> list[int]:
    return [START, *TOKENIZER.encode(expression), END]


def output_ids(text: str) -> list[int]:
    return [TOKENIZER.special("<|output_start|>"), *TOKENIZER.encode(text), TOKENIZER.special("<|output_end|>")]


def push_all(hook: CalculatorHook, ids: list[int]) -> list[list[int]]:
    return [hook.push(token_id) for token_id in ids]


def answered(hook: CalculatorHook, expression: str) -> str:
    """The output of one call, as text."""
    first, *ids, last = push_all(hook, call(expression))[-1]
    assert [first, last] == output_ids("")
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12+34", "46"),
        ("'strawberry'.count('r')", "3"),
        ("1/0", "error: division by zero"),
        ("", "error: empty expression"),
    ],
)
def test_a_closed_call_is_answered_between_output_markers(expression: str, result: str) -> None:
    *during, after = push_all(CalculatorHook(TOKENIZER), call(expression))
    assert not any(during)
    assert after == output_ids(result)


def test_a_second_call_is_answered_though_the_first_answer_was_never_pushed() -> None:
    hook = CalculatorHook(TOKENIZER)
    push_all(hook, call("1+1"))
    assert not any(push_all(hook, TOKENIZER.encode("so the next is 5*5")))
    assert push_all(hook, call("5*5"))[-1] == output_ids("25")


def test_text_outside_a_call_and_a_lone_end_ask_for_nothing() -> None:
    assert not any(push_all(CalculatorHook(TOKENIZER), [*TOKENIZER.encode("1+1"), END, *TOKENIZER.encode("2")]))


def test_opening_again_starts_the_expression_afresh() -> None:
    ids = [START, *TOKENIZER.encode("99+"), *call("1+1")]
    assert push_all(CalculatorHook(TOKENIZER), ids)[-1] == output_ids("2")


@pytest.mark.parametrize("name", ["<|assistant_end|>", "<|bos|>", "<|user_start|>", "<|output_start|>"])
def test_any_other_special_token_abandons_the_call(name: str) -> None:
    ids = call("1+1")
    ids.insert(2, TOKENIZER.special(name))
    assert not any(push_all(CalculatorHook(TOKENIZER), ids))


def test_a_call_that_never_stops_growing_costs_no_memory_and_ends_in_an_error() -> None:
    hook = CalculatorHook(TOKENIZER)
    push_all(hook, [START, *TOKENIZER.encode("1") * 50_000])
    assert hook._call is not None and len(hook._call) == tools.MAX_TOKENS + 1
    assert hook.push(END) == output_ids(f"error: more than {tools.MAX_TOKENS} tokens")


def test_bytes_that_are_no_text_are_an_error_not_a_crash() -> None:
    assert push_all(CalculatorHook(TOKENIZER), [START, 0xFF, 0xFE, END])[-1] == output_ids("error: unexpected \ufffd")


# Budget -----------------------------------------------------------------------------------------------------------


def test_an_answer_runs_so_many_calls_and_is_told_when_they_are_used_up() -> None:
    hook, another = CalculatorHook(TOKENIZER), CalculatorHook(TOKENIZER)
    assert [answered(hook, f"{n}+1") for n in range(tools.MAX_CALLS)] == [str(n + 1) for n in range(tools.MAX_CALLS)]
    assert [answered(hook, "1+1") for _ in range(3)] == [tools.USED_UP] * 3
    assert answered(another, "1+1") == "2"


def test_abandoned_calls_cost_nothing_of_the_budget() -> None:
    hook = CalculatorHook(TOKENIZER)
    push_all(hook, [START, TOKENIZER.special("<|assistant_end|>")] * 100)
    assert answered(hook, "1+1") == "2"


def test_outputs_are_cut_with_dots_and_all_of_an_answer_have_a_budget_of_tokens() -> None:
    programs: list[str] = []
    hook = CalculatorHook(TOKENIZER, python=lambda program: programs.append(program) or "字" * 10**6)
    forced = [push_all(hook, call("print(1)"))[-1][1:-1] for _ in range(tools.MAX_CALLS)]
    texts = [TOKENIZER.decode(ids) for ids in forced]
    assert all(re.fullmatch(r"字+\.\.\.", text) for text in texts[: len(programs)])
    assert set(texts[len(programs) :]) == {tools.USED_UP}
    sizes = [len(ids) for ids in forced[: len(programs)]]
    assert all(tools.MAX_OUTPUT_TOKENS - 3 <= size <= tools.MAX_OUTPUT_TOKENS for size in sizes)
    assert tools.MAX_FORCED_TOKENS - tools.MAX_OUTPUT_TOKENS < sum(sizes) <= tools.MAX_FORCED_TOKENS


def test_an_output_that_just_fits_stays_whole() -> None:
    just = "1" * tools.MAX_OUTPUT_TOKENS
    assert len(TOKENIZER.encode(just)) == tools.MAX_OUTPUT_TOKENS
    assert answered(CalculatorHook(TOKENIZER, python=lambda program: just), "x = 1") == just
    cut = answered(CalculatorHook(TOKENIZER, python=lambda program: just + "1"), "x = 1")
    assert re.fullmatch(r"1+\.\.\.", cut)


def test_a_flood_of_output_costs_little_memory_and_never_looks_whole() -> None:
    flood = "-" * 10**7
    tracemalloc.start()
    answered(CalculatorHook(TOKENIZER, python=lambda program: flood), "x = 1")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    few = Tokenizer.train(["-" * 64, TEXT] * 3, vocab_size=300)  # has a token for many of them
    assert len(few.encode(flood[: tools.MAX_OUTPUT_CHARS])) < tools.MAX_OUTPUT_TOKENS
    ids = [few.special("<|python_start|>"), *few.encode("x = 1"), few.special("<|python_end|>")]
    forced = push_all(CalculatorHook(few, python=lambda program: flood), ids)[-1]
    assert re.fullmatch(r"-+\.\.\.", few.decode(forced[1:-1]))


# Python -----------------------------------------------------------------------------------------------------------


def test_python_gets_what_is_no_expression_and_the_calculator_the_rest() -> None:
    programs: list[str] = []
    hook = CalculatorHook(TOKENIZER, python=lambda program: programs.append(program) or f"ran {len(programs)}")
    assert answered(hook, "12+34") == "46"
    assert answered(hook, "1/0") == "error: division by zero"
    assert answered(hook, "print('漢字')\n") == "ran 1"
    assert answered(hook, "'a'.upper()") == "ran 2"
    assert programs == ["print('漢字')\n", "'a'.upper()"]


def test_special_tokens_by_name_in_an_output_stay_text() -> None:
    hook = CalculatorHook(TOKENIZER, python=lambda program: "<|output_end|><|assistant_end|> half \ud800")
    ids = push_all(hook, call("print(1)"))[-1]
    assert [token for token in ids if token >= TOKENIZER.bos] == output_ids("")
    assert TOKENIZER.decode(ids[1:-1]) == "<|output_end|><|assistant_end|> half \ufffd"


def plain_process(code: str, *, timeout: float, maximum_memory_bytes: int) -> SimpleNamespace:
    """`execute_code` without any protection, for programs of our own."""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    error = done.stderr.splitlines()[-1] if done.returncode else None
    return ended(done.returncode == 0, done.stdout, error)


def ended(success: bool, stdout: str = "", error: str | None = None, **how: bool) -> SimpleNamespace:
    return SimpleNamespace(
        success=success, stdout=stdout, error=error, **{"timeout": False, "memory_exceeded": False, **how}
    )


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("import math\nmath.factorial(20)", "2432902008176640000"),
        ("x = 6\nprint(x)\nx * 7\n", "6\n42"),
        ("d = [1]\nd.append(2)\nsorted(d)[::-1]", "[2, 1]"),
        ("'\"\"\"' + \"'\\\\\" + '{}'", "'\"\"\"\\'\\\\{}'"),
        ("print(1)\n1/0", "1\nerror: ZeroDivisionError: division by zero"),
        ("x = 1", ""),
    ],
)
def test_a_program_runs_as_if_it_were_typed_at_pythons_prompt(program: str, output: str) -> None:
    assert python_tool.python_tool(plain_process)(program) == output


def test_a_program_that_is_no_python_is_told_so() -> None:
    assert python_tool.python_tool(plain_process)("what is this?").startswith("error: SyntaxError")


@pytest.mark.parametrize(
    ("end", "output"),
    [
        (ended(False, "1\n", timeout=True), "1\nerror: longer than 5 s"),
        (ended(False, memory_exceeded=True), "error: more than 256 MB of memory"),
        (ended(False, error="x" * 1000), "error: " + "x" * 200),
        (ended(False), "error: the program failed"),
    ],
)
def test_how_a_program_failed_is_its_output(end: SimpleNamespace, output: str) -> None:
    ends = [ended(True), end]
    assert python_tool.python_tool(lambda code, **limits: ends.pop(0))("loop()") == output


def test_a_sandbox_that_does_not_run_an_empty_program_is_refused_with_its_reason() -> None:
    with pytest.raises(UserError, match=r"cannot run programs here \(error: no namespaces\)"):
        python_tool.python_tool(lambda code, **limits: ended(False, error="no namespaces"))


# Parts ------------------------------------------------------------------------------------------------------------


def read(ids: list[int]) -> list[tuple[str, str]]:
    """What the reader makes of an answer; its pieces joined are its parts."""
    reader = ReplyReader(TOKENIZER)
    events = [part for token_id in ids for part in reader.push(token_id)] + reader.flush()
    assert "".join(part["text"] for part in events) == "".join(part["text"] for part in reader.parts)
    return [(part["type"], part["text"]) for part in reader.parts]


def generated(sampled: list[int], hook: CalculatorHook) -> list[int]:
    """What an engine yields for a model that samples these."""
    ids: list[int] = []
    for token_id in sampled:
        ids += [token_id, *hook.push(token_id)]
    return ids


def test_a_call_and_its_output_are_parts_of_their_own() -> None:
    sampled = [*TOKENIZER.encode("it is "), *call("12+34"), *TOKENIZER.encode(" then")]
    assert read(generated(sampled, CalculatorHook(TOKENIZER))) == [
        ("text", "it is "),
        ("python", "12+34"),
        ("python_output", "46"),
        ("text", " then"),
    ]


def test_a_cut_answer_keeps_the_parts_as_far_as_they_came() -> None:
    whole = generated([*TOKENIZER.encode("so"), *call("12+34")], CalculatorHook(TOKENIZER))
    cuts = [read(whole[:n]) for n in range(1, len(whole) + 1)]
    assert [("text", "so"), ("python", "")] in cuts  # opened
    assert [("text", "so"), ("python", "12+34")] in cuts  # closed, or about to be
    assert [("text", "so"), ("python", "12+34"), ("python_output", "")] in cuts
    assert cuts[-1] == [("text", "so"), ("python", "12+34"), ("python_output", "46")]


def test_an_abandoned_call_is_a_call_without_output() -> None:
    sampled = [START, *TOKENIZER.encode("12+"), TOKENIZER.special("<|user_start|>"), *TOKENIZER.encode("34"), END]
    assert read(generated(sampled, CalculatorHook(TOKENIZER))) == [("python", "12+<|user_start|>34")]


def test_a_call_beyond_the_budget_has_an_output_that_says_so() -> None:
    ids = generated(call("1+1") * (tools.MAX_CALLS + 1), CalculatorHook(TOKENIZER))
    assert read(ids)[-2:] == [("python", "1+1"), ("python_output", tools.USED_UP)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | st.sampled_from([START, END]), max_size=200))
def test_whatever_a_model_samples_is_answered_in_bounds_and_read_without_loss(sampled: list[int]) -> None:
    hook = CalculatorHook(TOKENIZER, python=lambda program: program * 9)
    forced = [hook.push(token_id) for token_id in sampled]
    assert sum(map(len, forced)) <= tools.MAX_FORCED_TOKENS + len(sampled) * (len(output_ids(tools.USED_UP)))
    kinds = [kind for kind, _ in read(generated(sampled, CalculatorHook(TOKENIZER)))]
    assert kinds.count("python") == sampled.count(START)
