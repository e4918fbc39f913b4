"""Judges a program from outside: two processes, of which only one can say that all went well.

This file runs inside the sandbox, as a program of its own (`python -c`), before the program under test. It forks:

    judge      has the checks, the sentinel and the report; none of the program's code ever runs in it
    program    runs the program, then answers the judge's questions: call this, give me that

The sentinel reaches the sandbox in a file that the program's process has closed before its first line runs, and the
judge reads it only after the fork. The checks run in the judge, where the program's functions are stand-ins: a call
sends plain values there, and plain values come back, so an object that claims to equal everything equals nothing. What
is not plain (an instance, a generator) stays there and gets a stand-in too.

A program that leaves early, however it does, gives no answer, and that is a failure. Without checks the one question is
whether the program has come to its end, and only the program's own process can answer that.
"""

from __future__ import annotations

import builtins
import json
import marshal
import os
import sys
from collections import Counter, OrderedDict, deque
from functools import partial

TYPE_CHECKING = False  # typing has the same, and takes a while to load
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

JOB, REPORT = 3, 4
ERROR_CHARS = 2000
SCALARS = {bool, int, float, str}
# Plain values that JSON does not have, by the name of their class: its module, its parts, and how to make it of them.
PLAIN: dict[str, tuple[str, Callable[[Any], Iterable], Callable]] = {
    "list": ("builtins", iter, lambda *parts: list(parts)),
    "tuple": ("builtins", iter, lambda *parts: parts),
    "set": ("builtins", iter, lambda *parts: set(parts)),
    "frozenset": ("builtins", iter, lambda *parts: frozenset(parts)),
    "deque": ("collections", iter, lambda *parts: deque(parts)),
    "dict": ("builtins", dict.items, lambda *parts: dict(parts)),
    "defaultdict": ("collections", dict.items, lambda *parts: dict(parts)),
    "OrderedDict": ("collections", dict.items, lambda *parts: OrderedDict(parts)),
    "Counter": ("collections", dict.items, lambda *parts: Counter(dict(parts))),
    "bytes": ("builtins", lambda value: [value.decode("latin1")], lambda text: text.encode("latin1")),
    "bytearray": ("builtins", lambda value: [value.decode("latin1")], lambda text: bytearray(text, "latin1")),
    "complex": ("builtins", lambda value: [value.real, value.imag], complex),
    "range": ("builtins", lambda value: [value.start, value.stop, value.step], range),
    "Decimal": ("decimal", lambda value: [str(value)], lambda text: __import__("decimal").Decimal(text)),
    "Fraction": ("fractions", lambda value: [str(value)], lambda text: __import__("fractions").Fraction(text)),
}
OBJECT = "object"  # what stays where it is


class Gone(BaseException):
    """The other process has ended."""


class Link:
    """Messages between the two processes, a line of JSON each. Nothing that could be in one runs code."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")

    def send(self, value: object) -> None:
        try:
            self._writing.write(json.dumps(self.packed(value)).encode() + b"\n")
            self._writing.flush()
        except BrokenPipeError:
            raise Gone from None

    def receive(self) -> Any:
        line = self._reading.readline()
        if not line.endswith(b"\n"):
            raise Gone
        return self.unpacked(json.loads(line))

    def packed(self, value: Any) -> object:
        kind = type(value)
        if value is None or kind in SCALARS:
            return value
        module, parts, _ = PLAIN.get(kind.__name__, ("", iter, iter))
        if kind is getattr(sys.modules.get(module), kind.__name__, None):
            return [kind.__name__, *map(self.packed, parts(value))]
        return [OBJECT, *self.stand_in(value)]

    def unpacked(self, value: Any) -> Any:
        if type(value) is not list:
            return value
        name, *parts = value
        if name == OBJECT:
            return self.stands_for(*parts)
        return PLAIN[name][2](*map(self.unpacked, parts))

    def stand_in(self, value: object) -> tuple[int, str]:
        """What is sent in the place of a value that is not plain: its number, and its name if it is a module."""
        raise NotImplementedError

    def stands_for(self, number: int, module: str) -> object:
        """The other direction."""
        raise NotImplementedError


# The program's process -----------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "attribute": getattr,
    "item": lambda value, key: value[key],
    "length": len,
    "iterator": iter,
    "next": next,
    "text": str,
    "truth": bool,
}


class Program(Link):
    """Runs the program and answers questions. Nothing here is safe from the program."""

    def __init__(self, reading: int, writing: int) -> None:
        super().__init__(reading, writing)
        self._kept: list[object] = []

    def stand_in(self, value: object) -> tuple[int, str]:
        self._kept.append(value)
        return len(self._kept) - 1, value.__name__ if isinstance(value, type(sys)) else ""

    def stands_for(self, number: int, module: str) -> object:
        return self._kept[number]

    def serve(self) -> None:
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        questions = {**QUESTIONS, "global": main.__dict__.__getitem__}
        text = self.receive()
        end = self._answer(lambda: exec(compile(text, "<program>", "exec"), main.__dict__), show=True)
        while True:
            question, arguments, named = self.receive()
            if question != "end":
                self.send(self._answer(partial(questions[question], *arguments, **named)))
            else:
                self.send(end if end[0] == "raised" else arguments[0])

    def _answer(self, work: Callable[[], object], show: bool = False) -> tuple:
        """What came of it: ("value", it), or ("raised", kinds of the error, its text)."""
        answer: tuple
        try:
            answer = ("value", work())
        except BaseException as error:
            if show:
                own_frames, trace = 2, error.__traceback__
                while own_frames and trace:
                    own_frames, trace = own_frames - 1, trace.tb_next
                sys.__excepthook__(type(error), error.with_traceback(trace), trace)
            answer = ("raised", [kind.__name__ for kind in type(error).__mro__], str(error))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return answer


# The judge -----------------------------------------------------------------------------------------------------------


class Judge(Link):
    """Asks, and believes plain values only."""

    is_gone = False

    def stand_in(self, value: object) -> tuple[int, str]:
        if isinstance(value, StandIn):
            return value._number, ""
        raise TypeError(f"checks can give a program plain values, not a {type(value).__name__}")

    def stands_for(self, number: int, module: str) -> object:
        """A module of the standard library is the judge's own, so that the program cannot have changed it."""
        return __import__(module) if module in sys.stdlib_module_names else StandIn(self, number)

    def asked(self, question: str, *arguments: object, **named: object) -> Any:
        """The answer as it comes."""
        try:
            self.send((question, arguments, named))
            return self.receive()
        except Gone:
            self.is_gone = True  # also for checks that catch everything
            raise

    def ask(self, question: str, *arguments: object, **named: object) -> Any:
        """The value; what the program raises is raised here, as the nearest kind of error that the language has."""
        kind, value, *text = self.asked(question, *arguments, **named)
        if kind == "value":
            return value
        found: Iterator[Any] = (getattr(builtins, name, None) for name in value)
        nearest = next((kind for kind in found if is_error(kind)), RuntimeError)
        told = text[0] if nearest.__name__ == value[0] else f"{value[0]}: {text[0]}"
        try:
            error = nearest(told)
        except TypeError:  # a kind that wants more than a text
            error = RuntimeError(f"{value[0]}: {text[0]}")
        raise error


