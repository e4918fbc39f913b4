"""Train the tokenizer: raw text -> $NANOCHAT_BASE_DIR/tokenizer/tokenizer.json.

    python -m scripts.tok_train --data-dir=FOLDER
    python -m scripts.tok_train --data-dir=FOLDER --depth=4          # the smaller vocabulary of a small model
    python -m scripts.tok_train --data-dir=FOLDER --vocab-size=4096 --overwrite
    python -m scripts.tok_train --data-dir=stdlib --chat-data=abilities

Reads the train side of the conversations, if any, and of the corpus, the beginning of each document, up to --max-chars
characters in all. Conversations matter where they use other words than the text: from the library alone `what` is two
tokens, and with them a generated conversation has 26 % fewer tokens (dev/LOG.md 2026-11-21). The size of
the vocabulary follows from --depth (a small model spends most of its computation on a large vocabulary) unless
--vocab-size says otherwise. 50 MB of text take about ten seconds on two cores; two billion characters, minutes.
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from nanochat import scaling
from nanochat.cli import (
    NUM_GENERATED,
    Parser,
    add_data_flags,
    data_folder,
    depth,
    one_of,
    positive_int,
    run,
    vocabulary_size,
)
from nanochat.common import UserError, base_dir, check_writable, prepare_process, print0, record_stage

if TYPE_CHECKING:
    from nanochat.dataset import Split
    from nanochat.tokenizer import Tokenizer

DOC_CAP = 10_000  # so that a few very long documents do not decide; a txt file is a whole book or corpus
REPORT_EVERY_S = 10.0
SAMPLE_CHARS = 1_000_000  # validation text on which bytes per token is measured

# One text for the self-check: scripts of one to four bytes, joined emoji, a combining accent, a right-to-left mark,
# odd whitespace, and a special token spelled out.
SELF_CHECK = (
    "Hello world! I'm 123 years old, aren't I? naïve Zoë paid 20 €\r\n\tdef f(x):  return x**2  \n\n"
    "你好，世界。안녕하세요 こんにちは Привет Γειά שלום\u200f مرحبا नमस्ते 👩‍👩‍👧 🇵🇱 e\u0301 \u00a0\u3000 <|bos|>"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_data_flags(parser)
    parser.flag(
        "--chat-data",
        str,
        "",
        f"conversations whose words are learned, too: jsonl, a folder of them, abilities ({NUM_GENERATED:,} of them)",
    )
    parser.flag("--depth", depth, 20, "depth of the model the vocabulary is for")
    parser.flag("--laws", one_of(*scaling.LAWS), "nanochat", "what the vocabulary derived from --depth follows")
    parser.flag("--vocab-size", vocabulary_size, None, "ids, special tokens included; else derived from --depth")
    parser.flag("--max-chars", positive_int, 2_000_000_000, "stop reading after this many characters")
    parser.flag("--doc-cap", positive_int, None, f"characters taken of each document; else {DOC_CAP}, of txt files all")
    parser.switch("--overwrite", "replace an existing tokenizer")
    parser.switch("--if-missing", "do nothing where a tokenizer exists, so that an interrupted pipeline goes on")
    parser.switch("--offline", "never use the network")
    parser.check(lambda a: "--overwrite, --if-missing: give one of them" if a.overwrite and a.if_missing else None)
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(offline=args.offline)

    from nanochat.chat import conversation_text
    from nanochat.dataset import open_corpus
    from nanochat.tokenizer import FILE_NAME, Tokenizer
    from tasks.common import training_conversations

    file = base_dir() / "tokenizer" / FILE_NAME
    vocab_size = args.vocab_size or scaling.vocab_size_for(args.depth, args.laws)
    origin = "" if args.vocab_size else f"derived from --depth={args.depth}"
    if os.path.exists(file) and not args.overwrite:
        if not args.if_missing:
            raise UserError(f"{file} exists already; --overwrite replaces it, --if-missing keeps it")
        size = Tokenizer.load(file).vocab_size
        if size != vocab_size:
            raise UserError(
                f"{file}: has {size:,} ids, and {vocab_size:,} were asked for; give --vocab-size={size}, set "
                "NANOCHAT_BASE_DIR to another folder, or replace it with --overwrite (models keep their own copy)"
            )
        print0(f"{file} exists and is kept ({size:,} ids)")
        return
    check_writable(file)
    corpus = open_corpus(data_folder(args))
    said = [conversation_text(c) for c in training_conversations(args.chat_data)[0]] if args.chat_data else []
    if sum(map(len, said)) >= args.max_chars:
        raise UserError(f"--max-chars={args.max_chars}: the conversations alone have as many characters; give more")
    print0(f"data: {corpus.describe()}" + (f", {len(said):,} conversations" if said else ""))
    print0(f"vocab size: {vocab_size:,} ({origin or 'given'})")

    with record_stage("tok_train") as record:
        texts = TrainingText(chain(said, beginnings(corpus.train, args.doc_cap)), args.max_chars)
        tokenizer = Tokenizer.train(texts, vocab_size, origin)
        seconds = time.monotonic() - texts.started
        check_round_trip(tokenizer)
        tokenizer.save(file)
        speed, density = texts.num_bytes / 1e6 / seconds, bytes_per_token(tokenizer, corpus.val.documents())
        record.update(vocab_size=vocab_size, megabytes_per_s=speed, bytes_per_token=density)
    print0(f"trained in {seconds:.1f} s, {speed:.2f} MB/s over {texts.describe()}")
    print0(f"validation text: {density:.2f} bytes per token")
    print0(f"saved {file}")


def beginnings(split: "Split", doc_cap: int | None) -> Iterator[str]:
    """The first `doc_cap` characters of every document; None: `DOC_CAP`, but txt files whole."""
    for source in split.sources:
        cap = None if doc_cap is None and ".txt" in source.path.suffixes else doc_cap or DOC_CAP
        for document in source.documents():
            yield document[:cap]


class TrainingText:
    """Documents until there are `max_chars` characters; counts what passes and says so."""

    def __init__(self, documents: Iterable[str], max_chars: int) -> None:
        self._documents, self._max_chars = documents, max_chars
        self.num_documents = self.num_chars = self.num_bytes = 0
        self.started = time.monotonic()

    def __iter__(self) -> Iterator[str]:
        reported = self.started
        for document in self._documents:
            text = document[: self._max_chars - self.num_chars]
            self.num_documents += 1
            self.num_chars += len(text)
            self.num_bytes += len(text.encode(errors="replace"))
            yield text
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                print0(f"read {self.describe()} in {reported - self.started:.0f} s")
            if self.num_chars >= self._max_chars:
                break
        print0(f"read {self.describe()}; learning merges")

    def describe(self) -> str:
        return f"{self.num_documents:,} documents, {self.num_chars:,} characters, {self.num_bytes / 1e6:,.1f} MB"


def check_round_trip(tokenizer: "Tokenizer") -> None:
    """Only a bug can make this fail, but then nothing trained on the tokenizer is worth anything."""
    ids = tokenizer.encode(SELF_CHECK)
    assert tokenizer.decode(ids) == SELF_CHECK, "decoding what was encoded gave another text"
    assert tokenizer.token_bytes[ids].sum() == len(SELF_CHECK.encode()), "a special token came out of ordinary text"


def bytes_per_token(tokenizer: "Tokenizer", documents: Iterable[str]) -> float:
    """Over the first documents, about `SAMPLE_CHARS` characters."""
    num_chars = num_bytes = num_tokens = 0
    for document in documents:
        ids = tokenizer.encode(document)
        num_chars += len(document)
        num_bytes += int(tokenizer.token_bytes[ids].sum())
        num_tokens += len(ids)
        if num_chars >= SAMPLE_CHARS:
            break
    return num_bytes / num_tokens


if __name__ == "__main__":
    run(main)
