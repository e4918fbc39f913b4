"""Shards of a data set in a folder, all of one commit, every one proved complete, and a manifest that says so.

    python -m nanochat.dataset -n 8                    8 train shards of ClimbMix, and its validation shard
    python -m nanochat.dataset --depth=24              as many as a run of this depth reads once
    python -m nanochat.dataset --dataset=fineweb-edu --tokens=2e9
    python -m nanochat.dataset verify                  read every byte again and compare it with the manifest
    python -m nanochat.dataset verify --data-dir=FOLDER --write     make a manifest for text of your own

The validation shard is the last of the data set by name, and comes first. The manifest is written after every shard,
so that an interrupted download goes on: run the same command again, or with a larger -n. Shards that the manifest knows
are skipped by their size. HF_ENDPOINT selects a mirror of the hub. docs/data.md says what happens to which fault.
"""

import math
import re
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub.utils import disable_progress_bars

from nanochat import cli, scaling
from nanochat.common import UserError, base_dir, check_writable, print0, printable, show_progress
from nanochat.dataset import open_corpus, text_files_in
from nanochat.hub import STAGING, DiskFull, Hub, Listing, RemoteShard, may_be_here, sorted_errors
from nanochat.manifest import (
    NAME,
    Manifest,
    Shard,
    how_many,
    read_manifest,
    sha256_of,
    shorten,
    size_problem,
    unlisted,
    verify,
)

LOCK = ".lock"
CHARS_PER_TOKEN = 4.8  # of a vocabulary of 32,768 on web text (pretraining spec 12.30)
CHARS_PER_SHARD = 250e6
CHARS_PER_BYTE = 2.5  # of zstd parquet, where nothing is known about the shards
PADDING = 0.05  # texts differ: plan this much more than the horizon, and at least PADDING_SHARDS
PADDING_SHARDS = 2
REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """Where a data set lies on the hub and, below the base folder, here; None: its characters per shard are unknown."""

    repo: str
    folder: str
    chars_per_shard: float | None = CHARS_PER_SHARD


KNOWN = {
    "climbmix": Origin("karpathy/climbmix-400b-shuffle", "base_data_climbmix"),
    "fineweb-edu": Origin("karpathy/fineweb-edu-100b-shuffle", "base_data"),
}


def origin_of(name: str) -> Origin:
    """The data set of a short name or an owner/name."""
    by_repo = {origin.repo: origin for origin in KNOWN.values()}
    return KNOWN.get(name) or by_repo.get(name) or Origin(name, f"base_data_{name.replace('/', '--')}", None)


def dataset_name(text: str) -> str:
    """A short name, or owner/name."""
    if text not in KNOWN and not REPO.fullmatch(text):
        raise ValueError(f"must be {', '.join(KNOWN)} or the owner/name of a data set on the hub")
    return text


# The command ---------------------------------------------------------------------------------------------------


def parse_command(argv: Sequence[str] | None = None) -> tuple[str, Namespace]:
    """The action and its flags, for `python -m nanochat.dataset`."""
    words = list(sys.argv[1:] if argv is None else argv)
    action = words.pop(0) if words and not words[0].startswith("-") else "download"
    if action not in ("download", "verify"):
        raise UserError(f"{printable(action)}: choose download or verify")
    parser = cli.Parser(__doc__)
    names = f"{', '.join(KNOWN)}, or owner/name: any data set of parquet files on the hub"
    parser.flag("--dataset", dataset_name, "climbmix", names, metavar="NAME")
    folder = "; ".join(f"<base>/{origin.folder}" for origin in KNOWN.values())
    parser.flag("--data-dir", str, "", f"where the shards lie; empty: by the data set, {folder}")
    if action == "verify":
        parser.switch("--write", "make the manifest of a folder that has none, from the files as they are")
        return action, parser.parse(words)
    parser.flag(
        "--num-files", cli.unless_minus_one(cli.non_negative_int), None, "train shards; -1, or nothing: all", "-n"
    )
    parser.flag("--tokens", cli.number_between(1, 1e15), None, "as many shards as this many tokens of training need")
    parser.flag("--depth", cli.depth, None, "as many shards as training this depth needs")
    ratio = f"tokens per scaling parameter, with --depth; else {scaling.DEFAULT_RATIO:g}"
    parser.flag("--target-param-data-ratio", cli.unless_minus_one(cli.number_between(1e-3, 1e6)), None, ratio)
    chars = f"of the tokenizer, with --tokens or --depth; else {CHARS_PER_TOKEN}"
    parser.flag("--chars-per-token", cli.positive_float, None, chars)
    parser.flag("--revision", cli.some_text, None, "commit or branch; else the folder's commit, else that of main now")
    parser.flag("--num-workers", cli.number_between(1, 64, whole=True), 4, "shards at a time", "-w")
    parser.switch("--offline", "never use the network: a download then refuses")
    parser.check(lambda args: cli.at_most_one(args, ("num_files", "tokens", "depth")))
    parser.check(_plan_needs_horizon)
    return action, parser.parse(words)


