"""Colours for the code in an answer: POST /highlight {"language": "python", "code": "..."} gives [[kind, text], ...].

The page makes spans of the pairs. No HTML is made anywhere, so none can be smuggled in; a kind that the page does not
know has no colour.

Pygments reads code with regular expressions, and some text takes some of them forever, which no thread could end. So
each piece is coloured by a process of its own (`serve.lexing`), which is killed when its time is up. Code that takes
too long, is in a language that is not listed here, or comes while too much is waiting, is answered as one piece without
colour: colours are an ornament, and never an error.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from nanochat.serve.requests import RequestError

MAX_CODE_CHARS = 20_000
MAX_SECONDS = 2.0
MAX_AT_ONCE = 2  # processes
MAX_WAITING = 32

Pieces = list[tuple[str, str]]

# What models write behind the three backticks, and Pygments' name for it.
_PLAIN_NAMES = """
    bash c cmake console cpp csharp css cuda diff docker fortran go haskell html ini java javascript json julia kotlin
    latex lua make markdown matlab nasm ocaml pascal perl php powershell pycon python r ruby rust scala scheme sql swift
    toml typescript xml yaml zig
"""
_OTHER_NAMES = """
    asm=nasm c#=csharp c++=cpp cc=cpp cs=csharp cu=cuda dockerfile=docker golang=go h=c hpp=cpp hs=haskell js=javascript
    jsx=javascript makefile=make md=markdown patch=diff py=python python3=python rb=ruby rs=rust sh=bash shell=bash
    tex=latex ts=typescript yml=yaml zsh=bash
"""
LANGUAGES = {name: name for name in _PLAIN_NAMES.split()}
LANGUAGES |= dict(pair.split("=") for pair in _OTHER_NAMES.split())


class Highlighter:
    """Colours code, a few pieces at a time."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        self._num_asked = 0

    async def answer(self, body: bytes) -> dict[str, Pieces]:
        """The reply to a request's body. Raises RequestError for what is no such request."""
        language, code = parse_highlight_request(body)
        if self._num_asked >= MAX_WAITING:
            return {"tokens": plain(code)}
        self._num_asked += 1
        try:
            async with self._places:
                return {"tokens": await asyncio.to_thread(highlight, language, code)}
        finally:
            self._num_asked -= 1


def highlight(language: str, code: str, max_seconds: float = MAX_SECONDS) -> Pieces:
    """The pieces of `code` with their kinds, within the time; their texts together are the code, whatever happens."""
    name = LANGUAGES.get(language.lower())
    if name is None or not code:
        return plain(code)
    command = [sys.executable, "-I", str(Path(__file__).with_name("lexing.py"))]
    asked = json.dumps({"language": name, "code": code}).encode()
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=max_seconds, check=True)
    except (subprocess.SubprocessError, OSError):  # too slow, too large, no Pygments, no process to be had
        return plain(code)
    pieces = [(str(kind), str(text)) for kind, text in json.loads(done.stdout)]
    return pieces if "".join(text for _, text in pieces) == code else plain(code)


def plain(code: str) -> Pieces:
    """Code without colours."""
    return [("text", code)]


def parse_highlight_request(body: bytes) -> tuple[str, str]:
    """Language and code. Raises RequestError for whatever is wrong with them."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not valid JSON in UTF-8, or is nested too deeply") from error
    if not isinstance(fields, dict):
        raise RequestError('the body must be {"language": "python", "code": "..."}')
    for name in ("language", "code"):
        if not isinstance(fields.get(name), str):
            raise RequestError(f"{name}: must be a string", name)
    if len(fields["code"]) > MAX_CODE_CHARS:
        given = f"{len(fields['code']):,} characters; at most {MAX_CODE_CHARS:,} are coloured"
        raise RequestError(f"code: {given}", "code", status=413)
    if any("\ud800" <= character <= "\udfff" for character in fields["code"]):
        raise RequestError("code: holds half of a character (an unpaired surrogate)", "code")
    return fields["language"], fields["code"]
