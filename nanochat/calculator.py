"""The calculator that a model may call in the middle of its answer (`tools` ties it to token ids).

An expression is arithmetic, or `'strawberry'.count('r')`. We read it ourselves, by a small tokenizer and a parser of
one function per rule:

    sum     = product, then any number of  + product  or  - product
    product = signed, then any number of   * signed ,  / signed  or  // signed  (rounded down)
    signed  = -signed, +signed or item
    item    = number, (sum), or text.count(text)

Nothing is handed to Python's own evaluator, so there is nothing to escape from, and no timer is needed: every cost is
bounded by the constants below. Numbers are exact fractions, so 0.2*3 is 0.6 and 60/6 is 10, never 10.0. What goes wrong
is told to the model as text too ("error: division by zero"): a call always has an output.

    >>> calculate("1,234 * (2 + 0.5)")
    '3085'
    >>> calculate("10/4 - 1/3")
    '2.16666666667'
    >>> calculate("'a,b,c'.count(',')")
    '2'
    >>> calculate("7 / (3 - 3)")
    'error: division by zero'
"""

import re
from fractions import Fraction
from math import floor

MAX_CHARS = 512  # length of an expression
MAX_DEPTH = 32  # parentheses and signs inside each other
MAX_DIGITS = 100  # digits of the numerator or denominator of any number on the way
SIGNIFICANT_DIGITS = 12  # of an output that no decimal writes exactly, such as 1/3
MAX_DECIMALS = 30  # a terminating decimal with more places is rounded to SIGNIFICANT_DIGITS too

_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-"})
_NUMBER = r"[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+"
_TEXT = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_PIECE = re.compile(
    rf"\s*(?:(?P<number>{_NUMBER})|(?P<text>{_TEXT})|(?P<count>\.\s*count\b)|(?P<sign>//|[-+*/()×÷−])|(?P<wrong>\w+|\S))",
    re.DOTALL,
)
_GROUPED = re.compile(r"[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+")
_ESCAPE = re.compile(r"\\(['\"\\])")


class _Refused(Exception):
    """The expression has no value; the message is what the model reads."""


def calculate(expression: str) -> str:
    """The output of one call: a number, or text that starts with `error: `. Pure, and safe to call from any thread.

    Whole numbers have no point, terminating decimals are exact, and others have 12 significant digits (more where the
    whole part alone is longer). Never longer than 140 characters.
    """
    try:
        return format_number(_Parser(_split(expression)).value())
    except _Refused as refusal:
        return f"error: {refusal}"


def format_number(value: Fraction) -> str:
    """The one way a number is written: no exponent, no thousands commas, no trailing zeros."""
    decimals = _decimals(value)
    digits = str(abs(round(value * 10**decimals))).rjust(decimals + 1, "0")
    whole, places = digits[: len(digits) - decimals], digits[len(digits) - decimals :].rstrip("0")
    return ("-" if value < 0 else "") + whole + ("." + places if places else "")


def _decimals(value: Fraction) -> int:
    """How many decimal places `value` is written with, before trailing zeros go."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest == 1 and max(twos, fives) <= MAX_DECIMALS:
        return max(twos, fives)
    if abs(value) >= 1:
        return max(2, SIGNIFICANT_DIGITS - len(str(int(abs(value)))))
    return len(str(value.denominator // abs(value.numerator))) - 1 + SIGNIFICANT_DIGITS


def _split(expression: str) -> list[tuple[str, str]]:
    """(kind, text) of every piece, and an `end` piece. Kinds are the group names of `_PIECE`."""
    if len(expression) > MAX_CHARS:
        raise _Refused(f"expression longer than {MAX_CHARS} characters")
    pieces = [(match.lastgroup or "", match[match.lastgroup or 0]) for match in _PIECE.finditer(expression)]
    if not pieces:
        raise _Refused("empty expression")
    return [*((kind, piece.translate(_SIGNS) if kind == "sign" else piece) for kind, piece in pieces), ("end", "")]


class _Parser:
    """Walks once over the pieces; each method reads one rule of the grammar and returns its value."""

    def __init__(self, pieces: list[tuple[str, str]]) -> None:
        self._pieces = pieces
        self._at = 0
        self._depth = 0

    def value(self) -> Fraction:
        result = self._sum()
        if self._pieces[self._at][0] != "end":
            raise self._unexpected()
        return result

    def _take(self, *signs: str) -> str | None:
        """The next piece, if it is one of these signs."""
        kind, piece = self._pieces[self._at]
        if kind != "sign" or piece not in signs:
            return None
        self._at += 1
        return piece

    def _take_kind(self, kind: str) -> str | None:
        """The next piece, if it is of this kind."""
        if self._pieces[self._at][0] != kind:
            return None
        self._at += 1
        return self._pieces[self._at - 1][1]

    def _sum(self) -> Fraction:
        result = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            result = _bounded(result + other if sign == "+" else result - other)
        return result

    def _product(self) -> Fraction:
        result = self._signed()
        while sign := self._take("*", "/", "//"):
            other = self._signed()
            if sign != "*" and not other:
                raise _Refused("division by zero")
            result = _bounded(result * other if sign == "*" else result / other)
            result = Fraction(floor(result)) if sign == "//" else result
        return result

    def _signed(self) -> Fraction:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH}")
        sign = self._take("-", "+")
        result = self._signed() if sign else self._item()
        self._depth -= 1
        return -result if sign == "-" else result

    def _item(self) -> Fraction:
        if (number := self._take_kind("number")) is not None:
            return _read_number(number)
        if (text := self._take_kind("text")) is not None:
            return Fraction(_unquote(text).count(self._counted()))
        if not self._take("("):
            raise self._unexpected()
        result = self._sum()
        if not self._take(")"):
            raise self._unexpected("a )")
        return result

    def _counted(self) -> str:
        """The argument of `.count(...)`, whose text was just read."""
        if self._take_kind("count") is None or not self._take("("):
            raise self._unexpected(".count( after a text")
        text = self._take_kind("text")
        if text is None or not self._take(")"):
            raise self._unexpected("one quoted text inside .count( )")
        if len(text) == 2:
            raise _Refused("an empty text cannot be counted")
        return _unquote(text)

    def _unexpected(self, wanted: str = "") -> _Refused:
        kind, piece = self._pieces[self._at]
        if kind == "end":
            return _Refused(f"missing {wanted or 'number at the end'}")
        return _Refused(f"unexpected {piece[:20]}" + (f", missing {wanted}" if wanted else ""))


def _read_number(text: str) -> Fraction:
    whole, _, places = text.partition(".")
    if whole and not _GROUPED.fullmatch(whole):
        raise _Refused(f"misplaced comma in {text[:20]}")
    digits = whole.replace(",", "") + places
    if len(digits) > MAX_DIGITS:
        raise _too_long()
    return Fraction(int(digits), 10 ** len(places))


def _unquote(text: str) -> str:
    return _ESCAPE.sub(r"\1", text[1:-1])


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise _too_long()
    return value


def _too_long() -> _Refused:
    return _Refused(f"number with more than {MAX_DIGITS} digits")
