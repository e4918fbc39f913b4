"""Shards from a hub: a real server on 127.0.0.1, every fault it can have, and never a hole in the folder."""

import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fetching import (
    NAMES,
    ROOT,
    VAL,
    assert_sound,
    command,
    environment,
    fetch,
    files_in,
    finish,
    start,
    write_shard,
)
from hub_server import CLIMBMIX, Fault, Server

from nanochat.common import UserError
from nanochat.dataset import main as dataset_main
from nanochat.dataset import open_corpus
from nanochat.download import Wish, download
from nanochat.hub import Backoff, DiskFull, Hub
from nanochat.manifest import Manifest, read_manifest

pytestmark = pytest.mark.usefixtures("only_our_hub")


# Faults that pass


@pytest.mark.parametrize(
    ("place", "faults", "told"),
    [
        ("info", [429, 500], "the hub answers 429; attempt 2 of 3 in 0.01 s"),
        ("info", [(429, "\xb2")], "the hub answers 429; attempt 2 of 3 in 0.01 s"),  # no number to wait for
        ("info", [(429, 1)], "the hub answers 429; attempt 2 of 3 in 1 s"),
        ("info", ["html"], "Expecting value"),
        ("tree", [520], "the hub answers 520"),
        (NAMES[0], [(429, 0)], ""),  # huggingface_hub's own second attempt
        (NAMES[0], [500, 503], f"{NAMES[0]}: the hub answers 503; attempt 3 of 3 in 0.02 s"),
        (NAMES[0], ["reset", "reset"], "attempt 3 of 3"),
        (NAMES[0], ["short"], ""),  # huggingface_hub goes on where it ended
        (NAMES[0], ["truncated", 502], "Consistency check failed"),
        (NAMES[0], ["corrupt", "reset"], "what came is damaged (its SHA-256 is wrong)"),
        (VAL, ["corrupt", "truncated"], f"{VAL}: what came is damaged"),
        (f"HEAD {NAMES[1]}", [500], ""),
    ],
)
def test_a_fault_that_passes_is_tried_again(
    server: Server,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    place: str,
    faults: list[Fault],
    told: str,
) -> None:
    server.fail(place, faults)
    fetch(server, tmp_path / "data", 2)
    assert_sound(tmp_path / "data", shards, NAMES[0], NAMES[1], VAL)
    assert told in capsys.readouterr().out
    assert server.requests.count(place) > len(faults)


def test_waits_double_up_to_a_limit_unless_the_hub_asks_for_more() -> None:
    backoff = Backoff(first_s=1, longest_s=5)
    assert [backoff.wait_s(attempt, 0.0) for attempt in (1, 2, 3, 4, 5)] == [1, 2, 4, 5, 5]
    assert backoff.wait_s(1, 30.0) == 30


# Faults that stay


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (lambda: repeat(500), "the hub answers 500, 3 times"),
        (lambda: repeat("reset"), "3 times"),
        (lambda: repeat("truncated"), "Consistency check failed"),
        (lambda: repeat("corrupt"), "what came is damaged (its SHA-256 is wrong), 3 times"),
        (lambda: repeat(404), "the hub does not have it (404)"),
        (lambda: repeat(403), "the hub answers 403; check HF_ENDPOINT and HF_TOKEN"),
    ],
)
@pytest.mark.parametrize("bad", [NAMES[1], VAL])
def test_a_fault_that_stays_is_told_by_shard_and_leaves_the_good_ones(
    server: Server, shards: Path, tmp_path: Path, bad: str, faults: Callable[[], Iterator[Fault]], told: str
) -> None:
    server.fail(bad, faults())
    with pytest.raises(UserError) as caught:
        fetch(server, tmp_path / "data", 3)
    first, named, *_, advice = str(caught.value).splitlines()
    assert "1 of 4 shards failed" in first and named.startswith(f"{bad}: ") and told in named and "again" in advice
    good = [name for name in (*NAMES[:3], VAL) if name != bad]
    assert_sound(tmp_path / "data", shards, *good)
    server.faults.clear()
    fetch(server, tmp_path / "data", 3)
    assert_sound(tmp_path / "data", shards, *NAMES[:3], VAL)


