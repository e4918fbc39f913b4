"""Repackage text into shards for training: shuffled, without exact duplicates, in row groups, with a manifest.

    python -m scripts.repackage --data-dir=FOLDER --out=SHARDS --licence=CC-BY-4.0
    python -m scripts.base_train --data-dir=SHARDS

Reads whatever --data-dir can be (parquet, jsonl, txt, a folder of them, stdlib), both of its sides, and writes
shard_00000.parquet, shard_00001.parquet, ... The same text, seed and sizes give the same bytes. A shard is closed once
it has --shard-chars characters and a whole number of row groups. The last shard is validation: what is left after the
last full shard if that fills a row group, else the last full shard with the rest added to it. Text for fewer than two
shards is cut into one of each, one document in 20 for validation. Every different document is in exactly one place.

Two passes: the first spreads documents at random over 128 files on the disk, the second shuffles each of them in
memory. Memory holds about 100 bytes per document (to know duplicates by), one shard and 1/128 of the text, all of it
in Python strings; the disk beside --out holds the text once more, uncompressed. --out appears complete or not at all.
"""

import hashlib
import os
import random
import shutil
import struct
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from nanochat import cli
from nanochat.common import UserError, check_writable, print0, show_progress
from nanochat.dataset import VAL_ONE_DOCUMENT_IN, open_corpus
from nanochat.manifest import NAME, Manifest, Shard, read_manifest, sha256_of, text_groups
from nanochat.sources import BLOCK_DOCUMENTS, ParquetSource
from nanochat.tokenizer import replace_surrogates

BUCKETS = 128  # below the 256 open files that some systems allow
LENGTH = struct.Struct("<I")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    parser.flag("--out", cli.some_text, None, "folder to write")
    parser.flag("--shard-chars", cli.positive_int, 250_000_000, "characters of a shard, at least")
    parser.flag("--row-group", cli.positive_int, BLOCK_DOCUMENTS, "documents of a row group")
    parser.flag("--licence", str, "", "licence of the text, for the manifest")
    parser.flag("--seed", cli.seed, 42, "seed of the shuffle")
    parser.switch("--overwrite", "replace an earlier folder of shards")
    parser.check(lambda args: None if args.out else "--out: needed, the folder to write the shards to")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    source, out = cli.data_folder(args), Path(os.path.realpath(args.out))  # what a link leads to is replaced
    corpus = open_corpus(source)
    check_target(out, source, args.overwrite)
    print0(f"reading {corpus.describe()}")
    staging = out.with_name(f".{out.name}.repackage")
    try:
        remove(staging)  # what a killed process has left
        (staging / "buckets").mkdir(parents=True)
        documents = chain(corpus.train.documents(), corpus.val.documents())
        kept, dropped, mended = spread(documents, staging / "buckets", args.seed)
        if kept < 2:
            raise UserError(f"{source}: holds {kept} different documents; a train and a validation shard need 2")
        manifest = write_shards(shuffled(staging / "buckets", args.seed), staging, args)
        remove(staging / "buckets")
        manifest.write(staging)
        remove(out)
        staging.rename(out)
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error.strerror or error}); free some space") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print0(f"wrote {out}: {manifest.describe()}")
    print0(f"  {kept:,} documents; {dropped:,} exact duplicates were dropped")
    if mended:
        print0(f"  {mended:,} documents had half surrogates, which became U+FFFD")


def check_target(out: Path, source: Path, overwrite: bool) -> None:
    """UserError where something would be lost that is not an earlier folder of shards."""
    check_writable(out / NAME)
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"--out={out}: holds the text that is read; choose another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or read_manifest(out) is None:
        raise UserError(f"--out={out}: is there and has no {NAME}, so it is not replaced; choose another folder")
    if not overwrite:
        raise UserError(f"--out={out}: holds shards already; give --overwrite to replace them, or another folder")


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# The shuffle ---------------------------------------------------------------------------------------------------


def spread(documents: Iterable[str], folder: Path, seed: int) -> tuple[int, int, int]:
    """Write every document once, to a random bucket. Returns how many were kept, dropped as duplicates, and mended:
    half surrogates, which JSON can spell and parquet cannot hold, become U+FFFD as the tokenizer has it."""
    rng, seen, total, mended = random.Random(seed), set[bytes](), 0, 0
    with ExitStack() as stack:
        buckets = [stack.enter_context((folder / f"{i:03}").open("wb")) for i in range(BUCKETS)]
        for total, text in enumerate(documents, 1):
            clean = replace_surrogates(text)
            mended += clean != text
            raw = clean.encode()
            digest = hashlib.sha256(raw).digest()[:16]
            if digest not in seen:
                seen.add(digest)
                buckets[rng.randrange(BUCKETS)].write(LENGTH.pack(len(raw)) + raw)
            if total % 1_000_000 == 0:
                print0(f"  read {total:,} documents")
    return len(seen), total - len(seen), mended


def shuffled(folder: Path, seed: int) -> Iterator[str]:
    """All documents of the buckets, each bucket in a random order: together, every order is equally likely."""
    rng = random.Random(seed + 1)
    for index in range(BUCKETS):
        texts = list(read_bucket((folder / f"{index:03}").read_bytes()))
        rng.shuffle(texts)
        yield from texts
        show_progress("repackaged", index + 1, BUCKETS)


def read_bucket(raw: bytes) -> Iterator[str]:
    start = 0
    while start < len(raw):
        (length,) = LENGTH.unpack_from(raw, start)
        start += LENGTH.size + length
        yield raw[start - length : start].decode()


# The shards ----------------------------------------------------------------------------------------------------


def write_shards(documents: Iterator[str], folder: Path, args: Namespace) -> Manifest:
    """Full shards as they come; then what is left becomes validation, as the module docstring says."""
    names: list[str] = []
    texts: list[str] = []
    chars = 0

    def close(part: list[str]) -> None:
        names.append(f"shard_{len(names):05}.parquet")
        write_parquet(folder / names[-1], part, args.row_group)

    for text in documents:
        texts.append(text)
        chars += len(text)
        if chars >= args.shard_chars and len(texts) % args.row_group == 0:
            close(texts)
            texts, chars = [], 0
    if names and (len(names) < 2 or texts) and len(texts) < args.row_group:
        texts = [*ParquetSource(folder / names.pop()).documents(), *texts]  # the rest is too small for a shard
    if not names:
        num_val = max(1, len(texts) // VAL_ONE_DOCUMENT_IN)
        close(texts[:-num_val])
        texts = texts[-num_val:]
    if texts:
        close(texts)
    return Manifest(
        tuple(describe(folder / name, "val" if name == names[-1] else "train") for name in names),
        licence=args.licence or None,
    )


def write_parquet(path: Path, texts: list[str], row_group: int) -> None:
    """One document per row; zstd, without the dictionary and statistics that only queries need."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string())])
    options = {"compression": "zstd", "compression_level": 3, "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for start in range(0, len(texts), row_group):
            group = pa.array(texts[start : start + row_group], pa.string())
            writer.write_table(pa.table([group], schema), row_group_size=row_group)


def describe(path: Path, split: str) -> Shard:
    return Shard(path.name, split, path.stat().st_size, sha256_of(path), sum(text_groups(path)))


if __name__ == "__main__":
    cli.run(main)
