"""The kinds of file that hold text: parquet, jsonl, txt. Each gives its documents in blocks of at most 1,024.

Opening one is cheap: existence, parquet footer and columns. The texts are read later, a block at a time. Texts without
a character are left out. Whatever is wrong with a file is a UserError that names it, and the row or line.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, open_bytes, reading
from nanochat.manifest import text_groups

BLOCK_DOCUMENTS = 1024


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


class ParquetSource(FileSource):
    """A parquet file. A block is a row group, or 1,024 rows of a larger one.

    A slice of a larger row group is reached by decoding what lies before it: write groups of at most 1,024 rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        group_rows = text_groups(path)
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
