"""The manifest of a folder: sides that never move, damage that is found, and text of one's own."""

import dataclasses
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.dataset import main, open_corpus
from nanochat.manifest import Manifest, read_manifest


def write_shards(folder: Path, count: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        texts = [f"shard {i} document {j}" for j in range(30)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i}.parquet")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of one's own with a manifest."""
    write_shards(tmp_path / "data")
    main(["verify", f"--data-dir={tmp_path / 'data'}", "--write"])
    return tmp_path / "data"


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest
    return manifest


def verify(folder: Path) -> None:
    main(["verify", f"--data-dir={folder}"])


# The split


def test_writing_a_manifest_changes_neither_sides_nor_fingerprints(tmp_path: Path) -> None:
    write_shards(tmp_path / "data")
    (tmp_path / "data" / "a.txt.gz").write_bytes(gzip.compress(b"line\n" * 100))
    before = open_corpus(tmp_path / "data")
    main(["verify", f"--data-dir={tmp_path / 'data'}", "--write"])
    after = open_corpus(tmp_path / "data")
    for one, other in ((before.train, after.train), (before.val, after.val)):
        assert one.fingerprint() == other.fingerprint() and list(one.documents()) == list(other.documents())
    splits = {shard.name: (shard.split, shard.rows) for shard in manifest_of(tmp_path / "data").shards}
    assert splits == {
        "a.txt.gz": ("both", 2),
        "shard_0.parquet": ("train", 30),
        "shard_1.parquet": ("train", 30),
        "shard_2.parquet": ("train", 30),
        "shard_3.parquet": ("val", 30),
    }


def test_a_lone_file_is_split_by_document_as_without_a_manifest(tmp_path: Path) -> None:
    write_shards(tmp_path, 1)
    before = open_corpus(tmp_path)
    main(["verify", f"--data-dir={tmp_path}", "--write"])
    after = open_corpus(tmp_path)
    assert "1 shard, shard_0.parquet in part for validation" in after.describe()
    assert list(after.train.documents()) == list(before.train.documents())
    assert list(after.val.documents()) == list(before.val.documents())


def test_a_shard_that_comes_later_by_name_never_becomes_validation(folder: Path) -> None:
    before = open_corpus(folder)
    pq.write_table(pa.table({"text": ["new"]}), folder / "shard_9.parquet")
    (folder / "shard_99.parquet").write_bytes(b"")  # what nobody vouches for is not even opened
    after = open_corpus(folder)
    assert after.val.fingerprint() == before.val.fingerprint()
    assert after.train.fingerprint() == before.train.fingerprint()
    assert after.describe().endswith("left out, not in the manifest: shard_9.parquet, shard_99.parquet")


def test_the_manifest_decides_which_shard_is_validation(folder: Path) -> None:
    manifest = manifest_of(folder)
    first, *middle, last = manifest.shards
    swapped = [dataclasses.replace(first, split="val"), *middle, dataclasses.replace(last, split="train")]
    dataclasses.replace(manifest, shards=tuple(swapped)).write(folder)
    corpus = open_corpus(folder)
    assert [source.path.name for source in corpus.val.sources] == ["shard_0.parquet"]
    assert len(corpus.train.sources) == 3 and "shard_0.parquet for validation" in corpus.describe()


@pytest.mark.parametrize("name", ["shard_3.parquet", "shard_1.parquet"])
def test_a_missing_or_truncated_shard_is_an_error_that_says_what_to_do(folder: Path, name: str) -> None:
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[:-1])
    with pytest.raises(
        UserError, match=rf"{name}: truncated \({len(raw) - 1:,} bytes, must be {len(raw):,}\)\nput the"
    ):
        open_corpus(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing\nput the file back"):
        open_corpus(folder)
    dataclasses.replace(manifest_of(folder), dataset="some/data", revision="0" * 40).write(folder)
    repair = rf"python -m nanochat\.dataset --dataset=some/data --data-dir={folder} -n 3 fetches it"
    with pytest.raises(UserError, match=repair):
        open_corpus(folder)
    dataclasses.replace(manifest_of(folder), asked=9).write(folder)
    with pytest.raises(UserError, match="-n 8 fetches it"):
        open_corpus(folder)
    for shard in list(folder.glob("*.parquet")):
        shard.unlink()
    with pytest.raises(UserError, match=r"shard_0\.parquet: missing"):
        open_corpus(folder)


# Verify


def test_verify_finds_every_kind_of_damage_and_names_each_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    verify(folder)
    assert "every byte is as it was" in capsys.readouterr().out
    flipped = bytearray((folder / "shard_0.parquet").read_bytes())
    flipped[len(flipped) // 3] ^= 1
    (folder / "shard_0.parquet").write_bytes(flipped)
    open_corpus(folder)  # sizes cannot tell
    (folder / "shard_1.parquet").write_bytes((folder / "shard_1.parquet").read_bytes()[:100])
    (folder / "shard_2.parquet").unlink()
    with pytest.raises(UserError) as caught:
        verify(folder)
    summary, flip, cut, gone, advice = str(caught.value).splitlines()
    assert "3 of 4 shards are not what the manifest says" in summary
    assert "shard_0.parquet: corrupt (SHA-256" in flip and "shard_1.parquet: truncated (100 bytes" in cut
    assert gone.endswith("shard_2.parquet: missing") and "put the file back" in advice


def test_a_file_that_cannot_be_read_does_not_hide_what_is_wrong_with_the_others(folder: Path) -> None:
    manifest = manifest_of(folder)
    first, *others = manifest.shards
    odd = dataclasses.replace(first, name="n" * 300)  # no file can have that name
    dataclasses.replace(manifest, shards=(odd, *others)).write(folder)
    (folder / "shard_2.parquet").unlink()
    with pytest.raises(
        UserError, match=r"nnn: cannot be read \(File name too long\)(.*\n)+.*shard_2\.parquet: missing"
    ):
        verify(folder)
    with pytest.raises(UserError, match="File name too long"):
        open_corpus(folder)


def test_what_a_manifest_says_is_shown_without_moving_the_cursor(folder: Path) -> None:
    dataclasses.replace(manifest_of(folder), dataset="a/b\x1b[2J\n", revision="0" * 40).write(folder)
    assert r"manifest of a/b\x1b[2J\n at 000000000000" in open_corpus(folder).describe()


def test_verify_needs_a_manifest_and_write_never_replaces_one(folder: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: is there already; remove it first"):
        main(["verify", f"--data-dir={folder}", "--write"])
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json to compare with; --write makes one"):
        verify(folder)
    for write in ([], ["--write"]):
        with pytest.raises(UserError, match=r"nowhere: no such folder; download into it first"):
            main(["verify", f"--data-dir={folder / 'nowhere'}", *write])


# A manifest that somebody has edited


@pytest.mark.parametrize(
    "edit",
    [
        lambda fields: "{",
        lambda fields: "[]",
        lambda fields: "[" * 100_000,
        lambda fields: {},
        lambda fields: fields | {"extra": 1},
        lambda fields: fields | {"dataset": 1},
        lambda fields: fields | {"asked": "3"},
        lambda fields: fields | {"shards": [{}]},
        lambda fields: fields | {"shards": [fields["shards"][0]] * 2},
        lambda fields: fields | {"shards": [fields["shards"][0] | {"name": "../shard_0.parquet"}]},
        lambda fields: fields | {"shards": [fields["shards"][0] | {"size": -1}]},
        lambda fields: fields | {"shards": [fields["shards"][0] | {"size": 1.5}]},
        lambda fields: fields | {"shards": [fields["shards"][0] | {"split": "test"}]},
        lambda fields: fields | {"shards": [fields["shards"][0] | {"sha256": None}]},
        lambda fields: fields | {"shards": [fields["shards"][0] | {"name": 3}]},
    ],
)
def test_a_damaged_manifest_is_an_error_and_never_another_split(folder: Path, edit) -> None:
    fields = edit(json.loads((folder / "manifest.json").read_text()))
    (folder / "manifest.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    with pytest.raises(UserError, match=r"manifest\.json: is damaged \(.*\); remove it and run the download again$"):
        open_corpus(folder)


def test_a_manifest_of_a_later_format_is_not_guessed_at(folder: Path) -> None:
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(fields | {"format": 2}))
    with pytest.raises(UserError, match=r"of another format than 1"):
        open_corpus(folder)