def test_every_failed_shard_is_named_and_the_process_leaves_with_2(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    server.fail(NAMES[0], repeat(404))
    server.fail(NAMES[2], repeat(404))
    code, _, err = finish(start(server, tmp_path / "data", "-n", "3"))
    assert code == 2 and "2 of 4 shards failed" in err and f"error: {NAMES[0]}: " in err and f"error: {NAMES[2]}" in err
    assert_sound(tmp_path / "data", shards, NAMES[1], VAL)
    assert "2 more were asked for and are not here yet" in open_corpus(tmp_path / "data").describe()


def test_a_listing_with_another_hash_than_the_file_is_never_believed(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    server.wrong_hashes.add(NAMES[0])
    with pytest.raises(UserError, match=f"{NAMES[0]}: what came is damaged"):
        fetch(server, tmp_path / "data", 2)
    assert_sound(tmp_path / "data", shards, NAMES[1], VAL)


@pytest.mark.parametrize("path", ["a/../../../../evil.parquet", "/evil.parquet", "a//b.parquet", "a\\b.parquet"])
def test_a_listing_that_leads_out_of_the_folder_is_refused(server: Server, tmp_path: Path, path: str) -> None:
    server.files[path], server.hashes[path] = server.files[NAMES[0]], server.hashes[NAMES[0]]
    with pytest.raises(UserError, match=r"at main: lists .*parquet, which no folder can hold"):
        fetch(server, tmp_path / "data", None)
    assert not (tmp_path / "data").exists() and not set(server.requests) & {path, *NAMES}


@pytest.mark.parametrize("column", ["body", "text"])
def test_a_shard_without_text_is_named_and_not_kept(tmp_path: Path, column: str) -> None:
    for name in NAMES[:2]:
        write_shard(tmp_path / "origin" / name)
    pq.write_table(pa.table({column: [1, 2]}), tmp_path / "origin" / NAMES[0])
    told = rf"(?m)^{NAMES[0]}: .*column `text`"
    with Server(tmp_path / "origin") as server, pytest.raises(UserError, match=told):
        fetch(server, tmp_path / "data")
    assert files_in(tmp_path / "data") == ["manifest.json", NAMES[1]]


def test_a_failed_validation_download_never_turns_a_train_shard_into_validation(server: Server, tmp_path: Path) -> None:
    server.fail(VAL, repeat(404))
    with pytest.raises(UserError, match=VAL):
        fetch(server, tmp_path / "data", 3)
    with pytest.raises(UserError, match=r"names no complete validation shard yet; python -m nanochat\.dataset"):
        open_corpus(tmp_path / "data")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repo": "some/one"}, "some/one at main: no such data set on the hub"),
        ({"repo": "a--b/..c"}, "a--b/..c at main: "),
        ({"revision": "0" * 40}, "the hub has no such commit or branch; check --revision"),
    ],
)
def test_what_the_hub_does_not_have_is_told_at_once_and_leaves_no_folder(
    server: Server, tmp_path: Path, wrong: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fetch(server, tmp_path / "data", **wrong)
    assert not (tmp_path / "data").exists()


def test_what_is_no_hub_is_told_as_such(server: Server, tmp_path: Path) -> None:
    server.fail("info", repeat("html"))
    with pytest.raises(UserError, match=r"Expecting value.*, 3 times"):
        fetch(server, tmp_path / "data")
    with socket.socket() as unheard:  # bound, so that nobody else listens there
        unheard.bind(("127.0.0.1", 0))
        hub = Hub(f"http://127.0.0.1:{unheard.getsockname()[1]}", Backoff(2, 0.01))
        with pytest.raises(UserError, match=r"Connection refused, 2 times"):
            download(CLIMBMIX, tmp_path / "data", Wish(1), hub=hub)


def test_offline_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--offline: a download needs the network; leave it out"):
        dataset_main(["-n", "1", f"--data-dir={tmp_path / 'data'}", "--offline"])
    env = environment(server, tmp_path / "data") | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command(server, tmp_path / "data"), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "the network may not be used (HF_HUB_OFFLINE)" in done.stderr
    assert not server.requests and not (tmp_path / "data").exists()


def test_a_folder_with_other_contents_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    with pytest.raises(UserError, match=r"holds other text \(a\.jsonl\); choose an empty --data-dir"):
        fetch(server, tmp_path / "mine")
    dataset_main(["verify", f"--data-dir={tmp_path / 'mine'}", "--write"])
    with pytest.raises(UserError, match=r"holds text of your own, by its manifest"):
        fetch(server, tmp_path / "mine")
    fetch(server, tmp_path / "data", 1)
    with pytest.raises(UserError, match=rf"holds shards of {CLIMBMIX}, by its manifest"):
        fetch(server, tmp_path / "data", repo="someone/else")


@pytest.mark.parametrize("name", [".download", ".lock", NAMES[0], ""])
def test_what_stands_in_the_way_is_named(server: Server, tmp_path: Path, name: str) -> None:
    if name == ".download":
        (tmp_path / name).write_text("a file where a folder must be")
    elif name:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name}: (File exists|Is a directory); choose another folder with --data-dir"):
        fetch(server, tmp_path if name else tmp_path / "link", 1)


# Interrupted, at once, and without room


