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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, hf_hub_download
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
    return Passing(f"the hub answers {code}", float(asked) if asked.isdigit() else 0.0)


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
            try:
                with sorted_errors(what):
                    return attempt()
            except Passing as error:
                reason, wait_s = error, self.backoff.wait_s(number, error.retry_after_s)
            if number < self.backoff.attempts:
                print0(f"{what}: {reason}; attempt {number + 1} of {self.backoff.attempts} in {wait_s:g} s")
                if self.stop.wait(wait_s):
                    raise UserError(f"{what}: stopped")
        raise UserError(f"{what}: {reason}, {self.backoff.attempts} times; check the network, or try again later")

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
        if len(shards) < 2:
            raise UserError(f"{where}: holds {len(shards)} parquet files; needed are 2, train and validation")
        if twice := [a.path for a, b in pairwise(shards) if a.name == b.name]:
            raise UserError(f"{where}: {shorten(twice)} would be the same file here; choose another data set")
        licence = card.get("license")
        return Listing(repo, commit, str(licence) if licence else None, tuple(shards))

    def fetch(self, listing: Listing, shard: RemoteShard, split: str, folder: Path) -> Shard:
        """Bring one shard into the folder; it appears there once it is proved complete."""
        if kept := _already_here(folder, shard, split):
            return kept
        complete = self.retry(shard.name, lambda: self._fetch_once(listing, shard, split, folder / STAGING))
        with sorted_errors(shard.name):
            staged = folder / STAGING / shard.path
            sync_file(staged)
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
        return Shard(shard.name, split, size, sha256, sum(text_groups(staged)))


def _is_shard(entry: Any) -> bool:
    path = entry.path
    return hasattr(entry, "size") and path.endswith(".parquet") and path[0] != "." and path.isprintable()


def _remote_shard(entry: Any) -> RemoteShard:
    """A shard in a sub-folder gets a name with its folders in it, since folders of text are flat here."""
    return RemoteShard(entry.path, entry.path.replace("/", "__"), entry.size, entry.lfs.sha256 if entry.lfs else None)


def _already_here(folder: Path, shard: RemoteShard, split: str) -> Shard | None:
    """The shard, where its bytes are there already: an earlier process was killed, or kept no manifest."""
    path = folder / shard.name
    if shard.sha256 is None or not path.is_file() or path.stat().st_size != shard.size:
        return None
    if sha256_of(path) != shard.sha256:
        return None
    return Shard(shard.name, split, shard.size, shard.sha256, sum(text_groups(path)))
