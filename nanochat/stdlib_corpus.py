"""The embedded default text: the library of the Python that runs us, read in place and split into train and validation.

Every Python brings some ten megabytes of good text: the source of its standard library, docstrings included, and the
language topics of `pydoc`. Nothing is imported or executed; files are read, and the table of topics is parsed. Left out
are test suites, bundled wheels, modules that Python itself does not count as library (`sys.stdlib_module_names`), and
tables: files in which one character in 15 is a digit or a backslash (character maps of `encodings`, HTML entities).

A document is one source file or one topic, and what belongs together stays on one side, train or validation:

    1. A package stays whole. `_x`, `_pyx` and `_x_y` go with `x`, the two implementations of `os.path` with `os`, a
       topic whose title begins with a module's name with that module.
    2. Two that share a run of consecutive lines of 50 bytes or more go together, and so on from one to the next.
       Boilerplate does not count towards the 50 bytes: imports, lines without a letter, and lines that stand in four
       or more modules or topics (`return self`, `except OSError:`, licence lines). Without this exception one group
       would hold 95 % of the text; with it, two or three repeated lines of real content still tie two modules.
    3. Groups larger than 3 % of the text are train. The others, in the order of a hash of their names, are validation
       until that side holds 1.1 MB (about a tenth: the library of Python 3.11 is 10.4 MB); the rest is train.

The result is the same in every process, and on every machine that has the same library.
"""

import ast
import hashlib
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from nanochat.common import UserError

STDLIB = "stdlib"  # stands for this text where a path is asked for
BLOCK_DOCUMENTS = 32  # few, so that several ranks get blocks of their own
MIN_RUN_BYTES = 50
BOILERPLATE_OWNERS = 4  # a line in so many modules is boilerplate
VAL_BYTES = 1_100_000
MAX_VAL_FRAC = 0.2  # where parts of the library are missing
MAX_GROUP_FRAC = 0.03  # of a group that may be validation: no one subject fills that side
# By this number json, re, os, random and other modules that people ask about are train in Python 3.11, a fifth of
# validation is topics, and least stands on both sides with another indentation (0.3 kB). Chosen by names and sizes, not
# by what any model or compressor makes of the text.
HASH_SALT = 2
MIN_LIBRARY_BYTES = 2_000_000  # what is less is no library: a Python in a zip file, or with compiled files only
TABLE_FRAC = 1 / 15
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "_bundled", "site-packages", "dist-packages"})
OS_PATH = ("posixpath", "ntpath", "genericpath")
TOPICS_FILE = "pydoc_data/topics.py"
_TRIVIAL = re.compile(r"\s*(?:from \S+ )?import\b|[^a-zA-Z]*$")
_WORD = re.compile(r"(?<![A-Za-z])[a-z]{4,12}(?![A-Za-z])")
PROGRAMS = frozenset({"distutils", "idlelib", "lib2to3", "turtledemo"})  # in the library, but hardly ever imported
TOPIC = "topic "  # begins the name of a topic's document


@dataclass(frozen=True)
class Document:
    """One source file, named like a module (`email.message`), or one topic (`topic assert`)."""

    name: str
    text: str
    owner: str  # the top-level module it follows, or the topic itself


@dataclass(frozen=True)
class Library:
    """The documents of both sides, each in the order of their names, and where they come from, in words."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    source: str

    def __str__(self) -> str:
        train, val = (sum(map(_size, side)) / 1e6 for side in (self.train, self.val))
        return f"{self.source}, split by module ({train:.1f} MB train, {val:.1f} MB val)"


def train_documents() -> tuple[Document, ...]:
    """What may be trained on."""
    return read_library().train


def val_documents() -> tuple[Document, ...]:
    """What is held out."""
    return read_library().val


@cache
def read_library(root: Path | None = None) -> Library:
    """The library of the running Python, or of the folder `root`. Read once per process, in about two seconds.

    Raises UserError where there are no sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    documents = sorted(_read_documents(root), key=lambda document: document.name)
    if sum(map(_size, documents)) < MIN_LIBRARY_BYTES:
        raise UserError(
            f"{root}: this Python ({sys.executable}, {version}) has no sources of its standard library there, which "
            "are the default text; use a Python that has them, or give text of your own with --data-dir"
        )
    val = _choose_val(documents)
    return Library(
        train=tuple(document for document in documents if document.owner not in val),
        val=tuple(document for document in documents if document.owner in val),
        source=f"the standard library of Python {version} in {root}",
    )


