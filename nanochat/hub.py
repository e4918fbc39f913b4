"""A data set on the hub: what it lists at a commit, and one shard of it, complete and right or not at all.

`huggingface_hub` talks to the hub (HF_ENDPOINT selects a mirror, HF_TOKEN who we are). This module decides what its
answers are worth. What may pass (429, 5xx, lost connections, short or wrong bytes) is tried again, after longer and
longer waits or as long as the hub asks for; what would fail the same way again (no such data set, a full disk) is told
at once. A shard is fetched into a hidden folder, compared with the size and SHA-256 that the hub lists, opened as
parquet, synced, and only then renamed into place.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nanochat.common import UserError, print0, printable, sync_file
from nanochat.manifest import Shard, sha256_of, shorten, text_groups

STAGING = ".download"
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
PASSING_CODES = (408, 425, 429)  # and all from 500 on
T = TypeVar("T")


# Trying again --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backoff:
    """How often something is tried, and how long to wait in between: 1, 2, 4, ... s, or longer where the hub asks."""

    attempts: int = 6
    first_s: float = 1.0
    longest_s: float = 60.0

    def wait_s(self, attempt: int, asked_s: float) -> float:
        """Seconds to wait after this attempt, counted from 1."""
        return max(asked_s, min(self.longest_s, self.first_s * 2 ** (attempt - 1)))


class Passing(Exception):
    """What may be gone at the next attempt. retry_after_s: what the hub asked for."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(printable(reason))
        self.retry_after_s = retry_after_s


class DiskFull(UserError):
    """No shard can be stored any more, so the others are not even tried."""


@contextmanager
def sorted_errors(what: str) -> Iterator[None]:
    """Turn what fails in the block into `Passing`, or into a UserError where another attempt would fail the same."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError, json.JSONDecodeError, RuntimeError) as error:
        raise _sort(what, error) from error  # RuntimeError: hf_xet's


def _sort(what: str, error: BaseException) -> Exception:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:  # wraps whatever failed when it asked the hub
        return _sort(what, error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{what}: the network may not be used (HF_HUB_OFFLINE); unset it, or use text of your own")
    if isinstance(error, GatedRepoError):
        return UserError(f"{what}: the data set asks for an agreement; accept it on its page and set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{what}: no such data set on the hub, or a private one; check the name, or set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{what}: the hub has no such commit or branch; check --revision, or use a new --data-dir")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return UserError(f"{what}: the hub does not have it (404)")
    if isinstance(error, HFValidationError):
        return UserError(f"{what}: {printable(str(error))}")
    if isinstance(error, HfHubHTTPError):
        return _sort_answer(what, error)
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return DiskFull(
            f"{what}: cannot be stored ({error_text(error)}); free some space and run the same command again"
        )
    if isinstance(error, OSError) and number is not None and not isinstance(error, (ConnectionError, TimeoutError)):
        return UserError(f"{what}: {error.strerror}; choose another folder with --data-dir")
    return Passing(error_text(error))


def error_text(error: BaseException) -> str:
    """The first line of what an error says."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0])


def _sort_answer(what: str, error: HfHubHTTPError) -> Exception:
    code = error.response.status_code
    if code not in PASSING_CODES and code < 500:
        return UserError(f"{what}: the hub answers {code}; check HF_ENDPOINT and HF_TOKEN")
    asked = error.response.headers.get("Retry-After", "")
    return Passing(f"the hub answers {code}", float(asked) if asked.isdecimal() else 0.0)


