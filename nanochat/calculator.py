"""The calculator that a model may call in the middle of its answer (`tools` ties it to token ids).

An expression is arithmetic, or `'strawberry'.count('r')`. We read it ourselves, by a parser of one method per rule that
takes one piece of the text after the other:

    sum     = product, then any number of  + product  or  - product
    product = signed, then any number of   * signed ,  / signed ,  // signed  (rounded down)  or  % signed  (the rest)
    signed  = -signed, +signed or power
    power   = part, or  part ^ signed  (** is the same; the exponent is whole)
    part    = item, or  item %  (hundredths: a % with nothing to divide by behind it)
    item    = number, (sum), text.count(text), or a function of `FUNCTIONS` such as max(sum, sum)

A number may have a currency before it and commas between its thousands, but not inside the brackets of a function,
where commas part its arguments; × and x multiply. Rounding is as in school: halves go away from zero.

Nothing is handed to Python's own evaluator, so there is nothing to escape from, and no timer is needed: every cost is
bounded by the constants below. Numbers are exact fractions, so 0.2*3 is 0.6 and 60/6 is 10, never 10.0. What goes wrong
is told to the model as text too ("error: division by zero"): a call always has an output.

    >>> calculate("1,234 * (2 + 0.5)")
    '3085'
    >>> calculate("10/4 - 1/3")
    '2.16666666667'
    >>> calculate("$80 - 15% * 80 + max(2^10, 1,000)")
    '1092'
    >>> calculate("'a,b,c'.count(',')")
    '2'
    >>> calculate("7 / (3 - 3)")
    'error: division by zero'
"""

import re
from collections.abc import Callable
from fractions import Fraction
from math import floor

MAX_CHARS = 512  # length of an expression
MAX_DEPTH = 32  # parentheses and signs inside each other
MAX_DIGITS = 100  # digits of the numerator or denominator of any number on the way
SIGNIFICANT_DIGITS = 12  # of an output that no decimal writes exactly, such as 1/3
MAX_DECIMALS = 30  # a terminating decimal with more places is rounded to SIGNIFICANT_DIGITS too

_SIGNS = {"×": "*", "x": "*", "X": "*", "÷": "/", "−": "-", "**": "^"}
_CURRENCY = "$€£¥"
_TEXT = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_TIMES = r"[xX](?![^\W\d])"  # x is no sign where a word begins with it
_SIGN = rf"\*\*|//|[-+*/^%(),×÷−]|{_TIMES}"
_PERCENT = rf"%(?=\s*{_TIMES})|%(?!\s*[\w.('\"{_CURRENCY}])"


def _pieces(number: str) -> re.Pattern[str]:
    """What finds the next piece of an expression; its groups are the kinds of piece."""
    return re.compile(
        rf"\s*(?:(?P<wrong_number>0[xX][0-9a-fA-F]+)|(?:[{_CURRENCY}]\s*)?(?P<number>{number}|\.[0-9]+)|(?P<text>{_TEXT})"
        rf"|(?P<count>\.\s*count\b)|(?P<percent>{_PERCENT})|(?P<sign>{_SIGN})|(?P<name>[^\W\d]\w*)|(?P<wrong>\w+|\S)"
        r"|(?P<end>\Z))",
        re.DOTALL,
    )


_PIECE = _pieces(r"[0-9][0-9,]*(?:\.[0-9]*)?")
_PIECE_OF_ARGUMENTS = _pieces(r"[0-9]+(?:\.[0-9]*)?")
_GROUPED = re.compile(r"[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+")
_ESCAPE = re.compile(r"\\(['\"\\])")


class Refused(Exception):
    """An expression that has no value; the message is what the model reads."""


class NoExpression(Refused):
    """The text is not written as one: another tool may know what to do with it."""