class StandIn:
    """A function or object of the program's, which stays where the program is."""

    def __init__(self, judge: Judge, number: int) -> None:
        self._judge, self._number = judge, number

    def __call__(self, *arguments: object, **named: object) -> object:
        return self._judge.ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> object:
        return self._judge.ask("attribute", self, name)

    def __getitem__(self, key: object) -> object:
        return self._judge.ask("item", self, key)

    def __len__(self) -> int:
        return self._judge.ask("length", self)

    def __iter__(self) -> object:
        return self._judge.ask("iterator", self)

    def __next__(self) -> object:
        return self._judge.ask("next", self)

    def __str__(self) -> str:
        return str(self._judge.ask("text", self))

    def __bool__(self) -> bool:
        return bool(self._judge.ask("truth", self))


class Names(dict):
    """The names that checks know: their own, the language's, and last the program's."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(__name__="checks")
        self._judge = judge

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name):
            raise KeyError(name)
        return self._judge.ask("global", name)


def is_error(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


def judged(judge: Judge, child: int, code: str, checks: str, sentinel: str) -> str:
    """The sentinel if all is well, else what is wrong."""
    nonce = os.urandom(16).hex()
    try:
        judge.send(code)
        answer = judge.asked("end", nonce)
        if answer != nonce:
            _, kinds, text = answer
            return f"{kinds[0]}: {text}".removesuffix(": ")[:ERROR_CHARS] or "it failed"
        if checks:
            exec(compile(checks, "<checks>", "exec"), Names(judge))
    except BaseException as wrong:  # whatever it is, it is no success
        return how_it_ended(child) if judge.is_gone else described(wrong)[:ERROR_CHARS]
    return how_it_ended(child) if judge.is_gone else sentinel


def described(error: BaseException) -> str:
    """The kind of an error, its text, and the line of the checks in which it came up."""
    line, trace = 0, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<checks>" else line
        trace = trace.tb_next
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{text} (line {line} of the checks)" if line else text


def how_it_ended(child: int) -> str:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
    return f"the program {how} before all was done"


def main() -> None:
    """Arguments: folders with packages."""
    sys.path = [path for path in sys.path if path] + sys.argv[1:]
    getattr(sys, "set_int_max_str_digits", int)(0)  # whole numbers of any length, where there is a limit
    asked, ask = os.pipe()
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        for handle in (JOB, REPORT, ask, answers):
            os.close(handle)
        sys.path.insert(0, "")
        sys.argv = ["program"]
        try:
            Program(asked, answer).serve()
        except Gone:
            os._exit(0)
    os.close(asked)
    os.close(answer)
    with os.fdopen(JOB, "rb") as file:
        job = marshal.load(file)
    os.write(REPORT, judged(Judge(answers, ask), child, **job).encode(errors="replace"))


if __name__ == "__main__":
    main()