# The data set on the hub ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteShard:
    """A shard as the hub lists it. name: its name here. sha256: None where the hub keeps no hash of it."""

    path: str
    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The parquet shards of a data set at one commit, sorted by name; the last is validation."""

    repo: str
    commit: str
    licence: str | None
    shards: tuple[RemoteShard, ...]


@dataclass
class Hub:
    """A hub, how patient we are with it, and whether somebody said stop."""

    endpoint: str | None = None
    backoff: Backoff = Backoff()
    stop: threading.Event = field(default_factory=threading.Event)

    def retry(self, what: str, attempt: Callable[[], T]) -> T:
        """The outcome of `attempt`, tried again while it fails with `Passing`; then a UserError."""
        for number in range(1, self.backoff.attempts + 1):
            self._go_on(what)
            try:
                with sorted_errors(what):
                    return attempt()
            except Passing as error:
                reason, wait_s = error, self.backoff.wait_s(number, error.retry_after_s)
            if number < self.backoff.attempts:
                print0(f"{what}: {reason}; attempt {number + 1} of {self.backoff.attempts} in {wait_s:g} s")
                self.stop.wait(wait_s)
        where = self.endpoint or constants.ENDPOINT
        raise UserError(
            f"{what}: {reason}, {self.backoff.attempts} times at {where}; check the network, HF_ENDPOINT if it is set, "
            "or try again later"
        )

    def _go_on(self, what: str) -> None:
        if self.stop.is_set():
            raise UserError(f"{what}: stopped")

    def list_shards(self, repo: str, revision: str) -> Listing:
        """What the data set holds at a commit or branch."""
        api = HfApi(endpoint=self.endpoint)
        where = f"{repo} at {revision}"
        try:
            info = self.retry(where, lambda: api.dataset_info(repo, revision=revision, timeout=30))
            commit = str(info.sha)
            files = self.retry(
                where,
                lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")),
            )
            card: Any = info.card_data or {}
            shards = sorted(map(_remote_shard, filter(_is_shard, files)), key=lambda shard: shard.name)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: the answer is not that of a hub ({error!r:.80}); check HF_ENDPOINT") from error
        if strange := [shard.path for shard in shards if not _stays_inside(shard.path)]:
            raise UserError(f"{where}: lists {shorten(strange)}, which no folder can hold; choose another data set")
        if len(shards) < 2:
            raise UserError(f"{where}: holds {len(shards)} parquet files; needed are 2, train and validation")
        if twice := [a.path for a, b in pairwise(shards) if a.name == b.name]:
            raise UserError(f"{where}: {shorten(twice)} would be the same file here; choose another data set")
        licence = card.get("license")
        return Listing(repo, commit, str(licence) if licence else None, tuple(shards))

    def start(
        self, listing: Listing, shards: Sequence[RemoteShard], folder: Path, num_threads: int
    ) -> dict["Future[Shard]", RemoteShard]:
        """Fetch shards, in this order, with a few threads; which future brings which shard.

        They are daemons, unlike a ThreadPoolExecutor's: Ctrl-C ends the process at once, not after 100 MB more of each.
        """
        jobs: dict[Future[Shard], RemoteShard] = {Future(): shard for shard in shards}
        waiting: SimpleQueue[Future[Shard]] = SimpleQueue()
        for job in jobs:
            waiting.put(job)

        def work() -> None:
            while True:
                try:
                    job = waiting.get_nowait()
                except Empty:
                    return
                shard = jobs[job]
                try:
                    job.set_result(self.fetch(listing, shard, folder))
                except UserError as error:
                    job.set_exception(error)
                finally:
                    if not job.done():  # a bug, whose traceback the thread prints
                        job.set_exception(RuntimeError(f"{shard.name}: the thread that fetched it has died"))

        for _ in range(min(num_threads, len(shards))):
            threading.Thread(target=work, name="download", daemon=True).start()
        return jobs

    def fetch(self, listing: Listing, shard: RemoteShard, folder: Path) -> Shard:
        """Bring one shard into the folder; it appears there once it is proved complete."""
        split = "val" if shard is listing.shards[-1] else "train"
        if kept := _already_here(folder, shard, split):
            return kept
        complete = self.retry(shard.name, lambda: self._fetch_once(listing, shard, split, folder / STAGING))
        with sorted_errors(shard.name):
            staged = folder / STAGING / shard.path
            sync_file(staged)
            self._go_on(shard.name)  # nobody would write the manifest any more
            os.replace(staged, folder / shard.name)
            sync_file(folder)
        return complete

    def _fetch_once(self, listing: Listing, shard: RemoteShard, split: str, staging: Path) -> Shard:
        """One attempt. What is wrong is removed, so that the next one starts from nothing."""
        if shutil.disk_usage(staging).free < shard.size:
            raise OSError(errno.ENOSPC, "No space left on device")
        staged = staging / shard.path
        hf_hub_download(
            listing.repo,
            shard.path,
            repo_type="dataset",
            revision=listing.commit,
            endpoint=self.endpoint,
            local_dir=staging,
            cache_dir=staging / ".cache" / "none",  # the hub's own cache is not verified
            etag_timeout=30,
        )
        size = staged.stat().st_size
        sha256 = sha256_of(staged)
        if size != shard.size or (shard.sha256 and sha256 != shard.sha256):
            staged.unlink()
            wrong = f"{size:,} bytes instead of {shard.size:,}" if size != shard.size else "its SHA-256 is wrong"
            raise Passing(f"what came is damaged ({wrong})")
        return Shard(shard.name, split, size, sha256, sum(text_groups(staged, shown=Path(shard.name))))


def _is_shard(entry: Any) -> bool:
    path = entry.path
    return hasattr(entry, "size") and path.endswith(".parquet") and path[0] != "."


def _stays_inside(path: str) -> bool:
    """Whether a path of the listing is one below any folder: a listing may come from anybody."""
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))


def _remote_shard(entry: Any) -> RemoteShard:
    """A shard in a sub-folder gets a name with its folders in it, since folders of text are flat here."""
    return RemoteShard(entry.path, entry.path.replace("/", "__"), entry.size, entry.lfs.sha256 if entry.lfs else None)


def _already_here(folder: Path, shard: RemoteShard, split: str) -> Shard | None:
    """The shard, where its bytes are there already: an earlier process was killed, or kept no manifest."""
    path = folder / shard.name
    if not may_be_here(folder, shard) or sha256_of(path) != shard.sha256:
        return None
    return Shard(shard.name, split, shard.size, shard.sha256, sum(text_groups(path)))


def may_be_here(folder: Path, shard: RemoteShard) -> bool:
    """Whether a file in the folder has the name and size of the shard, and the hub a hash to compare it with."""
    path = folder / shard.name
    return shard.sha256 is not None and path.is_file() and path.stat().st_size == shard.size