class LibrarySource:
    """One side of the library as `dataset` wants it: in blocks of documents, with a stamp of version and content."""

    path = Path(STDLIB)

    def __init__(self, side: str) -> None:
        library = read_library()
        self._texts = [document.text for document in (library.train if side == "train" else library.val)]
        self.num_blocks = -(-len(self._texts) // BLOCK_DOCUMENTS)

    def read(self, block: int) -> list[str]:
        return self._texts[block * BLOCK_DOCUMENTS : (block + 1) * BLOCK_DOCUMENTS]

    def documents(self) -> Iterator[str]:
        return iter(self._texts)

    def stamp(self) -> list[object]:
        content = hashlib.sha256("\0".join(self._texts).encode(errors="surrogatepass")).hexdigest()
        return [STDLIB, sys.version_info[:3], content]


# Reading --------------------------------------------------------------------------------------------------------


def _read_documents(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or not SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
            continue
        text = _read(path)
        if path.relative_to(root).as_posix() == TOPICS_FILE:
            yield from _topics(text)
        elif text and not _is_table(text):
            yield Document(".".join(parts).removesuffix(".__init__"), text, _owner(parts[0]))


def _read(path: Path) -> str:
    """The text of a source file, or "" where it cannot be read as one: a missing part is no reason to stop."""
    try:
        with tokenize.open(path) as file:  # honours an encoding line; newlines become \n
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _topics(source: str) -> Iterator[Document]:
    """The entries of the one dictionary in pydoc_data/topics.py."""
    try:
        table = next((node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)), ast.Dict([], []))
        topics = ast.literal_eval(table)
    except (SyntaxError, ValueError):
        return
    for topic, text in topics.items():
        about = text.strip().partition(" ")[0].strip('"')  # '"pdb" — The Python Debugger'
        is_module = text.strip()[:1] == '"' and about in sys.stdlib_module_names and "—" in text.strip()[:40]
        yield Document(TOPIC + topic, text.strip() + "\n", about if is_module else TOPIC + topic)


def _owner(module: str) -> str:
    """The module that a top-level module goes with: `_pydecimal` with decimal, `_collections_abc` with collections."""
    if module in OS_PATH:
        return "os"
    if not module.startswith("_") or module == "__future__":
        return module
    candidates = (module[1:].removeprefix("py"), module[1:], module[1:].partition("_")[0])
    return next((name for name in candidates if name in sys.stdlib_module_names), module)


def _is_table(text: str) -> bool:
    return sum(map(text.count, "0123456789\\")) > TABLE_FRAC * len(text)


def _size(document: Document) -> int:
    return len(document.text.encode())


# What documents hold --------------------------------------------------------------------------------------------


def words(documents: Iterable[Document]) -> list[str]:
    """The lower-case words of 4 to 12 letters in the texts, also as parts of names like `max_workers`, sorted."""
    return sorted({word for document in documents for word in _WORD.findall(document.text)})


def first_sentences(documents: Iterable[Document]) -> dict[str, str]:
    """What public functions and classes of public modules do: dotted name -> first sentence of the docstring.

    Only sentences of 10 to 100 printable ASCII characters; methods are left out, there are too many alike.
    """
    found: dict[str, str] = {}
    for document in documents:
        module = _public_name(document)
        if module is not None:
            for name, docstring in _docstrings(document.text):
                sentence = _first_sentence(name, docstring)
                if re.fullmatch(r"[A-Za-z][ -~]{9,99}", sentence):
                    found.setdefault(f"{module}.{name}", sentence)
    return found


def _public_name(document: Document) -> str | None:
    """The name under which people import the module: `os.path` for posixpath, `datetime` for _pydatetime."""
    if document.name in OS_PATH:
        return None if document.name == "ntpath" else "os.path"
    name = document.owner if document.name == f"_py{document.owner}" else document.name
    is_private = any(part.startswith("_") for part in name.split(".")) or name.startswith(TOPIC)
    return None if is_private or name.partition(".")[0] in PROGRAMS else name


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the public functions and classes at the top level of a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have escapes such as "\d" that newer Pythons warn of
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError):  # a topic, or code for an older Python
            return
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield node.name, ast.get_docstring(node) or ""


