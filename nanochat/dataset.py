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

    a folder with a manifest.json     as the manifest says (`manifest`), whatever else lies there
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
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from nanochat.common import UserError, reading, run
from nanochat.manifest import Manifest, check_sizes, read_manifest, shorten, unlisted
from nanochat.sources import FileSource, JsonlSource, ParquetSource, Source, TextSource
from nanochat.stdlib_corpus import STDLIB, LibrarySource, read_library

VAL_ONE_DOCUMENT_IN = 20
VAL_ONE_FILE_IN = 10
KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz")


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
        manifest = read_manifest(path) if path.is_dir() else None
        files = _files_at(path) if manifest is None else text_files_in(path)
    if manifest:
        return _split_by_manifest(path, files, manifest)
    texts = [file for file in files if _kind(file) in (".txt", ".txt.gz")]
    shards = [file for file in files if file not in texts]
    parts = [split(group) for split, group in ((_split_shards, shards), (_split_texts, texts)) if group]
    return _corpus(path, parts, "; ".join(part[2] for part in parts))


def _corpus(path: Path, parts: Sequence["Sides"], rule: str) -> Corpus:
    def side(name: str, sources: Iterable[list[Source]]) -> Split:
        return Split(name, tuple(sorted(chain(*sources), key=lambda source: source.path.name)))

    return Corpus(path, side("train", (part[0] for part in parts)), side("val", (part[1] for part in parts)), rule)


def _files_at(path: Path) -> list[Path]:
    """The files of known kinds at `path`, sorted by name, none of them empty."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give text as {', '.join(KINDS)} or a folder of such files")
    if path.is_dir():
        files = text_files_in(path)
        if not files:
            raise UserError(f"{path}: the folder holds no text; put it there as {', '.join(KINDS)} files")
    elif _kind(path):
        files = [path]
    else:
        raise UserError(f"{path}: not a kind of file that holds text here; allowed are {', '.join(KINDS)}")
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise UserError(f"{empty[0]}: the file is empty (0 bytes); remove it or fetch it again")
    return files


def text_files_in(folder: Path) -> list[Path]:
    """The files of known kinds in a folder, sorted by name; hidden ones are passed over."""
    return sorted(file for file in folder.iterdir() if file.is_file() and _kind(file) and file.name[0] != ".")


def _kind(path: Path) -> str | None:
    """The longest known ending of the file's name."""
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if path.name.lower().endswith(kind)), None)


# The split rules -----------------------------------------------------------------------------------------------

Sides = tuple[list[Source], list[Source], str]  # train, val, the rule in words


def _split_by_manifest(path: Path, files: list[Path], manifest: Manifest) -> Corpus:
    """The sides that the manifest names. Files it does not know are left out and named in the rule: a running download
    has put one there a moment before it writes the manifest, so they are no error."""
    check_sizes(path, manifest)
    left_out = unlisted(manifest, files)
    rule = manifest.describe() + (f"; left out, not in the manifest: {shorten(left_out)}" if left_out else "")
    parts: list[Sides] = []
    for shard in manifest.shards:
        file = path / shard.name
        is_text = _kind(file) in (".txt", ".txt.gz")
        if shard.split == "both":
            parts.append(_split_texts([file]) if is_text else _split_shards([file]))
        else:
            source: list[Source] = [TextSource(file)] if is_text else _shard_sources([file])
            parts.append((source, [], "") if shard.split == "train" else ([], source, ""))
    return _corpus(path, parts, rule)


def _shard_sources(files: list[Path]) -> list[Source]:
    return [ParquetSource(file) if _kind(file) == ".parquet" else JsonlSource(file) for file in files]


def _split_shards(files: list[Path]) -> Sides:
    sources = _shard_sources(files)
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


# The command ---------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> tuple[str, Namespace]:
    from nanochat import download

    return download.parse_command(argv)


def main(argv: Sequence[str] | None = None) -> None:
    from nanochat import download

    download.run_command(*parse_args(argv))


if __name__ == "__main__":
    run(main)
