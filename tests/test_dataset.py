"""Text on disk: kinds of file, split rules, blocks, and an error for everything that can be wrong."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.dataset import Corpus, Split, open_corpus

LINE = b'{"text": "good"}\n'


def documents(count: int, name: str = "d") -> list[str]:
    return [f"{name}{i}: the text of a document\nwith two lines" for i in range(count)]


def write_parquet(path: Path, texts: list[str | None], group: int = 1024, column: str = "text") -> Path:
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=group)
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    raw = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def everything(split: Split) -> list[str]:
    """All documents of a split, after checking that one pass and the blocks agree."""
    texts = list(split.documents())
    blocks = [block.read() for block in split.blocks()]
    assert [text for block in blocks for text in block] == texts
    assert all(len(block) <= 1024 for block in blocks)
    return texts


def both(corpus: Corpus) -> tuple[list[str], list[str]]:
    return everything(corpus.train), everything(corpus.val)


# Split rules


def test_the_last_shard_by_name_is_validation_whatever_its_kind(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", documents(3, "b"))
    write_jsonl(tmp_path / "a.jsonl", documents(2, "a"))
    write_jsonl(tmp_path / "c.jsonl.gz", documents(2, "c"))
    corpus = open_corpus(tmp_path)
    assert both(corpus) == (documents(2, "a") + documents(3, "b"), documents(2, "c"))
    assert "c.jsonl.gz" in corpus.describe() and "\n" not in corpus.describe()


def test_other_kinds_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", documents(3, "a"))
    write_parquet(tmp_path / "b.parquet", documents(3, "b"))
    for name in ("z.csv", "z.csv.gz", "README.md", ".hidden.parquet", "c.parquet.tmp"):
        (tmp_path / name).write_text("not text")
    (tmp_path / "folder.parquet").mkdir()
    assert both(open_corpus(tmp_path)) == (documents(3, "a"), documents(3, "b"))


@pytest.mark.parametrize("name", ["one.parquet", "one.jsonl", "one.jsonl.gz"])
def test_a_single_shard_is_split_by_the_hash_of_each_text(tmp_path: Path, name: str) -> None:
    texts = documents(2500)
    write = write_parquet if name.endswith("parquet") else write_jsonl
    train, val = both(open_corpus(write(tmp_path / name, texts)))
    is_val = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 20 == 0 for text in texts]
    assert val == [text for text, here in zip(texts, is_val) if here]
    assert train == [text for text, here in zip(texts, is_val) if not here]
    assert 80 < len(val) < 170
    assert both(open_corpus(tmp_path)) == (train, val)  # a folder with this one file is the same corpus


def test_more_documents_never_move_the_others_across(tmp_path: Path) -> None:
    few = both(open_corpus(write_jsonl(tmp_path / "few.jsonl", documents(300))))
    many = both(open_corpus(write_jsonl(tmp_path / "many.jsonl", documents(600))))
    assert set(few[0]) < set(many[0]) and set(few[1]) < set(many[1])


def test_a_text_that_occurs_twice_is_on_one_side(tmp_path: Path) -> None:
    train, val = both(open_corpus(write_jsonl(tmp_path / "a.jsonl", documents(200) * 2)))
    assert not set(train) & set(val) and len(train) + len(val) == 400


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_single_shard_leaves_no_side_empty(tmp_path: Path, count: int) -> None:
    for attempt in range(10):
        texts = documents(count, f"attempt {attempt} ")
        train, val = both(open_corpus(write_jsonl(tmp_path / "a.jsonl", texts)))
        assert train and val and sorted(train + val) == sorted(texts)


def test_documents_that_all_hash_to_validation_leave_one_to_train(tmp_path: Path) -> None:
    all_val = [t for t in documents(400) if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") % 20 == 0]
    train, val = both(open_corpus(write_jsonl(tmp_path / "a.jsonl", all_val)))
    assert len(train) == 1 and sorted(train + val) == sorted(all_val)


@pytest.mark.parametrize("texts", [["only one"], ["same", "same"]])
def test_one_document_cannot_be_split(tmp_path: Path, texts: list[str]) -> None:
    corpus = open_corpus(write_jsonl(tmp_path / "a.jsonl", texts))
    with pytest.raises(UserError, match=r"a\.jsonl: holds 1 different documents"):
        list(corpus.val.documents())


def test_txt_files_are_split_whole_by_the_hash_of_their_names(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}")
    train, val = both(open_corpus(tmp_path))
    assert sorted(train + val) == sorted(f"file {i}" for i in range(60))
    assert 1 <= len(val) <= 15
    is_val = [int.from_bytes(hashlib.sha256(f"{i:02}.txt".encode()).digest()[:8], "big") % 10 == 0 for i in range(60)]
    assert val == [f"file {i}" for i in range(60) if is_val[i]]
    (tmp_path / "60.txt").write_text("file 60")
    more_train, more_val = both(open_corpus(tmp_path))
    assert set(train) <= set(more_train) and set(val) <= set(more_val)


def test_two_txt_files_give_each_side_one(tmp_path: Path) -> None:
    for name in ("one", "two", "three", "four", "five", "six"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.txt").write_text("a")
        (folder / f"{name}_again.txt.gz").write_bytes(gzip.compress(b"b"))
        train, val = both(open_corpus(folder))
        assert sorted(train + val) == ["a", "b"] and len(val) == 1


@pytest.mark.parametrize(
    ("text", "val"),
    [
        ("".join(f"line {i}\n" for i in range(100)), "".join(f"line {i}\n" for i in range(91, 100))),
        ("head\n" + "x" * 100, "x" * 100),
        ("x" * 100, "x" * 10),
        ("x" * 85 + "\n" + "y" * 13 + "\n", "y" * 13 + "\n"),
        ("ab", "b"),
    ],
)
def test_a_single_txt_keeps_its_last_tenth_for_validation(tmp_path: Path, text: str, val: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    train_texts, val_texts = both(open_corpus(path))
    assert val_texts == [val] and train_texts == [text.removesuffix(val)]


def test_shards_and_txt_files_in_one_folder_follow_their_own_rules(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(2, "a"))
    write_jsonl(tmp_path / "m.jsonl", documents(2, "m"))
    (tmp_path / "c.txt").write_text("one\n" * 10)
    train, val = both(open_corpus(tmp_path))
    assert train == [*documents(2, "a"), "one\n" * 9]
    assert val == ["one\n", *documents(2, "m")]


# Reading


def test_blocks_are_row_groups_or_slices_of_1024(tmp_path: Path) -> None:
    texts = documents(2100)
    write_parquet(tmp_path / "a.parquet", texts, group=700)
    write_parquet(tmp_path / "b.parquet", texts, group=10_000)
    write_jsonl(tmp_path / "c.jsonl", texts)
    write_jsonl(tmp_path / "d.jsonl.gz", texts)
    write_jsonl(tmp_path / "e.jsonl", ["val"])
    corpus = open_corpus(tmp_path)
    blocks = [block.read() for block in corpus.train.blocks()]
    assert [len(block) for block in blocks] == [700] * 3 + [1024, 1024, 52] * 3
    assert everything(corpus.train) == texts * 4


def test_blocks_can_be_read_in_any_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl.gz", documents(3000))
    write_jsonl(tmp_path / "b.jsonl.gz", documents(10))
    forward = [block.read() for block in open_corpus(tmp_path).train.blocks()]
    backward = [block.read() for block in reversed(open_corpus(tmp_path).train.blocks())]
    assert backward[::-1] == forward


def test_blank_lines_empty_texts_and_a_byte_order_mark_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": ""}\r\n  \n{"text": "two"}')
    write_parquet(tmp_path / "b.parquet", ["", "three", ""])
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbffour\r\nfive")
    train, val = both(open_corpus(tmp_path))
    assert (train, val) == (["one", "two", "four\r\n"], ["three", "five"])


def test_a_byte_order_mark_is_no_text_in_any_kind_of_file_and_block(tmp_path: Path) -> None:
    mark, lines = b"\xef\xbb\xbf", b"".join(json.dumps({"text": f"{i}"}).encode() + b"\n" for i in range(1500))
    (tmp_path / "a.jsonl").write_bytes(mark + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mark + lines))
    (tmp_path / "c.jsonl").write_bytes(LINE)
    for name in ("d.txt.gz", "e.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(mark + b"text"))
    train, val = both(open_corpus(tmp_path))
    assert train == [f"{i}" for i in range(1500)] * 2 + ["text"] and val == ["good", "text"]


def test_the_rule_says_why_a_lone_file_is_not_split_by_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    assert "a.jsonl is one file, so it is split by document: about 1 in 20" in open_corpus(tmp_path).describe()
    (tmp_path / "b.txt").write_text("text " * 100)
    shown = open_corpus(tmp_path / "b.txt").describe()
    assert "b.txt is one document, so it is cut: its last tenth" in shown and "\n" not in shown


def test_the_fingerprint_follows_names_sizes_and_side(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    corpus = open_corpus(path)
    assert corpus.train.fingerprint() == open_corpus(tmp_path).train.fingerprint()
    prints = {corpus.train.fingerprint(), corpus.val.fingerprint()}
    write_jsonl(path, documents(51))
    prints.add(open_corpus(path).train.fingerprint())
    prints.add(open_corpus(path.rename(tmp_path / "b.jsonl")).train.fingerprint())
    assert len(prints) == 4


# Errors


def write(name: str, raw: bytes) -> Callable[[Path], Path]:
    def at(folder: Path) -> Path:
        (folder / name).write_bytes(raw)
        return folder / name

    return at


def truncated_parquet(folder: Path) -> Path:
    path = write_parquet(folder / "cut.parquet", list(documents(100)))
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", r"missing: no such file"),
        (lambda folder: folder, r"the folder holds no text; put it there as \.parquet"),
        (
            lambda folder: folder / ("n" * 300 + ".txt"),
            r"n\.txt: cannot be read \(File name too long\); check the path",
        ),
        (write("a.csv", b"x"), r"a\.csv: not a kind of file that holds text here; allowed are \.parquet"),
        (write("a.txt", b""), r"a\.txt: the file is empty \(0 bytes\)"),
        (write("a.parquet", b"PAR1nothing here"), r"a\.parquet: cannot be read"),
        (truncated_parquet, r"cut\.parquet: cannot be read .*truncated or corrupt"),
        (lambda folder: write_parquet(folder / "a.parquet", []), r"a\.parquet: holds no rows"),
        (
            lambda folder: write_parquet(folder / "a.parquet", ["x"], column="body"),
            r"a\.parquet: no column `text`; its columns are body",
        ),
    ],
)
def test_what_can_be_checked_cheaply_is_an_error_at_once(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_column_of_numbers_is_an_error_at_once(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column `text` holds int64; it must hold strings"):
        open_corpus(tmp_path)


def not_utf8_parquet(folder: Path) -> Path:
    raw = pa.array([b"good", b"bad \xff", b"good"], pa.binary())
    strings = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": strings}), folder / "a.parquet")
    return folder


def corrupt_pages(folder: Path) -> Path:
    path = write_parquet(folder / "a.parquet", list(documents(500)))
    raw = bytearray(path.read_bytes())
    raw[10:200] = b"\xff" * 190
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write("a.txt.gz", gzip.compress(b"text" * 1000)[:-20]), r"a\.txt\.gz: cannot be read .*truncated"),
        (write("a.txt.gz", b"no gzip at all"), r"a\.txt\.gz: cannot be read"),
        (write("a.txt.gz", gzip.compress(b"")), r"a\.txt\.gz: holds no text"),
        (write("a.txt", b"good \xff bad"), r"a\.txt: not UTF-8 \(byte 5\)"),
        (write("a.txt", b"x"), r"a\.txt: 1 character is too short to be split"),
        (write("a.jsonl.gz", gzip.compress(LINE * 1000)[:-20]), r"a\.jsonl\.gz: cannot be read"),
        (write("a.jsonl", LINE + b'{"text": "b\xff"}\n'), r"a\.jsonl, line 2: not UTF-8 \(byte 11 of the line\)"),
        (write("a.jsonl", LINE + b"\n{text\n"), r"a\.jsonl, line 3: not JSON"),
        (write("a.jsonl", b"[" * 100_000), r"a\.jsonl, line 1: not JSON"),
        (write("a.jsonl", LINE + b'["text"]\n'), r'a\.jsonl, line 2: no field "text"; it is \[\'text\'\]'),
        (write("a.jsonl", b'{"a": 1, "b": 2}\n'), r'a\.jsonl, line 1: no field "text"; its fields are a, b'),
        (write("a.jsonl", LINE + b'{"text": null}\n'), r"a\.jsonl, line 2: the text is null"),
        (write("a.jsonl", b'{"text": 3}\n'), r"a\.jsonl, line 1: the text is int"),
        (
            lambda folder: write_parquet(folder / "a.parquet", [*documents(5), None], group=4),
            r"a\.parquet, row 5 \(from 0\): the text is null",
        ),
        (not_utf8_parquet, r"a\.parquet, row 1 \(from 0\): the text is not UTF-8 \(byte 4\)"),
        (corrupt_pages, r"a\.parquet, row group 0: cannot be read"),
    ],
)
def test_bad_texts_are_errors_when_read_by_block_or_in_one_pass(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    for read in (lambda s: list(s.documents()), lambda s: [block.read() for block in s.blocks()]):
        split = open_corpus(path).train
        with pytest.raises(UserError, match=message) as caught:
            read(split)
        assert len(str(caught.value).splitlines()) == 1


def test_a_file_of_blank_lines_has_no_blocks_to_train_on(tmp_path: Path) -> None:
    path = write("a.jsonl", b"\n \n")(tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl: holds no lines with text"):
        open_corpus(path).train.blocks()


def test_what_may_not_be_read_is_told_as_such(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(3))
    corpus = open_corpus(path)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(No such file or directory\); check the path"):
        corpus.train.fingerprint()
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)  # root may read everything
    try:
        with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\); its permissions"):
            open_corpus(folder)
    finally:
        os.seteuid(user)


def test_half_surrogates_in_json_are_left_to_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE + b'{"text": "half \\ud800"}\n')
    train, val = both(open_corpus(tmp_path))
    assert sorted(train + val) == ["good", "half \ud800"]


def test_the_real_shards_are_read_whole(real_data: Path) -> None:
    corpus = open_corpus(real_data / "pretrain")
    assert [sum(len(block.read()) for block in side.blocks()) for side in (corpus.train, corpus.val)] == [8244, 1203]
    assert len(corpus.train.blocks()) == 12
    assert "shard_00004.parquet" in corpus.describe()
    assert sum(len(text.encode()) for text in corpus.val.documents()) == 7_179_284
