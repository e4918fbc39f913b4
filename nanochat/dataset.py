"""Text on disk becomes documents, and every document has a side: train or validation.

`open_corpus` takes one file or a folder of files, of three kinds that may be mixed:

    .parquet              one document per row, in the string column `text`
    .jsonl, .jsonl.gz     one document per line, in the field "text"
    .txt, .txt.gz         one document per file
    stdlib                the word in place of a path: the running Python's library with its own split (`stdlib_corpus`)

Files are taken in order of name; hidden files, sub-folders and other kinds (csv, md, ...) are passed over. What can be
checked cheaply (existence, emptiness, parquet footers and columns) is checked at once; the texts are read later, a
block of at most 1,024 documents at a time, and never all together. Texts without a character are left out.

The split depends on what there is (`Corpus.describe()` says which rule was used):

    two or more parquet/jsonl files   the last by name is validation, the others are train
    one parquet/jsonl file            document by document: about one in 20, by a hash of its text, is validation
    two or more txt files             file by file: about one in 10, by a hash of its name, is validation
    one txt file                      its last tenth, from a line start on, is validation

Several files are split by file, so that nothing of one file is on both sides. A lone file cannot be: it is split by
document, because a document is the smallest unit that is never cut. The one exception is a lone txt file, which is a
single document. In a mixed folder each kind follows its own rule. A hash decision looks at nothing but the one text or
name, so adding files never moves a document across, unless a side would stay empty: then the text or name with the
smallest hash goes to validation, or the one with the largest to train.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, open_bytes, reading, run
from nanochat.stdlib_corpus import STDLIB, LibrarySource, read_library

BLOCK_DOCUMENTS = 1024
VAL_ONE_DOCUMENT_IN = 20
VAL_ONE_FILE_IN = 10
KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz")


class Source(Protocol):
    """Documents in blocks, from a file or elsewhere (`stdlib_corpus.LibrarySource`)."""

    path: Path

    @property
    def num_blocks(self) -> int: ...

    def read(self, block: int) -> list[str]: ...

    def documents(self) -> Iterator[str]: ...

    def stamp(self) -> list[object]: ...


class FileSource(ABC):
    """The source that a file is, or a side of one."""

    path: Path

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """How many blocks there are; may take one pass over the file."""

    @abstractmethod
    def read(self, block: int) -> list[str]:
        """The documents of a block, at most 1,024."""

    def documents(self) -> Iterator[str]:
        """All documents in order."""
        return (text for block in range(self.num_blocks) for text in self.read(block))

    def stamp(self) -> list[object]:
        """What tells this file from others."""
        with reading(self.path):
            return [self.path.name, self.path.stat().st_size]


@dataclass(frozen=True)
class Block:
    """At most 1,024 documents that lie together in a file."""

    source: Source
    index: int

    def read(self) -> list[str]:
        return self.source.read(self.index)


@dataclass(frozen=True)
class Split:
    """One side of a corpus."""

    name: str
    sources: tuple[Source, ...]

    def documents(self) -> Iterator[str]:
        """One pass over all documents in file order."""
        for source in self.sources:
            yield from source.documents()

    def blocks(self) -> Sequence[Block]:
        """All blocks in file order. Lines of a jsonl file are counted by one pass over it, the first time."""
        return [Block(source, index) for source in self.sources for index in range(source.num_blocks)]

    def fingerprint(self) -> str:
        """Names one side of one set of files: sha256 over the side and each file's name and size."""
        stamps = [source.stamp() for source in self.sources]
        return hashlib.sha256(json.dumps([self.name, stamps]).encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Train and validation side of what lies at `path`."""

    path: Path
    train: Split
    val: Split
    rule: str

    def describe(self) -> str:
        """One line: where the text is and how it was split."""
        return f"{self.path}: {self.rule}"


def open_corpus(path: Path) -> Corpus:
    """The documents of a file or folder, split as the module docstring says. UserError where something is wrong."""
    if path == Path(STDLIB) and not path.exists():
        train, val = (Split(side, (LibrarySource(side),)) for side in ("train", "val"))
        return Corpus(path, train, val, str(read_library()))
    with reading(path):
        files = _files_at(path)
    texts = [file for file in files if _kind(file) in (".txt", ".txt.gz")]
    shards = [file for file in files if file not in texts]
    parts = [split(group) for split, group in ((_split_shards, shards), (_split_texts, texts)) if group]

    def side(name: str, sources: Iterable[list[Source]]) -> Split:
        return Split(name, tuple(sorted(chain(*sources), key=lambda source: source.path.name)))

    train, val = side("train", (part[0] for part in parts)), side("val", (part[1] for part in parts))
    return Corpus(path, train, val, "; ".join(part[2] for part in parts))


def _files_at(path: Path) -> list[Path]:
    """The files of known kinds at `path`, sorted by name, none of them empty."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give text as {', '.join(KINDS)} or a folder of such files")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) and file.name[0] != ".")
        if not files:
            raise UserError(f"{path}: the folder holds no text; put it there as {', '.join(KINDS)} files")
    elif _kind(path):
        files = [path]
    else:
        raise UserError(f"{path}: not a kind of file that holds text here; allowed are {', '.join(KINDS)}")
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise UserError(f"{empty[0]}: the file is empty (0 bytes); remove it or fetch it again")
    return files