def wait_for_request(server: Server, place: str, process: subprocess.Popen) -> None:
    while place not in server.requests:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def wait_for_entry(folder: Path, name: str, process: subprocess.Popen) -> None:
    """Until the manifest has the shard: the next one is asked for a moment before."""
    while name not in (read_manifest(folder) or Manifest(())).names():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_killed_download_goes_on_where_it_was(server: Server, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    server.fail(NAMES[1], ["hang"])
    process = start(server, folder, "-n", "3", "-w", "1")
    wait_for_request(server, NAMES[1], process)
    wait_for_entry(folder, NAMES[0], process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert list(folder.rglob("*.incomplete")) or list((folder / ".download").rglob("*"))
    assert files_in(folder) == ["manifest.json", NAMES[0], VAL]
    code, out, _ = finish(start(server, folder, "-n", "3"))
    assert code == 0 and "2 of 4 shards are here" in out
    assert_sound(folder, shards, *NAMES[:3], VAL)
    assert server.requests.count(VAL) == server.requests.count(NAMES[0]) == 1


def test_ctrl_c_waits_for_no_transfer_and_the_next_one_goes_on(server: Server, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    server.fail(NAMES[1], ["hang"])
    env = environment(server, folder) | {"HF_HUB_DOWNLOAD_TIMEOUT": "1000"}
    line = command(server, folder, "-n", "3", "-w", "1")
    process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_request(server, NAMES[1], process)
    wait_for_entry(folder, NAMES[0], process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)  # with a transfer that never ends
    assert (code, err) == (130, "\ninterrupted\n")
    assert_sound(folder, shards, NAMES[0], VAL)
    assert finish(start(server, folder, "-n", "3"))[0] == 0
    assert_sound(folder, shards, *NAMES[:3], VAL)


def test_of_two_downloads_at_once_the_second_waits_and_finds_everything(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    server.fail(NAMES[1], ["hang"])
    first = start(server, folder, "-n", "3", "-w", "1")
    wait_for_request(server, NAMES[1], first)
    second = start(server, folder, "-n", "3", "-w", "1")
    assert second.stdout
    told = [second.stdout.readline(), second.stdout.readline()]
    assert "another download is filling it; waiting" in told[1]
    server.ended.set()  # what hangs breaks off, and is fetched again
    codes = [finish(first)[0], finish(second)[0]]
    assert codes == [0, 0]
    assert_sound(folder, shards, *NAMES[:3], VAL)
    assert [server.requests.count(name) for name in (NAMES[0], NAMES[2], VAL)] == [1, 1, 1]


def test_a_file_that_cannot_be_stored_ends_the_download_and_leaves_what_is_complete(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    fetch(server, tmp_path / "data", 1)
    limit = (shards / NAMES[1]).stat().st_size // 2
    process = start(
        server,
        tmp_path / "data",
        "-n4",
        "-w1",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    code, _, err = finish(process)
    assert code == 2 and err.startswith(f"error: {NAMES[1]}: cannot be stored (File too large); free some space")
    assert NAMES[3] not in server.requests
    assert_sound(tmp_path / "data", shards, NAMES[0], VAL)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk to fill can only be mounted by root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_told_before_anything_is_fetched(server: Server, shards: Path, small_disk: Path) -> None:
    fetch(server, small_disk / "data", 1)
    server.requests.clear()
    with pytest.raises(DiskFull, match=r"3 shards need 0\.\d\d GB, the disk has 0\.00 GB free; ask for fewer with -n"):
        fetch(server, small_disk / "data", 4)
    assert not set(server.requests) & set(NAMES)
    assert_sound(small_disk / "data", shards, NAMES[0], VAL)
    assert open_corpus(small_disk / "data").describe()


def test_shards_that_are_taken_over_need_no_room(server: Server, shards: Path, small_disk: Path) -> None:
    names = [NAMES[0], NAMES[1], VAL]
    for name in names:  # 190 KB
        (small_disk / name).write_bytes((shards / name).read_bytes())
    fetch(server, small_disk, 2)
    assert_sound(small_disk, shards, *names)


def test_a_disk_that_fills_up_meanwhile_is_told_at_once(server: Server, shards: Path, small_disk: Path) -> None:
    server.fail(NAMES[1], ["hang"])
    process = start(server, small_disk / "data", "-n2", "-w1")
    wait_for_request(server, NAMES[1], process)
    wait_for_entry(small_disk / "data", NAMES[0], process)
    with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 1024) == 1024:
            pass
    server.ended.set()
    code, _, err = finish(process)
    assert code == 2 and f"error: {NAMES[1]}: cannot be stored (No space left on device); free some space" in err
    (small_disk / "filler").unlink()
    assert_sound(small_disk / "data", shards, NAMES[0], VAL)
