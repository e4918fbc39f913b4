"""The manifest of a folder of text: what should lie there, on which side, and whether it still does.

`manifest.json` beside the shards says where they come from (data set, commit, licence) and names every complete shard
with its side, size, SHA-256 and number of documents. It is written whole or not at all, after each shard, so a folder
is always what its manifest says: `dataset.open_corpus` takes the sides from it, and a file that is missing or has
another size is an error, never another split. Sizes are looked at whenever a folder is opened, hashes by `verify`.
"""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_write, printable, reading

NAME = "manifest.json"
FORMAT = 1
SPLITS = ("train", "val", "both")  # both: a lone file, split by document
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Shard:
    """One complete file. rows: its documents."""

    name: str
    split: str
    size: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. asked: how many shards the last download wanted."""

    shards: tuple[Shard, ...]
    dataset: str | None = None
    revision: str | None = None
    licence: str | None = None
    asked: int | None = None

    def names(self, *splits: str) -> list[str]:
        """Names of the files on these sides (all of them if none is given), in order."""
        return [shard.name for shard in self.shards if not splits or shard.split in splits]

    def with_shard(self, shard: Shard) -> "Manifest":
        """The same manifest with one more shard, or a newer one of that name."""
        others = (other for other in self.shards if other.name != shard.name)
        return dataclasses.replace(self, shards=tuple(sorted((*others, shard), key=lambda shard: shard.name)))

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; readers see the old one or this one."""
        fields = dataclasses.asdict(self)
        fields = {"format": FORMAT} | {name: fields[name] for name in sorted(fields, key="shards".__eq__)}
        with atomic_write(folder / NAME) as path:
            path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    def describe(self) -> str:
        """One line: whose shards they are, which is validation, and what is not here yet."""
        count = len(self.shards)
        origin = f"manifest of {self.dataset} at {(self.revision or '')[:12]}" if self.dataset else "by its manifest"
        val = self.names("val", "both")
        shown = val[0] if len(val) == 1 else f"{len(val)} of them"
        part = "" if self.names("val") or not val else "in part "
        missing = (self.asked or 0) - count
        return printable(
            f"{how_many(count)}, {shown} {part}for validation ({origin})"
            + (f"; {missing:,} more were asked for and are not here yet" if missing > 0 else "")
        )

    def repair(self, folder: Path) -> str:
        """What to do about a file that is damaged or missing."""
        if not self.dataset:
            return f"put the file back, or remove {folder / NAME} if the folder is meant to have changed"
        count = max(1, len(self.names("train")), (self.asked or 0) - 1)
        dataset, where = (shlex.quote(printable(text)) for text in (self.dataset, str(folder)))
        return f"python -m nanochat.dataset --dataset={dataset} --data-dir={where} -n {count} fetches it"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where there is none. UserError where it is damaged."""
    path = folder / NAME
    with reading(path):
        if not path.is_file():
            return None
        raw = path.read_bytes()
    try:
        fields = json.loads(raw)
        if fields.pop("format") != FORMAT:
            raise UserError(f"{path}: of another format than {FORMAT}, which is all this version reads")
        shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
        manifest = Manifest(shards=shards, **fields)
        damage = _damage(manifest)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        damage = str(error).splitlines()[0]
    if damage:
        raise UserError(f"{path}: is damaged ({printable(damage)}); remove it and run the download again")
    return manifest


def _damage(manifest: Manifest) -> str | None:
    """What is wrong with the values of a manifest that somebody may have edited, or None."""
    for shard in manifest.shards:
        plain = isinstance(shard.name, str) and shard.name[:1] not in ("", ".") and not set("/\\\0") & set(shard.name)
        numbers = (shard.size, shard.rows)
        if not plain or not all(type(number) is int and number >= 0 for number in numbers):
            return f"an entry that is no shard: {shard!r:.100}"
        if shard.split not in SPLITS or not isinstance(shard.sha256, str):
            return f"{shard.name}: its split must be one of {', '.join(SPLITS)}, its sha256 a text"
    texts = (manifest.dataset, manifest.revision, manifest.licence)
    if not all(text is None or isinstance(text, str) for text in texts):
        return "dataset, revision and licence must be texts"
    if manifest.asked is not None and type(manifest.asked) is not int:
        return "asked must be a number"
    return "a name occurs twice" if len(set(manifest.names())) < len(manifest.shards) else None


# Checks --------------------------------------------------------------------------------------------------------


def size_problem(folder: Path, shard: Shard) -> str | None:
    """Why a file cannot be the shard, by a look at its size; None where it may be."""
    path = folder / shard.name
    with reading(path):
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
    how = "truncated" if size < shard.size else "too long"
    return None if size == shard.size else f"{path}: {how} ({size:,} bytes, must be {shard.size:,})"


def hash_problem(folder: Path, shard: Shard) -> str | None:
    """Why a file is not the shard, by its size and every byte; None where it is."""
    if problem := size_problem(folder, shard):
        return problem
    found = sha256_of(folder / shard.name)
    return (
        None if found == shard.sha256 else f"{folder / shard.name}: corrupt (SHA-256 {found}, must be {shard.sha256})"
    )


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """UserError unless every shard of the manifest lies in the folder in its size, with both sides filled."""
    problems = list(filter(None, (size_problem(folder, shard) for shard in manifest.shards)))
    if problems:
        shown = [*problems[:SHOWN_PROBLEMS], *(["..."] if len(problems) > SHOWN_PROBLEMS else [])]
        raise UserError("\n".join([*shown, manifest.repair(folder)]))
    for side in ("val", "train"):
        if not manifest.names(side, "both"):
            what = "validation shard" if side == "val" else "train shard"
            raise UserError(f"{folder}: the manifest names no complete {what} yet; {manifest.repair(folder)}")


def verify(folder: Path, manifest: Manifest, progress: Callable[[int], None]) -> list[str]:
    """Read every byte of the folder's shards. Returns a line for each that is missing, truncated or corrupt."""
    problems = []
    for done, shard in enumerate(manifest.shards, 1):
        try:
            problems.append(hash_problem(folder, shard))
        except UserError as error:  # a disk that cannot read one file may read the others
            problems.append(str(error))
        progress(done)
    return list(filter(None, problems))


def how_many(shards: int) -> str:
    """`1 shard`, `8 shards`."""
    return f"{shards:,} shard{'s' if shards != 1 else ''}"


def unlisted(manifest: Manifest, files: Iterable[Path]) -> list[str]:
    """Names of the files that the manifest does not know."""
    return sorted({file.name for file in files} - set(manifest.names()))


def shorten(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(map(printable, names[:SHOWN_PROBLEMS]))
    return shown + (f" and {len(names) - SHOWN_PROBLEMS} more" if len(names) > SHOWN_PROBLEMS else "")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def text_groups(path: Path, shown: Path | None = None) -> list[int]:
    """Rows of each row group of a parquet file that has text, from its footer. UserError where it is none, about
    `shown`: the name that the file has for the user."""
    shown = shown or path
    with reading(shown, "", pa.ArrowException), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        group_rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if "text" not in schema.names:
        raise UserError(f"{shown}: no column `text`; its columns are {', '.join(schema.names) or 'none'}")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{shown}: column `text` holds {kind}; it must hold strings")
    if not any(group_rows):
        raise UserError(f"{shown}: holds no rows; remove it or fetch it again")
    return group_rows