def _kind(path: Path) -> str | None:
    """The longest known ending of the file's name."""
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if path.name.lower().endswith(kind)), None)


# The split rules -----------------------------------------------------------------------------------------------

Sides = tuple[list[Source], list[Source], str]  # train, val, the rule in words


def _split_shards(files: list[Path]) -> Sides:
    sources: list[Source] = [ParquetSource(f) if _kind(f) == ".parquet" else JsonlSource(f) for f in files]
    if len(files) > 1:
        return sources[:-1], sources[-1:], f"{len(files)} shards, the last by name ({files[-1].name}) is validation"
    rule = (
        f"{files[0].name} is one file, so it is split by document: about 1 in {VAL_ONE_DOCUMENT_IN}, by a hash of its "
    )
    rule += "text, is validation"
    return [SideSource(sources[0], is_val=False)], [SideSource(sources[0], is_val=True)], rule


def _split_texts(files: list[Path]) -> Sides:
    if len(files) == 1:
        rule = f"{files[0].name} is one document, so it is cut: its last tenth, from a line start on, is validation"
        return [TextSource(files[0], "train")], [TextSource(files[0], "val")], rule
    by_hash = sorted(files, key=lambda file: _hash(file.name))
    val = {file for file in files if _hash(file.name) % VAL_ONE_FILE_IN == 0} or {by_hash[0]}
    if len(val) == len(files):
        val.remove(by_hash[-1])
    rule = f"about 1 of {VAL_ONE_FILE_IN} txt files, by a hash of its name, is validation ({len(val)} of {len(files)})"
    return [TextSource(file) for file in files if file not in val], [TextSource(file) for file in sorted(val)], rule


def _hash(text: str) -> int:
    """64 bits of sha256. Half surrogates, which JSON can spell, are let through here; the tokenizer replaces them."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


class SideSource(FileSource):
    """The documents of a lone file that are on one side."""

    def __init__(self, source: Source, is_val: bool) -> None:
        self.path = source.path
        self._source = source
        self._is_val = is_val

    @property
    def num_blocks(self) -> int:
        return self._source.num_blocks

    def read(self, block: int) -> list[str]:
        return list(filter(self._is_mine, self._source.read(block)))

    def documents(self) -> Iterator[str]:
        return filter(self._is_mine, self._source.documents())

    def _is_mine(self, text: str) -> bool:
        number = _hash(text)
        to_train, to_val = self._moved
        return (number == to_val or (number % VAL_ONE_DOCUMENT_IN == 0 and number != to_train)) == self._is_val

    @cached_property
    def _moved(self) -> tuple[int | None, int | None]:
        """Hashes moved (to train, to validation) so that no side is empty: normally none, known after a few texts."""
        numbers: set[int] = set()
        sides: set[bool] = set()
        for number in map(_hash, self._source.documents()):
            numbers.add(number)
            sides.add(number % VAL_ONE_DOCUMENT_IN == 0)
            if len(sides) == 2:
                return None, None
        if len(numbers) < 2:
            raise UserError(f"{self.path}: holds {len(numbers)} different documents; a train and a val side need 2")
        return (max(numbers), None) if True in sides else (None, min(numbers))


# The kinds of file ---------------------------------------------------------------------------------------------


class ParquetSource(FileSource):
    """A parquet file. A block is a row group, or 1,024 rows of a larger one.

    A slice of a larger row group is reached by decoding what lies before it: write groups of at most 1,024 rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path, "", pa.ArrowException), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            group_rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if "text" not in schema.names:
            raise UserError(f"{path}: no column `text`; its columns are {', '.join(schema.names) or 'none'}")
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column `text` holds {kind}; it must hold strings")
        if not any(group_rows):
            raise UserError(f"{path}: holds no rows; remove it or fetch it again")
        self._blocks = [  # row group, first row in it, first row in the file
            (group, start, sum(group_rows[:group]) + start)
            for group, rows in enumerate(group_rows)
            for start in range(0, rows, BLOCK_DOCUMENTS)
        ]

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def read(self, block: int) -> list[str]:
        group, start, first_row = self._blocks[block]
        where = f", row group {group}"
        with reading(self.path, where, pa.ArrowException), pq.ParquetFile(self.path) as file:
            batches = file.iter_batches(batch_size=BLOCK_DOCUMENTS, row_groups=[group], columns=["text"])
            values = islice(chain.from_iterable(batch.column(0) for batch in batches), start, start + BLOCK_DOCUMENTS)
            texts = [self._text(value, first_row + i) for i, value in enumerate(values)]
        return [text for text in texts if text]

    def _text(self, value: pa.Scalar, row: int) -> str:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, row {row} (from 0): the text is not UTF-8 (byte {error.start})") from error
        if text is None:
            raise UserError(f"{self.path}, row {row} (from 0): the text is null; every row needs a string")
        return str(text)


