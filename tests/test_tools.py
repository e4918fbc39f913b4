"""The calculator: its arithmetic, its spelling of numbers, its bounds, and the hook that answers calls by token ids."""

import gzip
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from nanochat import calculator, tools
from nanochat.calculator import calculate
from nanochat.tokenizer import Tokenizer
from nanochat.tools import CalculatorHook


@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("1+2*3", "7"),
        ("(1+2)*3", "9"),
        ("10-4-3", "3"),
        ("64/4/2", "8"),
        ("2*-3", "-6"),
        ("--5", "5"),
        ("-(2+3)", "-5"),
        ("+7", "7"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        (" 12 \n * 3 ", "36"),
        (".5*100", "50"),
        ("5.*2", "10"),
        ("007", "7"),
        ("3×4÷2−1", "5"),
    ],
)
def test_arithmetic_follows_the_usual_precedence(expression, output):
    assert calculate(expression) == output


@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("60/6", "10"),
        ("0.2*3", "0.6"),
        ("0.1+0.2", "0.3"),
        ("2.50", "2.5"),
        ("1/8", "0.125"),
        ("-1/4", "-0.25"),
        ("0*-1", "0"),
        ("1,234 * 1", "1234"),
        ("1,234,567.50 + 0", "1234567.5"),
        ("1/3", "0.333333333333"),
        ("2/3", "0.666666666667"),
        ("-200/3", "-66.6666666667"),
        ("1/3*3", "1"),
        ("1/30000", "0.0000333333333333"),
        ("12345678901234/3", "4115226300411.33"),
        ("1" + "0" * 40 + "/" + "1" + "0" * 39, "10"),
        ("1/1" + "0" * 30, "0." + "0" * 29 + "1"),
        ("1/7" + "0" * 31, "0." + "0" * 31 + "142857142857"),
    ],
)
def test_numbers_are_exact_and_written_in_one_way(expression, output):
    assert calculate(expression) == output


@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("'strawberry'.count('r')", "3"),
        ('"strawberry".count("r")', "3"),
        ("'a,b,c'.count(',')", "2"),
        ("'1,234'.count(',')", "1"),
        ("'important'.count('t')", "2"),
        ("'evaluate open input'.count('e')", "3"),
        ("'na\u00efve'.count('\u00ef')", "1"),
        ("'\u6f22\u5b57\u6f22'.count('\u6f22')", "2"),
        ('"it\'s".count("\'")', "1"),
        (r"'it\'s'.count('\'')", "1"),
        (r"'a\\b'.count('\\')", "1"),
        ("'banana' . count ( 'an' )", "2"),
        ("'(1+2)'.count('+')", "1"),
        ("'aab'.count('a') + 'b'.count('b')", "3"),
        ("''.count('a')", "0"),
    ],
)
def test_letters_of_a_text_are_counted_as_they_stand(expression, output):
    assert calculate(expression) == output


@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("", "error: empty expression"),
        (" \n ", "error: empty expression"),
        ("1/0", "error: division by zero"),
        ("1//(2-2)", "error: division by zero"),
        ("5/'abc'.count('z')", "error: division by zero"),
        ("(1+2", "error: missing a )"),
        ("1+2)", "error: unexpected )"),
        ("1+", "error: missing number at the end"),
        ("2**3", "error: unexpected *"),
        ("20%3", "error: unexpected %"),
        ("2^3", "error: unexpected ^"),
        ("$5", "error: unexpected $"),
        ("1 2", "error: unexpected 2"),
        ("1.2.3", "error: unexpected .3"),
        ("1e5", "error: unexpected e5"),
        ("\u0663+1", "error: unexpected \u0663"),
        ("1,23", "error: misplaced comma in 1,23"),
        ("1,2345", "error: misplaced comma in 1,2345"),
        ("max(1,234)", "error: unexpected max"),
        ("__import__('os')", "error: unexpected __import__"),
        ("'abc", "error: unexpected '"),
        ("'abc'", "error: missing .count( after a text"),
        ("'a'+1", "error: unexpected +, missing .count( after a text"),
        ("'abc'.count(1)", "error: unexpected 1, missing one quoted text inside .count( )"),
        ("'abc'.counts('a')", "error: unexpected ., missing .count( after a text"),
        ("'abc'.count('')", "error: an empty text cannot be counted"),
        ("'a'.zfill(100000000).count('0')", "error: unexpected ., missing .count( after a text"),
    ],
)
def test_what_has_no_value_gets_an_error_that_names_the_cause(expression, output):
    assert calculate(expression) == output


def test_costs_are_bounded_and_every_bound_is_reported():
    assert (
        calculate("1" * calculator.MAX_CHARS + "0")
        == f"error: expression longer than {calculator.MAX_CHARS} characters"
    )
    deep = calculator.MAX_DEPTH
    assert calculate("(" * (deep - 1) + "1" + ")" * (deep - 1)) == "1"
    assert calculate("(" * deep + "1" + ")" * deep) == f"error: nested deeper than {deep}"
    assert calculate("-" * deep + "1") == f"error: nested deeper than {deep}"
    too_long = f"error: number with more than {calculator.MAX_DIGITS} digits"
    assert calculate("9" * calculator.MAX_DIGITS) == "9" * calculator.MAX_DIGITS
    assert calculate("9" * (calculator.MAX_DIGITS + 1)) == too_long
    assert calculate("9" * 60 + "*" + "9" * 60) == too_long
    assert calculate("1/" + "9" * 60 + "/" + "9" * 60) == too_long