def _plan_needs_horizon(args: Namespace) -> str | None:
    if args.target_param_data_ratio is not None and args.depth is None:
        return "--target-param-data-ratio: needs --depth, whose parameters it counts by"
    alone = args.chars_per_token is not None and args.depth is None and args.tokens is None
    return "--chars-per-token: needs --tokens or --depth, to count shards by" if alone else None


def run_command(action: str, args: Namespace) -> None:
    """Do what `parse_command` has read."""
    origin = origin_of(args.dataset)
    folder = Path(args.data_dir) if args.data_dir else base_dir() / origin.folder
    if action == "verify":
        verify_folder(folder, args.write)
        return
    if args.offline:
        raise UserError(
            "--offline: a download needs the network; leave it out, or train on text of your own with --data-dir"
        )
    disable_progress_bars()
    tokens = tokens_of_depth(args.depth, args.target_param_data_ratio) if args.depth else args.tokens
    if args.num_files is not None:
        wish = Wish(args.num_files)
    else:
        wish = Wish(None, tokens and tokens * (args.chars_per_token or CHARS_PER_TOKEN), origin.chars_per_shard)
    if tokens:
        cli.report({"tokens": (f"{tokens:,.0f}", args.tokens is not None)})
    download(origin.repo, folder, wish, args.revision, args.num_workers)


# How many shards -----------------------------------------------------------------------------------------------


def tokens_of_depth(depth: int, ratio: float | None) -> float:
    """Tokens that a run of this depth is trained on by default."""
    from nanochat.model.gpt import scaling_parameters  # needs torch, which takes seconds

    return (ratio or scaling.DEFAULT_RATIO) * scaling_parameters(scaling.model_config(depth))


@dataclass(frozen=True)
class Wish:
    """How many train shards are wanted: a number, or what holds so many characters, or all of them."""

    num_train: int | None = None
    chars: float | None = None
    chars_per_shard: float | None = None

    def train_shards(self, listing: Listing) -> tuple[RemoteShard, ...]:
        """The first shards of the listing, as many as are wanted. Says so where there are fewer."""
        *train, _ = listing.shards
        count = self.num_train
        if self.chars:
            each = self.chars_per_shard or CHARS_PER_BYTE * sum(s.size for s in train) / len(train)
            count = shards_for(self.chars, each)
        if count is not None:
            more = "text would be read more than once" if self.chars else "all of them are taken"
            short = f"; the data set has {len(train):,}, so {more}" if count > len(train) else ""
            cli.report({"train shards": (f"{count:,}{short}", not self.chars)})
        return tuple(train[:count])


def shards_for(chars: float, chars_per_shard: float) -> int:
    """Shards that a run reads no more than once: our packer drops no text, so nothing is added for that."""
    count = math.ceil(chars / chars_per_shard)
    return count + max(PADDING_SHARDS, math.ceil(PADDING * count))


# Download ------------------------------------------------------------------------------------------------------


def download(
    repo: str,
    folder: Path,
    wish: Wish,
    revision: str | None = None,
    num_workers: int = 4,
    hub: Hub | None = None,
) -> Manifest:
    """Fill the folder with the validation shard and the wished train shards. UserError names every shard that failed;
    those that are complete stay, and are in the manifest."""
    hub = hub or Hub()
    hub.stop.clear()
    earlier = _own_manifest(folder, repo)
    pinned = earlier.revision if earlier else None
    listing = hub.list_shards(repo, revision or pinned or "main")
    if pinned and listing.commit != pinned:
        raise UserError(
            f"{folder}: holds shards of commit {pinned}, and --revision={printable(str(revision))} is "
            f"{listing.commit}; choose another --data-dir for it"
        )
    check_writable(folder / NAME)
    train = wish.train_shards(listing)
    with sorted_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        return _fill(folder, listing, train, num_workers, hub)


def _own_manifest(folder: Path, repo: str) -> Manifest | None:
    manifest = read_manifest(folder)
    if manifest and manifest.dataset != repo:
        whose = f"shards of {manifest.dataset}" if manifest.dataset else "text of your own"
        raise UserError(f"{folder}: holds {whose}, by its manifest; choose another --data-dir for {repo}")
    return manifest


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other download fills the folder. The lock of a process that was killed is free."""
    lock = FileLock(folder / LOCK)
    with sorted_errors(str(folder / LOCK)):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print0(f"{folder}: another download is filling it; waiting for it to end")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fill(folder: Path, listing: Listing, train: Sequence[RemoteShard], num_workers: int, hub: Hub) -> Manifest:
    """Fetch what is missing. What the manifest names already is wanted too: a download never shrinks a folder."""
    manifest = _start(folder, listing)
    val = listing.shards[-1]
    names = {shard.name for shard in train} | set(manifest.names())
    wanted = [val, *(shard for shard in listing.shards[:-1] if shard.name in names)]
    known = {shard.name: shard for shard in manifest.shards}
    missing = [shard for shard in wanted if shard.name not in known or size_problem(folder, known[shard.name])]
    manifest = replace(manifest, asked=len(wanted))
    manifest.write(folder)
    print0(f"{folder}: {len(wanted) - len(missing):,} of {len(wanted):,} shards are here, of {listing.repo}")
    print0(f"  at commit {listing.commit}, validation is {val.name}")
    if missing:
        _check_space(folder, missing)
        print0(f"  {how_many(len(missing))} to fetch, {sum(shard.size for shard in missing) / 1e9:,.2f} GB")
        manifest = _fetch_all(folder, listing, missing, manifest, num_workers, hub)
    print0(f"{folder}: complete, {how_many(len(manifest.shards))}")
    return manifest


def _start(folder: Path, listing: Listing) -> Manifest:
    """The folder's manifest, or a first one that pins the commit."""
    manifest = _own_manifest(folder, listing.repo)  # again: another process may have been here meanwhile
    if manifest and manifest.revision != listing.commit:
        raise UserError(f"{folder}: another download has just started it at commit {manifest.revision}; run again")
    if manifest is None:
        manifest = Manifest((), listing.repo, listing.commit, listing.licence)
        known = {shard.name for shard in listing.shards}
        if strange := [file.name for file in text_files_in(folder) if file.name not in known]:
            raise UserError(f"{folder}: holds other text ({shorten(strange)}); choose an empty --data-dir")
    return manifest


