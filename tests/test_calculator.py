"""The calculator: its arithmetic, its spelling of numbers, its errors, and that no text is too much for it."""

import gzip
import json
import re
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import calculator
from nanochat.calculator import calculate, is_expression


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
        ("3 x 4", "12"),
        ("3x4X5", "60"),
        ("2 x -3", "-6"),
        ("0 x 10", "0"),
    ],
)
def test_arithmetic_follows_the_usual_precedence(expression, output):
    assert calculate(expression) == output


@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("2^3", "8"),
        ("2**3", "8"),
        ("2^3^2", "512"),
        ("-2^2", "-4"),
        ("(-2)^2", "4"),
        ("2^-2", "0.25"),
        ("1.1^2*10", "12.1"),
        ("0^0", "1"),
        ("1^(10^99)", "1"),
        ("(-1)^(10^99+1)", "-1"),
        ("10^99", "1" + "0" * 99),
        ("0.1^99", "0." + "0" * 98 + "1"),
    ],
)
def test_powers_bind_to_the_right_and_before_signs(expression, output):
    assert calculate(expression) == output


@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("20%3", "2"),
        ("20 % 3 * 2", "4"),
        ("-7 % 3", "2"),
        ("7.5 % 2", "1.5"),
        ("10 % (1+2)", "1"),
        ("15%", "0.15"),
        ("15% * 80", "12"),
        ("80 * 15%", "12"),
        ("15% x 80", "12"),
        ("50%x80", "40"),
        ("100 - 20%", "99.8"),
        ("(5+5)% + 1", "1.1"),
        ("50%^2", "0.25"),
    ],
)
def test_a_percent_sign_is_a_rest_before_a_divisor_and_hundredths_elsewhere(expression, output):
    assert calculate(expression) == output


@pytest.mark.parametrize(
    ("expression", "output"),
    [
        ("max(3, 7, 5)", "7"),
        ("min(3, 7, 5) - abs(-2)", "1"),
        ("max(4)", "4"),
        ("max(1,234)", "234"),
        ("max(1,234) + 1,000", "1234"),
        ("round(10/3)", "3"),
        ("round(2.5)", "3"),
        ("round(-2.5)", "-3"),
        ("round(2.675, 2)", "2.68"),
        ("round(1234, -2)", "1200"),
        ("max(1, min(2, (3+4)*5), 'aa'.count('a'))", "2"),
    ],
)
def test_functions_take_arguments_between_commas_and_round_as_in_school(expression, output):
    assert calculate(expression) == output


@pytest.mark.parametrize(
    ("expression", "output"), [("$5", "5"), ("$1,234.50 * 2", "2469"), ("-£3 + € .5", "-2.5"), ("max($2, ¥3)", "3")]
)
def test_a_currency_before_a_number_is_no_part_of_the_result(expression, output):
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
        ("1 2", "error: unexpected 2"),
        ("1.2.3", "error: unexpected .3"),
        ("1e5", "error: unexpected e5"),
        ("\u0663+1", "error: unexpected \u0663"),
        ("1,23", "error: misplaced comma in 1,23"),
        ("1,2345", "error: misplaced comma in 1,2345"),
        ("__import__('os')", "error: unexpected __import__"),
        ("sqrt(4)", "error: unexpected sqrt"),
        ("0x10", "error: unexpected 0x10"),
        ("20% of 50", "error: unexpected of"),
        ("5 % 0", "error: division by zero"),
        ("0^-1", "error: division by zero"),
        ("4^0.5", "error: an exponent that is not whole"),
        ("round(1, 0.5)", "error: rounding to 0.5 places"),
        ("round(1, 101)", "error: rounding to 101 places"),
        ("round(1,234.5)", "error: rounding to 234.5 places"),
        ("round(1, 2, 3)", "error: too many arguments for round"),
        ("max()", "error: unexpected )"),
        ("max(1", "error: missing a )"),
        ("max 3", "error: unexpected 3, missing a ("),
        ("1, 2", "error: misplaced comma in 1,"),
        ("$", "error: unexpected $"),
        ("5$", "error: unexpected $"),
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
    assert calculate("2^332") == str(2**332)
    for power in ("2^333", "10^100", "0.1^100", "9^9^9^9", "2^-(10^99)", "1.0000001^(10^99)", "round(9^105)"):
        assert calculate(power) == too_long, power