def test_no_text_of_calculator_characters_is_slow_long_or_fatal():
    generator = random.Random(0)
    alphabet = "0123456789+-*/()., '\"ab\\\n" + "\u00d7\u6f22"
    expressions = ["".join(generator.choices(alphabet, k=generator.randint(0, 60))) for _ in range(2000)]
    expressions += [c * n for c in alphabet for n in (1, 2, calculator.MAX_CHARS)]
    begun = time.perf_counter()
    outputs = [calculate(expression) for expression in expressions]
    assert time.perf_counter() - begun < 5
    assert max(map(len, outputs)) <= 140
    assert all(output.startswith("error: ") or re.fullmatch(r"-?\d+(\.\d*[1-9])?", output) for output in outputs)


def test_random_expressions_equal_pythons_fractions():
    generator = random.Random(1)
    for _ in range(300):
        numbers = [str(generator.randint(1, 99)) for _ in range(4)]
        signs = generator.choices("+-*/", k=3)
        words = [f"Fraction({numbers[0]})"] + [f"{s} Fraction({n})" for s, n in zip(signs, numbers[1:])]
        text = numbers[0] + "".join(s + n for s, n in zip(signs, numbers[1:]))
        exact = eval(" ".join(words), {"Fraction": Fraction})
        output = Fraction(calculate(text))
        assert abs(output - exact) <= abs(exact) / 10**11, text


def test_outputs_agree_with_every_worked_step_of_real_school_problems(real_data):
    """GSM8K writes its steps as <<expression=result>>, the very calls that a model learns to make."""
    steps = []
    with gzip.open(real_data / "eval" / "gsm8k" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            steps += re.findall(r"<<([^<>=]*)=([^<>=]*)>>", json.loads(line)["answer"])
    assert len(steps) > 1000
    wrong = [(text, result) for text, result in steps if _differs(calculate(text), result)]
    assert wrong == []


def _differs(output: str, written: str) -> bool:
    """Whether an output is an error or another number than the book's."""
    return output.startswith("error") or Fraction(output) != Fraction(written.replace(",", ""))


def test_it_works_in_any_thread():
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(calculate, [f"{n}/4" for n in range(200)]))
    assert outputs[:5] == ["0", "0.25", "0.5", "0.75", "1"]


# The hook ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["12 + 34 = 46, 'strawberry'.count('r') error division by zero"] * 3, vocab_size=300)


def call(tokenizer: Tokenizer, expression: str) -> list[int]:
    return [
        tokenizer.special("<|python_start|>"),
        *tokenizer.encode(expression),
        tokenizer.special("<|python_end|>"),
    ]


def output_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.special("<|output_start|>"), *tokenizer.encode(text), tokenizer.special("<|output_end|>")]


def push_all(hook: CalculatorHook, ids: list[int]) -> list[list[int]]:
    return [hook.push(token_id) for token_id in ids]


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12+34", "46"),
        ("'strawberry'.count('r')", "3"),
        ("1/0", "error: division by zero"),
        ("", "error: empty expression"),
    ],
)
def test_a_closed_call_is_answered_between_output_markers(tokenizer, expression, result):
    *during, after = push_all(CalculatorHook(tokenizer), call(tokenizer, expression))
    assert not any(during)
    assert after == output_ids(tokenizer, result)


def test_a_second_call_is_answered_though_the_first_answer_was_never_pushed(tokenizer):
    hook = CalculatorHook(tokenizer)
    push_all(hook, call(tokenizer, "1+1"))
    assert not any(push_all(hook, tokenizer.encode("so the next is 5*5")))
    assert push_all(hook, call(tokenizer, "5*5"))[-1] == output_ids(tokenizer, "25")


def test_text_outside_a_call_and_a_lone_end_ask_for_nothing(tokenizer):
    end = tokenizer.special("<|python_end|>")
    assert not any(push_all(CalculatorHook(tokenizer), [*tokenizer.encode("1+1"), end, *tokenizer.encode("2")]))


def test_opening_again_starts_the_expression_afresh(tokenizer):
    start = tokenizer.special("<|python_start|>")
    ids = [start, *tokenizer.encode("99+"), *call(tokenizer, "1+1")]
    assert push_all(CalculatorHook(tokenizer), ids)[-1] == output_ids(tokenizer, "2")


@pytest.mark.parametrize("name", ["<|assistant_end|>", "<|bos|>", "<|user_start|>", "<|output_start|>"])
def test_any_other_special_token_abandons_the_call(tokenizer, name):
    ids = call(tokenizer, "1+1")
    ids.insert(2, tokenizer.special(name))
    assert not any(push_all(CalculatorHook(tokenizer), ids))


def test_a_call_that_never_stops_growing_costs_no_memory_and_ends_in_an_error(tokenizer):
    hook = CalculatorHook(tokenizer)
    one = tokenizer.encode("1")
    push_all(hook, [tokenizer.special("<|python_start|>"), *one * 50_000])
    assert hook._expression is not None and len(hook._expression) == tools.MAX_TOKENS + 1
    output = hook.push(tokenizer.special("<|python_end|>"))
    assert output == output_ids(tokenizer, f"error: more than {tools.MAX_TOKENS} tokens")


def test_bytes_that_are_no_text_are_an_error_not_a_crash(tokenizer):
    ids = [tokenizer.special("<|python_start|>"), 0xFF, 0xFE, tokenizer.special("<|python_end|>")]
    assert push_all(CalculatorHook(tokenizer), ids)[-1] == output_ids(tokenizer, "error: unexpected \ufffd")


def test_the_module_needs_no_evaluator_signal_or_process():
    source = Path(tools.__file__).read_text(encoding="utf-8")
    assert not re.search(r"\b(eval|exec|ast|signal|subprocess)\b", source)