class JsonlSource(FileSource):
    """Lines of JSON objects. A block is 1,024 lines; blank lines do not count.

    The first use counts the lines and remembers where each block starts. In a .gz file a block is reached by
    unpacking what lies before it, so large files are better left unpacked or written as parquet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def num_blocks(self) -> int:
        return len(self._starts)

    @cached_property
    def _starts(self) -> list[tuple[int, int]]:
        """(byte offset, line number from 1) of each block's first line."""
        starts: list[tuple[int, int]] = []
        count = 0
        with open_bytes(self.path) as file:
            offset = file.tell()
            for number, line in enumerate(file, 1):
                if line.strip():
                    if count % BLOCK_DOCUMENTS == 0:
                        starts.append((offset, number))
                    count += 1
                offset += len(line)
        if not count:
            raise UserError(f"{self.path}: holds no lines with text; remove it or fetch it again")
        return starts

    def read(self, block: int) -> list[str]:
        offset, first_line = self._starts[block]
        with open_bytes(self.path) as file:
            file.seek(offset)
            return [text for text in islice(self._texts(file, first_line), BLOCK_DOCUMENTS) if text]

    def documents(self) -> Iterator[str]:
        with open_bytes(self.path) as file:
            yield from filter(None, self._texts(file, 1))

    def _texts(self, file: Iterable[bytes], first_line: int) -> Iterator[str]:
        for number, line in enumerate(file, first_line):
            if line.strip():
                yield self._parse(line, f"{self.path}, line {number}")

    def _parse(self, line: bytes, where: str) -> str:
        try:
            document = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line); re-encode the file") from error
        except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
            raise UserError(f'{where}: not JSON ({error}); each line must be like {{"text": "..."}}') from error
        if not isinstance(document, dict) or "text" not in document:
            found = f"its fields are {', '.join(document)}" if isinstance(document, dict) else f"it is {document!r:.40}"
            raise UserError(f'{where}: no field "text"; {found}; each line must be like {{"text": "..."}}')
        text = document["text"]
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            raise UserError(f"{where}: the text is {kind}; it must be a string")
        return text


class TextSource(FileSource):
    """A txt file: one document, or one side of it."""

    num_blocks = 1

    def __init__(self, path: Path, side: str | None = None) -> None:
        self.path = path
        self._side = side

    def read(self, block: int) -> list[str]:
        try:
            with open_bytes(self.path) as file:
                text = file.read().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 (byte {error.start}); re-encode the file") from error
        if not text:
            raise UserError(f"{self.path}: holds no text; remove it or fetch it again")
        cut = _nine_tenths(text)
        part = {None: text, "train": text[:cut], "val": text[cut:]}[self._side]
        if not part:
            raise UserError(f"{self.path}: {len(text)} character is too short to be split; give more text")
        return [part]


def _nine_tenths(text: str) -> int:
    """Where the last tenth starts: at the next line start, else at the line start before, else right there."""
    mark = len(text) * 9 // 10
    newlines = text.find("\n", max(0, mark - 1), len(text) - 1), text.rfind("\n", 0, mark)
    return next((newline + 1 for newline in newlines if newline >= 0), mark)


def main() -> None:
    raise UserError(
        "downloading text is not built in yet; give a file or folder of your own with --data-dir, or stdlib"
    )


if __name__ == "__main__":
    run(main)