def calculate(expression: str) -> str:
    """The output of one call: a number, or text that starts with `error: `. Pure, and safe to call from any thread.

    Whole numbers have no point, terminating decimals are exact, and others have 12 significant digits (more where the
    whole part alone is longer). Never longer than 140 characters.
    """
    try:
        return format_number(evaluate(expression))
    except Refused as refusal:
        return f"error: {refusal}"


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression. Raises Refused where it has none."""
    if len(expression) > MAX_CHARS:
        raise NoExpression(f"expression longer than {MAX_CHARS} characters")
    if not expression.strip():
        raise Refused("empty expression")
    return _Parser(expression).value()


def is_expression(text: str) -> bool:
    """Whether this is written as an expression, be there a value or not: 1/0 is one, print(1) is not."""
    try:
        evaluate(text)
    except NoExpression:
        return False
    except Refused:
        pass
    return True


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


class _Parser:
    """Walks once over the text; each method reads one rule of the grammar and returns its value.

    The next piece is always known: its kind (a group of the pattern) and its text.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0  # where the piece after the next one begins
        self._depth = 0
        self._pattern = _PIECE
        self._kind = self._piece = ""
        self._advance()

    def value(self) -> Fraction:
        result = self._sum()
        if self._kind != "end":
            raise self._unexpected()
        return result

    def _advance(self) -> None:
        match = self._pattern.match(self._text, self._at)
        assert match and match.lastgroup, "some group takes whatever there is"
        self._kind, piece, self._at = match.lastgroup, match[match.lastgroup], match.end()
        self._piece = _SIGNS.get(piece, piece) if self._kind == "sign" else piece

    def _take(self, *signs: str) -> str | None:
        """The next piece, if it is one of these signs."""
        return self._take_kind("sign") if self._piece in signs else None

    def _take_kind(self, kind: str) -> str | None:
        """The next piece, if it is of this kind."""
        if self._kind != kind:
            return None
        piece = self._piece
        self._advance()
        return piece

    def _sum(self) -> Fraction:
        result = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            result = _bounded(result + other if sign == "+" else result - other)
        return result

    def _product(self) -> Fraction:
        result = self._signed()
        while sign := self._take("*", "/", "//", "%"):
            other = self._signed()
            if sign != "*" and not other:
                raise Refused("division by zero")
            quotient = _bounded(result * other if sign == "*" else result / other)
            if sign == "%":
                result = _bounded(result - other * floor(quotient))
            else:
                result = Fraction(floor(quotient)) if sign == "//" else quotient
        return result

    def _signed(self) -> Fraction:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Refused(f"nested deeper than {MAX_DEPTH}")
        sign = self._take("-", "+")
        result = self._signed() if sign else self._power()
        self._depth -= 1
        return -result if sign == "-" else result

    def _power(self) -> Fraction:
        base = self._item()
        base = _bounded(base / 100) if self._take_kind("percent") else base
        return _raised(base, self._signed()) if self._take("^") else base

    def _item(self) -> Fraction:
        if (number := self._take_kind("number")) is not None:
            return _read_number(number)
        if (text := self._take_kind("text")) is not None:
            return Fraction(_unquote(text).count(self._counted()))
        if self._kind == "name" and self._piece in FUNCTIONS:
            return self._function()
        if not self._take("("):
            raise self._unexpected()
        result = self._sum()
        self._close()
        return result

    def _function(self) -> Fraction:
        """A name and its arguments, in which a comma parts two of them even between digits."""
        name, outside = self._piece, self._pattern
        self._advance()
        self._pattern = _PIECE_OF_ARGUMENTS
        if not self._take("("):
            raise self._unexpected("a (")
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self._pattern = outside
        self._close()
        num_arguments, function = FUNCTIONS[name]
        if len(arguments) not in num_arguments:
            raise Refused(f"too many arguments for {name}")
        return _bounded(function(*arguments))

    def _close(self) -> None:
        if not self._take(")"):
            raise self._unexpected("a )")

    def _counted(self) -> str:
        """The argument of `.count(...)`, whose text was just read."""
        if self._take_kind("count") is None or not self._take("("):
            raise self._unexpected(".count( after a text")
        text = self._take_kind("text")
        if text is None or not self._take(")"):
            raise self._unexpected("one quoted text inside .count( )")
        if len(text) == 2:
            raise Refused("an empty text cannot be counted")
        return _unquote(text)

    def _unexpected(self, wanted: str = "") -> NoExpression:
        if self._kind == "end":
            return NoExpression(f"missing {wanted or 'number at the end'}")
        return NoExpression(f"unexpected {self._piece[:20]}" + (f", missing {wanted}" if wanted else ""))


# Numbers --------------------------------------------------------------------------------------------------------


def _read_number(text: str) -> Fraction:
    whole, _, places = text.partition(".")
    if whole and not _GROUPED.fullmatch(whole):
        raise Refused(f"misplaced comma in {text[:20]}")
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


def _too_long() -> Refused:
    return Refused(f"number with more than {MAX_DIGITS} digits")


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    """base ^ exponent; what would be too long is refused before it is made."""
    if exponent.denominator != 1:
        raise Refused("an exponent that is not whole")
    if not base and exponent < 0:
        raise Refused("division by zero")
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1  # base or its inverse is 2^bits at least
    if bits * abs(exponent) > MAX_DIGITS * 10 / 3:  # 2^10 is more than 10^3
        raise _too_long()
    return _bounded(base ** int(exponent))


def _round(value: Fraction, places: Fraction = Fraction(0)) -> Fraction:
    if places.denominator != 1 or abs(places) > MAX_DIGITS:
        raise Refused(f"rounding to {format_number(places)} places")
    unit = Fraction(10) ** -int(places)
    nearest = floor(abs(value) / unit + Fraction(1, 2)) * unit
    return -nearest if value < 0 else nearest


# Names in expressions: how many arguments they may have, and what they are.
FUNCTIONS: dict[str, tuple[range, Callable[..., Fraction]]] = {
    "abs": (range(1, 2), abs),
    "max": (range(1, MAX_CHARS), lambda *values: max(values)),
    "min": (range(1, MAX_CHARS), lambda *values: min(values)),
    "round": (range(1, 3), _round),
}
