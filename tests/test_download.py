"""What a download fetches, of which commit, how many shards a horizon needs, and its command lines."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fetching import (
    NAMES,
    ROOT,
    VAL,
    assert_sound,
    environment,
    fetch,
    files_in,
    write_shard,
)
from hub_server import CLIMBMIX, Server

from nanochat.common import UserError
from nanochat.dataset import open_corpus, parse_args
from nanochat.download import KNOWN, Wish, download, tokens_of_depth
from nanochat.hub import Backoff, Hub, Listing, RemoteShard
from nanochat.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("only_our_hub")


# What is fetched


def test_the_validation_shard_comes_with_any_number_of_train_shards(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    fetch(server, tmp_path / "data", 0)
    assert_sound(tmp_path / "data", shards, VAL)
    fetch(server, tmp_path / "data", 2)
    assert_sound(tmp_path / "data", shards, NAMES[0], NAMES[1], VAL)
    fetch(server, tmp_path / "data", None)
    assert_sound(tmp_path / "data", shards, *NAMES)
    assert sorted(place for place in server.requests if place in NAMES) == NAMES  # each once


def test_a_folder_with_validation_only_is_told_how_to_go_on(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path / "a folder", 0)
    repair = (
        rf"complete train shard yet; python -m nanochat\.dataset .*--data-dir='{tmp_path}/a folder' -n 1 fetches it"
    )
    with pytest.raises(UserError, match=repair):
        open_corpus(tmp_path / "a folder")


def test_the_manifest_says_where_every_shard_comes_from(server: Server, shards: Path, tmp_path: Path) -> None:
    fetch(server, tmp_path / "data", 1)
    written = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert (written["dataset"], written["revision"], written["licence"]) == (CLIMBMIX, server.commit, "odc-by")
    assert written["shards"] == [
        {
            "name": name,
            "split": split,
            "size": (shards / name).stat().st_size,
            "sha256": server.hashes[name],
            "rows": 1500,
        }
        for name, split in ((NAMES[0], "train"), (VAL, "val"))
    ]


def test_the_old_command_fills_the_base_folder_and_training_finds_it(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    env = environment(server, tmp_path / "x") | {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    line = [sys.executable, "-m", "nanochat.dataset", "-n", "2", "-w", "1"]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert_sound(tmp_path / "base" / "base_data_climbmix", shards, NAMES[0], NAMES[1], VAL)
    assert f"[1/3] {VAL}" in done.stdout  # validation first
    assert max(map(len, done.stdout.splitlines())) < 200


def test_more_shards_than_there_are_means_all_of_them(
    server: Server, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fetch(server, tmp_path / "data", 170)
    assert_sound(tmp_path / "data", shards, *NAMES)
    assert "170; the data set has 4, so all of them are taken" in capsys.readouterr().out


def test_a_long_listing_comes_in_pages(shards: Path, tmp_path: Path) -> None:
    with Server(shards, page_size=2) as server:
        fetch(server, tmp_path / "data", None)
        assert server.requests.count("tree") == 3
    assert_sound(tmp_path / "data", shards, *NAMES)


def test_any_data_set_of_parquet_shards_can_be_fetched_also_from_sub_folders(tmp_path: Path) -> None:
    for name in ("b/part_1.parquet", "a/part_1.parquet", "a/part_2.parquet"):
        write_shard(tmp_path / "origin" / name, 10)
    with Server(tmp_path / "origin", repo="someone/DCLM.parquet") as server:
        fetch(server, tmp_path / "data", 1, repo="someone/DCLM.parquet")
    corpus = open_corpus(tmp_path / "data")
    assert files_in(tmp_path / "data") == ["a__part_1.parquet", "b__part_1.parquet", "manifest.json"]
    assert next(corpus.val.documents()).startswith("part_1") and "b__part_1.parquet for val" in corpus.describe()


def test_later_downloads_are_of_the_same_commit(server: Server, shards: Path, tmp_path: Path) -> None:
    fetch(server, tmp_path / "data", 1)
    first = server.commit
    server.commit = "f" * 40  # main moves on
    server.commits.add(server.commit)
    fetch(server, tmp_path / "data", 2)
    manifest = read_manifest(tmp_path / "data")
    assert manifest and manifest.revision == first
    with pytest.raises(UserError, match=f"holds shards of commit {first}, and --revision=main is f{{40}}; choose"):
        fetch(server, tmp_path / "data", 3, revision="main")
    fetch(server, tmp_path / "other", 1, revision=first)
    other = read_manifest(tmp_path / "other")
    assert other and other.revision == first


def test_complete_shards_of_a_folder_without_manifest_are_kept(server: Server, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / NAMES[0]).write_bytes((shards / NAMES[0]).read_bytes())
    (folder / NAMES[1]).write_bytes((shards / NAMES[1]).read_bytes()[:-1])
    flipped = bytearray((shards / VAL).read_bytes())
    flipped[5000] ^= 1
    (folder / VAL).write_bytes(flipped)
    fetch(server, folder, 2)
    assert_sound(folder, shards, NAMES[0], NAMES[1], VAL)
    assert NAMES[0] not in server.requests and NAMES[1] in server.requests and VAL in server.requests


def test_the_server_of_these_tests_also_runs_as_a_process_of_its_own(shards: Path, tmp_path: Path) -> None:
    port = tmp_path / "port"
    line = [sys.executable, "tests/hub_server.py", f"--folder={shards}", f"--port-file={port}", "--repo=a/b"]
    with subprocess.Popen(line, cwd=ROOT) as process:
        try:
            while not port.exists():
                assert process.poll() is None
                time.sleep(0.02)
            hub = Hub(f"http://127.0.0.1:{port.read_text().strip()}", Backoff(attempts=1))
            download("a/b", tmp_path / "data", Wish(1), hub=hub)
        finally:
            process.terminate()
    assert_sound(tmp_path / "data", shards, NAMES[0], VAL)


# How many shards


def listing(count: int, size: int = 100_000_000) -> Listing:
    names = [f"shard_{i:05}.parquet" for i in range(count)]
    return Listing(CLIMBMIX, "0" * 40, None, tuple(RemoteShard(name, name, size, None) for name in names))


def test_a_horizon_is_planned_with_room_to_spare(capsys: pytest.CaptureFixture) -> None:
    climbmix = KNOWN["climbmix"].chars_per_shard
    tokens = tokens_of_depth(24, 8)
    assert 5.8e9 < tokens < 5.9e9
    assert len(Wish(chars=tokens * 4.8, chars_per_shard=climbmix).train_shards(listing(6543))) == 113 + 6
    assert "119  (derived)" in capsys.readouterr().out
    assert len(Wish(chars=1.0, chars_per_shard=climbmix).train_shards(listing(6543))) == 1 + 2
    assert len(Wish(chars=25e9).train_shards(listing(6543))) == 100 + 5  # unknown: by the size of its shards
    assert len(Wish(chars=25e9).train_shards(listing(51))) == 50
    assert "105; the data set has 50, so text would be read more than once  (derived)" in capsys.readouterr().out


def test_by_default_depths_are_planned_at_the_ratio_they_are_trained_at() -> None:
    assert tokens_of_depth(12, None) == 1.5 * tokens_of_depth(12, 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "8", "--depth=24"], "^--num-files, --depth: give one of them"),
        (["--tokens=1e9", "--depth=24"], "^--tokens, --depth: give one of them"),
        (["--chars-per-token=4", "-n", "8"], "^--chars-per-token: needs --tokens or --depth"),
        (["--target-param-data-ratio=8"], "^--target-param-data-ratio: needs --depth"),
        (["--dataset=climb"], r"^--dataset=climb: must be climbmix, fineweb-edu or the owner/name"),
        (["--dataset=../x/y"], r"^--dataset=\.\./x/y: must be"),
        (["fetch"], "^fetch: choose download or verify"),
        (["verify", "-n", "8"], "unknown flag"),
        (["-n", "-2"], "must be a whole number of at least 0"),
    ],
)
def test_command_lines_that_make_no_sense_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(argv)


def test_minus_one_is_all_and_words_may_be_given() -> None:
    assert parse_args(["-n", "-1"])[1].num_files is None and parse_args([])[1].num_workers == 4
    assert parse_args(["download", "--dataset=fineweb-edu", "--num_files=3"])[1].num_files == 3
    assert parse_args(["verify"])[0] == "verify"