def _first_sentence(name: str, docstring: str) -> str:
    paragraphs = docstring.strip().split("\n\n")
    first = paragraphs[0]
    if first.partition("(")[0] == name:  # a signature: the sentence follows it, after a line end or a blank line
        first = first.partition("\n")[2] or "".join(paragraphs[1:2])
    sentence = re.split(r"(?<=[.!?;])\s", " ".join(first.split()), maxsplit=1)[0].rstrip(".:;, ")
    return sentence + "." if sentence else ""


# Splitting ------------------------------------------------------------------------------------------------------


def _choose_val(documents: Sequence[Document]) -> set[str]:
    """The owners whose documents are validation."""
    sizes: dict[str, int] = defaultdict(int)
    members: dict[str, list[str]] = defaultdict(list)
    group_of = _groups(documents)
    for document in documents:
        sizes[group_of[document.owner]] += _size(document)
    for owner, group in group_of.items():
        members[group].append(owner)
    total = sum(sizes.values())
    wanted = min(VAL_BYTES, MAX_VAL_FRAC * total)
    val: set[str] = set()
    held = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{HASH_SALT} {name}".encode()).digest()):
        if held < wanted and sizes[group] <= MAX_GROUP_FRAC * total:
            val.update(members[group])
            held += sizes[group]
    return val


def _groups(documents: Sequence[Document]) -> dict[str, str]:
    """Owner -> the name of its group, which is the first of the group's owners by name."""
    parent = {document.owner: document.owner for document in documents}

    def top(owner: str) -> str:
        while parent[owner] != owner:
            owner = parent[owner]
        return owner

    for first, *others in shared_runs(documents).values():
        for other in others:
            low, high = sorted((top(first), top(other)))
            parent[high] = low
    return {owner: top(owner) for owner in parent}


def shared_runs(documents: Iterable[Document]) -> dict[tuple[int, ...], list[str]]:
    """The shortest runs of lines of 50 bytes that several owners share, each as line numbers of a common list."""
    numbers: dict[str, int] = {}
    texts = [
        (document.owner, [numbers.setdefault(line, len(numbers)) for line in document.text.split("\n")])
        for document in documents
    ]
    owners: list[set[str]] = [set() for _ in numbers]
    for owner, lines in texts:
        for line in set(lines):
            owners[line].add(owner)
    weights = [
        0 if len(where) >= BOILERPLATE_OWNERS or _TRIVIAL.match(line) else len(line.encode()) + 1
        for line, where in zip(numbers, owners, strict=True)
    ]
    runs: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for owner, lines in texts:
        for stretch in _stretches(lines, owners):
            for run in _shortest_runs(stretch, weights):
                runs[run].add(owner)
    return {run: sorted(where) for run, where in runs.items() if len(where) > 1}


def _stretches(lines: Sequence[int], owners: Sequence[set[str]]) -> Iterator[Sequence[int]]:
    """The parts of a text in which every line has more than one owner: only there can runs be shared."""
    for is_common, stretch in groupby(lines, key=lambda line: len(owners[line]) > 1):
        if is_common:
            yield list(stretch)


def _shortest_runs(lines: Sequence[int], weights: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """From every line that counts, the shortest run that reaches 50 bytes. Any longer shared run contains one."""
    end = held = 0
    for start, line in enumerate(lines):
        while held < MIN_RUN_BYTES and end < len(lines):
            held += weights[lines[end]]
            end += 1
        if held < MIN_RUN_BYTES:
            return
        if weights[line]:
            yield tuple(lines[start:end])
        held -= weights[line]