def work_of(expression: str) -> tuple[str, int, int]:
    """The output, how many functions were called for it, and the most memory that was held, in bytes."""
    num_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    tracemalloc.start()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        output = calculate(expression)
    finally:
        sys.setprofile(before)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return output, num_calls, memory


PIECES = [*"0123456789+-*/%^()., '\"\\\n$x", "**", "//", "max(", "min(", "round(", "abs(", "'ab'.count('a')", ".count("]
PIECES += ["9" * 40, "1,234", "10^99", "0.1^99", "1/7", "×", "漢", "\u0663", "\x00", "\ud800", "print(1)", "0x1"]
LONG = [
    "9^999999",
    "2^(10^99)",
    "9" * 512,
    "(" * 512,
    "-" * 512,
    "2^" * 256,
    "'" * 512,
    "'" * 511 + "a",
    "\\" * 512,
    "%" * 512,
    "max(" * 128,
]
LONG += ["9^" * 255 + "9", "1/3+" * 127 + "1", "1/" + "7*" * 254 + "1", "9*" * 255 + "9", "max(" + "1," * 250 + "1)"]
LONG += [
    "round(1/3," * 30 + "9" + ")" * 30,
    "1/7+" * 20 + "1/" + "9" * 99,
    "7%" * 255 + "5",
    ("9" * 99 + "%") * 5 + "7",
]


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=600), st.lists(st.sampled_from(PIECES), max_size=80).map("".join)))
def test_any_text_has_an_output_that_is_short_and_costs_little(expression):
    output, num_calls, memory = work_of(expression)
    assert re.fullmatch(r"-?\d+(\.\d*[1-9])?|error: .+", output, re.DOTALL) and len(output) <= 140
    assert num_calls < 30_000 and memory < 200_000


@pytest.mark.parametrize("expression", LONG)
def test_the_longest_texts_cost_little(expression):
    assert len(expression) <= calculator.MAX_CHARS
    output, num_calls, memory = work_of(expression)
    assert len(output) <= 140 and num_calls < 30_000 and memory < 200_000


@st.composite
def sums(draw: st.DrawFn, depth: int = 3) -> tuple[str, Fraction]:
    """An expression in brackets, and its value by Python's own fractions."""
    if depth == 0:
        number = draw(st.integers(0, 999))
        return str(number), Fraction(number)
    (left, a), (right, b) = draw(sums(depth - 1)), draw(sums(depth - 1))
    values = {"+": a + b, "-": a - b, "*": a * b}
    values |= {"/": a / b, "//": Fraction(a // b), "%": a % b} if b else {}
    sign = draw(st.sampled_from(sorted(values)))
    return f"({left} {sign} {right})", values[sign]


@settings(max_examples=200, deadline=None)
@given(sums())
def test_any_sum_has_the_value_of_exact_fractions(both):
    text, exact = both
    assert calculator.evaluate(text) == exact
    assert calculate(text) == calculator.format_number(exact)
    assert abs(Fraction(calculate(text)) - exact) <= abs(exact) / 10**11


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


@pytest.mark.parametrize("text", ["1+1", "1/0", "2^0.5", "'a'.count('')", "", "9^999", "round(1, 1/2)", "1,23"])
def test_an_expression_is_one_even_if_it_has_no_value(text):
    assert is_expression(text)


@pytest.mark.parametrize("text", ["print(1)", "x = 1", "sqrt(2)", "'a'.upper()", "1+", "[1, 2]", "1 " * 300])
def test_a_program_is_no_expression(text):
    assert not is_expression(text)


def test_the_module_needs_no_evaluator_signal_or_process():
    source = Path(calculator.__file__).read_text(encoding="utf-8")
    assert not re.search(r"\b(eval|exec|ast|signal|subprocess)\b", source)