def _check_space(folder: Path, missing: Sequence[RemoteShard]) -> None:
    to_fetch = [shard for shard in missing if not may_be_here(folder, shard)]
    needed, free = sum(shard.size for shard in to_fetch), shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(
            f"{folder}: {len(to_fetch):,} shards need {needed / 1e9:,.2f} GB, the disk has {free / 1e9:,.2f} GB free; "
            "ask for fewer with -n, free some space, or choose another folder with --data-dir"
        )


def _fetch_all(
    folder: Path, listing: Listing, missing: Sequence[RemoteShard], manifest: Manifest, num_workers: int, hub: Hub
) -> Manifest:
    """Fetch shards with a few threads; this one alone writes the manifest, after each."""
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # what a killed process has left
    with sorted_errors(str(staging)):
        staging.mkdir()
    failures: dict[str, str] = {}
    full: DiskFull | None = None
    try:
        jobs = hub.start(listing, missing, folder, num_workers)
        for done, job in enumerate(as_completed(jobs), 1):
            try:
                shard = job.result()
            except UserError as error:
                if isinstance(error, DiskFull) and not full:
                    full = error
                    hub.stop.set()  # the others are not tried; those that lie in the folder already are still noted
                failures[jobs[job].name] = str(error)
                if not full:
                    print0(f"[{done}/{len(jobs)}] {error}")
                continue
            manifest = manifest.with_shard(shard)
            manifest.write(folder)
            print0(f"[{done}/{len(jobs)}] {shard.name}  {shard.size / 1e6:,.1f} MB, {shard.rows:,} documents")
    finally:
        hub.stop.set()
        shutil.rmtree(staging, ignore_errors=True)
    if full:
        raise full
    if failures:
        told = "\n".join(failures[name] for name in sorted(failures))
        raise UserError(
            f"{folder}: {len(failures):,} of {len(jobs):,} shards failed:\n{told}\n"
            "what is complete stays; run the same command again to fetch the rest"
        )
    return manifest


# Verify --------------------------------------------------------------------------------------------------------


def verify_folder(folder: Path, write: bool) -> None:
    """Compare every byte in the folder with its manifest, or make the manifest of a folder that has none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; download into it first, or give another --data-dir")
    manifest = read_manifest(folder)
    if write:
        if manifest:
            raise UserError(
                f"{folder / NAME}: is there already; remove it first if the folder is meant to have changed"
            )
        manifest = describe_own(folder)
        manifest.write(folder)
        print0(f"wrote {folder / NAME}: {manifest.describe()}")
        return
    if manifest is None:
        raise UserError(f"{folder}: has no {NAME} to compare with; --write makes one from the files as they are")
    count = len(manifest.shards)
    problems = verify(folder, manifest, lambda done: show_progress("verified", done, count))
    if left_out := unlisted(manifest, text_files_in(folder)):
        print0(f"note: not in the manifest, and left out of training: {shorten(left_out)}")
    if problems:
        summary = f"{folder}: {len(problems):,} of {count:,} shards are not what the manifest says:"
        advice = f"remove what is corrupt; then {manifest.repair(folder)}"
        raise UserError("\n".join([summary, *problems, advice]))
    rows = sum(shard.rows for shard in manifest.shards)
    print0(f"{folder}: every byte is as it was; {manifest.describe()}; {rows:,} documents")


def describe_own(folder: Path) -> Manifest:
    """The manifest of text of one's own, with the sides it has now. Reads everything once."""
    corpus = open_corpus(folder)
    rows: Counter[str] = Counter()
    sides: dict[str, set[str]] = {}
    for split in (corpus.train, corpus.val):
        for source in split.sources:
            rows[source.path.name] += sum(1 for _ in source.documents())
            sides.setdefault(source.path.name, set()).add(split.name)
    files = [
        Shard(
            name,
            "both" if len(found) == 2 else next(iter(found)),
            (folder / name).stat().st_size,
            sha256_of(folder / name),
            rows[name],
        )
        for name, found in sorted(sides.items())
    ]
    return Manifest(tuple(files))
