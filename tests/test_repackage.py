"""Repackaging: every different document once, in shards of the agreed form, in an order that the seed decides."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.dataset import main as dataset_main
from nanochat.dataset import open_corpus
from nanochat.manifest import read_manifest
from scripts.repackage import main


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(count: int) -> list[str]:
    return [f"document {i:05}" for i in range(count)]  # 14 characters each


def repackage(source: Path, out: Path, *flags: str) -> Path:
    main([f"--data-dir={source}", f"--out={out}", *flags])
    return out


def rows(folder: Path) -> list[int]:
    manifest = read_manifest(folder)
    assert manifest and manifest.names("val") == manifest.names()[-1:]
    return [shard.rows for shard in manifest.shards]


def texts_of(folder: Path) -> list[str]:
    return [text for file in sorted(folder.glob("*.parquet")) for text in pq.read_table(file)["text"].to_pylist()]


def test_real_text_comes_out_whole_and_in_the_agreed_form(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "pretrain" / "shard_00004.parquet"
    before = pq.read_table(source)["text"].to_pylist()
    out = repackage(source, tmp_path / "out", "--shard-chars=1_500_000", "--row-group=64", "--licence=CC-BY-4.0")
    corpus = open_corpus(out)
    train, val = list(corpus.train.documents()), list(corpus.val.documents())
    assert Counter(train + val) == Counter(before) and not set(train) & set(val)
    assert len(rows(out)) > 3
    files = sorted(out.glob("*.parquet"))
    assert [file.name for file in files] == [f"shard_{i:05}.parquet" for i in range(len(files))]
    for file in files[:-1]:
        texts = pq.read_table(file)["text"].to_pylist()
        assert len(texts) % 64 == 0 and sum(map(len, texts)) >= 1_500_000 > sum(map(len, texts[:-64]))
    for file in files:
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        assert all(group.num_rows == 64 for group in groups[:-1])
        for column in (group.column(0) for group in groups):
            assert (column.compression, column.has_dictionary_page, column.statistics) == ("ZSTD", False, None)
    manifest = read_manifest(out)
    assert manifest and manifest.licence == "CC-BY-4.0"
    dataset_main(["verify", f"--data-dir={out}"])


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_order(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(3000))
    sizes = ("--shard-chars=10000", "--row-group=100")
    one, again = (repackage(source, tmp_path / name, *sizes) for name in ("one", "again"))
    other = repackage(source, tmp_path / "other", *sizes, "--seed=7")
    assert [file.read_bytes() for file in sorted(one.iterdir())] == [
        file.read_bytes() for file in sorted(again.iterdir())
    ]
    assert texts_of(one) != texts_of(other) and sorted(texts_of(one)) == sorted(texts_of(other)) == documents(3000)


def test_every_shard_has_documents_from_everywhere(tmp_path: Path) -> None:
    out = repackage(
        write_jsonl(tmp_path / "a.jsonl", documents(4000)), tmp_path / "out", "--shard-chars=14000", "--row-group=100"
    )
    texts = texts_of(out)
    for start in range(0, 4000, 1000):
        quarters = Counter(int(text[-5:]) // 1000 for text in texts[start : start + 1000])
        assert all(150 < quarters[quarter] < 350 for quarter in range(4)), quarters
    neighbours = sum(int(a[-5:]) + 1 == int(b[-5:]) for a, b in pairwise(texts))
    assert neighbours < 15


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1000, [200, 200, 200, 200, 200]),  # nothing is left: the last full shard is validation
        (1150, [200, 200, 200, 200, 200, 150]),  # what is left fills a row group: it is validation
        (1099, [200, 200, 200, 200, 299]),  # it does not: the last full shard takes it
        (350, [200, 150]),
        (250, [238, 12]),  # one shard and too little: cut, one in 20
        (200, [190, 10]),
        (50, [48, 2]),
        (2, [1, 1]),
    ],
)
def test_the_last_shard_is_validation_and_nothing_is_lost(tmp_path: Path, count: int, expected: list[int]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(count))
    out = repackage(source, tmp_path / "out", "--shard-chars=2000", "--row-group=100")
    assert rows(out) == expected
    assert sorted(texts_of(out)) == documents(count)


def test_exact_duplicates_are_dropped_and_counted_wherever_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in"
    write_jsonl(source / "a.jsonl", [*documents(300), *documents(40)])
    write_jsonl(source / "b.jsonl", documents(20))
    (source / "c.txt").write_text("document 00003")
    (source / "d.txt").write_text("some text")
    out = repackage(source, tmp_path / "out", "--shard-chars=1000", "--row-group=10")
    assert sorted(texts_of(out)) == [*documents(300), "some text"]
    assert "301 documents; 61 exact duplicates were dropped" in capsys.readouterr().out


def test_half_surrogates_are_mended_and_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = repackage(write_jsonl(tmp_path / "a.jsonl", ["half \ud800", "whole \U0001f600", "plain"]), tmp_path / "out")
    assert sorted(texts_of(out)) == ["half \ufffd", "plain", "whole \U0001f600"]
    assert "1 documents had half surrogates" in capsys.readouterr().out


def test_an_earlier_folder_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(100))
    out = repackage(source, tmp_path / "out")
    (tmp_path / ".out.repackage").mkdir()  # left by a process that was killed
    with pytest.raises(UserError, match=r"out: holds shards already; give --overwrite"):
        repackage(source, out)
    assert sorted(texts_of(out)) == documents(100)
    write_jsonl(source, documents(60))
    assert sorted(texts_of(repackage(source, out, "--overwrite"))) == documents(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_a_link_is_followed_and_the_folder_behind_it_replaced(tmp_path: Path) -> None:
    out = repackage(write_jsonl(tmp_path / "a.jsonl", documents(100)), tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    repackage(write_jsonl(tmp_path / "a.jsonl", documents(60)), tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink() and sorted(texts_of(out)) == documents(60)


def test_nothing_but_a_folder_of_shards_is_ever_replaced(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in" / "a.jsonl", documents(100))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    for out in ("mine", "mine/letter"):
        with pytest.raises(UserError, match=r"has no manifest\.json|cannot be written"):
            repackage(source, tmp_path / out, "--overwrite")
    for out in (source.parent, tmp_path):
        with pytest.raises(UserError, match=r"holds the text that is read; choose another folder"):
            repackage(source.parent, out, "--overwrite")
    (tmp_path / "empty").mkdir()
    repackage(source, tmp_path / "empty")
    assert (tmp_path / "mine" / "letter").read_text() == "dear"


def test_what_cannot_be_split_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in" / "a.jsonl", ["same"])
    write_jsonl(tmp_path / "in" / "b.jsonl", ["same"])
    with pytest.raises(UserError, match=r"in: holds 1 different documents; a train and a validation shard need 2"):
        repackage(source.parent, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(UserError, match=r"^--out: needed"):
        main([f"--data-dir={source}"])
