"""Text to token ids and back: byte-level BPE with nine special tokens.

The story. A text is split into words by one regular expression (`SPLIT_PATTERN`), each word becomes its UTF-8 bytes,
and bytes are joined into longer tokens by a list of merges learned from a corpus: the pair that occurs most often is
merged first, then the next, until the vocabulary is full. Ids 0..255 are the raw bytes in byte order, ids from 256 are
the merges in the order they were learned, and the last nine ids are the special tokens. No text is unencodable, and
decoding what was encoded gives the same text.

One file is the truth: `tokenizer.json`, in the format of the `tokenizers` library (and so of every tool that reads
it). The library learns the merges; `tiktoken`, built from that same file, encodes, because it is faster and shares
threads well. The two agree on every text although they merge differently (the library by the rank of the pair, tiktoken
by the rank of the result): a stretch of bytes whose ends stay token borders is merged by its content alone, so training
reaches every token through one pair only, and a file that breaks this is refused.

Special tokens can only be put in by id. Text that spells `<|bos|>` is encoded as the characters it is made of, so what
a user types or a document contains can never end a turn or open a tool call.

    >>> tokenizer = Tokenizer.train(["low lower lowest"] * 3, vocab_size=268)
    >>> tokenizer.decode(tokenizer.encode("low <|bos|>"))
    'low <|bos|>'
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from nanochat.common import UserError, atomic_write

FILE_NAME = "tokenizer.json"
NUM_BYTES = 256

# Every document begins with bos; the others frame conversations and tool calls (chat.py).
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)

# GPT-4's pattern, but numbers are split after two digits, not three: better for small vocabularies (validation bpb at
# depth 12 with 1, 2, 3 digits: 0.969, 0.965, 0.972; pretraining spec 1.2). Alternatives in order: English contractions;
# letters with one leading sign or space; one or two digits; signs with a leading space and trailing newlines;
# whitespace up to a newline; whitespace at the end; other whitespace.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# The pattern's engine gives up on a run of about a million blanks (it keeps one way back for each), so encoding first
# cuts the text after every so many blanks in a row. Decoding still gives the same text.
LONGEST_BLANK = 100_000
_LONG_BLANK = re.compile(rf"\s{{{LONGEST_BLANK}}}")


class Tokenizer:
    """A vocabulary: encodes text to ids, decodes ids to text. Immutable; made by `train` or `load`."""

    def __init__(self, json_text: str) -> None:
        """`json_text`: the text of a tokenizer.json. Raises ValueError, saying why, if it is not one of ours."""
        pattern, ordinary = _parse(json_text)
        self._json = json_text
        self._bytes = ordinary + [name.encode() for name in SPECIAL_TOKENS]
        self._specials = {name: len(ordinary) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "nanochat",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ordinary)},
            special_tokens=self._specials,
        )
        self.vocab_size: int = len(self._bytes)
        self.bos: int = self._specials["<|bos|>"]
        self.fingerprint: str = hashlib.sha256(json_text.encode()).hexdigest()
        self.token_bytes: np.ndarray = np.array([len(token) for token in self._bytes], dtype=np.int32)  # (V,)
        self.token_bytes[len(ordinary) :] = 0  # a special token stands for no text: bits per byte must not count it
        self.token_bytes.flags.writeable = False

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, origin: str = "") -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids, the special tokens included. The same texts give the same file.

        Raises UserError if `vocab_size` is below 265 or if the texts are too few to fill it. origin: how the size was
        come by, for that message, if it was not given.
        """
        asked = f"--vocab-size={vocab_size}{f' ({origin})' if origin else ''}"
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"{asked}: must be at least {MIN_VOCAB_SIZE} ({NUM_BYTES} bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens)"
            )
        merges = _learn_merges(map(replace_surrogates, texts), vocab_size - len(SPECIAL_TOKENS))
        reached = MIN_VOCAB_SIZE + len(merges)
        if reached < vocab_size:
            raise UserError(
                f"{asked}: the text has only enough different words for {reached}, and then the last tokens stand for "
                f"rare words; give more text or --vocab-size={max(MIN_VOCAB_SIZE, reached // 2)}"
            )
        return cls(_to_json(merges))

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int]) -> "Tokenizer":
        """The vocabulary of tiktoken's table of merges, ranks being ids. Raises ValueError if it is not one of ours.

        A merge's two halves are not in that table; they are what its bytes become by the merges before it.
        """
        tokens = sorted(ranks, key=lambda token: ranks[token])
        if [ranks[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError("the ranks are not numbered from 0 without a gap")
        if tokens[:NUM_BYTES] != [bytes([byte]) for byte in range(NUM_BYTES)]:
            raise ValueError(f"the first {NUM_BYTES} tokens are not the bytes in order")
        alphabet = byte_alphabet()
        merges = []
        for rank, token in enumerate(tokens[NUM_BYTES:], NUM_BYTES):
            parts = _merged(token, ranks, rank)
            if len(parts) != 2:
                raise ValueError(f"token {rank}, {token!r}, cannot be reached by merging two others")
            left, right = ("".join(alphabet[byte] for byte in part) for part in parts)
            merges.append((left, right))
        return cls(_to_json(merges))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder. Raises UserError if it is missing or damaged."""
        file = path / FILE_NAME if path.is_dir() else path
        try:
            return cls(file.read_bytes().decode())
        except OSError as error:
            raise UserError(
                f"{file}: no tokenizer can be read there ({error.strerror}); "
                "train one with `python -m scripts.tok_train`"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{file}: not a tokenizer of this project ({error}); restore the file or train a new one with "
                "`python -m scripts.tok_train --overwrite`"
            ) from error

    def save(self, path: Path) -> None:
        """Write the file `path` if its name ends in .json, else `path`/tokenizer.json; all of it or nothing."""
        with atomic_write(path if path.suffix == ".json" else path / FILE_NAME) as temporary:
            temporary.write_bytes(self._json.encode())

    def to_json(self) -> str:
        """Exactly the text of the file."""
        return self._json

    def special(self, name: str) -> int:
        """The id of a special token."""
        if name not in self._specials:
            raise UserError(f"{name!r} is not a special token; there are {', '.join(SPECIAL_TOKENS)}")
        return self._specials[name]

    def encode(self, text: str, prepend: int | None = None, append: int | None = None) -> list[int]:
        """Ids of a text, between the two given ids if any. Special tokens are never recognised in the text.

        Half a surrogate pair, which no UTF-8 can hold, becomes U+FFFD.
        """
        ids = [] if prepend is None else [prepend]
        for piece in _pieces(replace_surrogates(text)):
            ids += self._encoding.encode_ordinary(piece)
        return ids if append is None else [*ids, append]

    def encode_batch(
        self, texts: Sequence[str], prepend: int | None = None, append: int | None = None, num_threads: int = 2
    ) -> list[list[int]]:
        """`encode` of every text, on several threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(lambda text: self.encode(text, prepend, append), texts))

    def encode_arrays(self, texts: Sequence[str], prepend: int, num_threads: int = 2) -> list["array[int]"]:
        """`encode_batch` as arrays of 4 bytes per token, for text by the million tokens.

        No token becomes a Python number and a thread has one task, not one per text, so that the interpreter is nearly
        free for other threads: a training step, say.
        """
        parts = [texts[start::num_threads] for start in range(num_threads)]
        arrays: list[array[int]] = [array("i")] * len(texts)
        with ThreadPoolExecutor(num_threads) as pool:
            encoded = pool.map(lambda part: [self._encode_array(text, prepend) for text in part], parts)
            for start, part in enumerate(encoded):
                arrays[start::num_threads] = part
        return arrays

    def _encode_array(self, text: str, prepend: int) -> "array[int]":
        ids = array("i", [prepend])
        for piece in _pieces(replace_surrogates(text)):  # nothing is disallowed, nothing special: as ordinary text
            ids.frombytes(self._encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.int32).tobytes())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Bytes that are no UTF-8 become U+FFFD, special tokens are shown by name."""
        return b"".join(map(self.bytes_of, ids)).decode(errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes one id stands for (for a special token: its name)."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id}: this tokenizer has the ids 0 to {self.vocab_size - 1}")
        return self._bytes[token_id]


def replace_surrogates(text: str) -> str:
    """`text` as it can be written in UTF-8: surrogate pairs become their character, half ones U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces without too many blanks in a row: nearly always the text itself."""
    start = 0
    if len(text) > LONGEST_BLANK:
        for match in _LONG_BLANK.finditer(text):
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


# The file -------------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in tokenizer.json, by byte (GPT-2's table).

    Bytes that are visible characters of Latin-1 stand for themselves, the others take the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(NUM_BYTES)]


def _splitter(pattern: str) -> Any:
    """The library's pre-tokenizer: split by the pattern, then write every byte as its character."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizers.pre_tokenizers.Sequence([split, byte_level])


def _learn_merges(texts: Iterator[str], vocab_size: int) -> list[tuple[str, str]]:
    """The merges, in training order, that fill a vocabulary of `vocab_size` tokens (bytes included) or come near."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = _splitter(SPLIT_PATTERN)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=byte_alphabet(), special_tokens=[]
    )
    model.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(model.to_str())["model"]["merges"]]


def _merged(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """The parts that a token's bytes are joined into by the merges whose rank is below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        if joined[best] >= limit:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _to_json(merges: list[tuple[str, str]]) -> str:
    """The file for a list of merges: the library's own form, with our numbering of the ids."""
    tokens = byte_alphabet() + [left + right for left, right in merges]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    model.pre_tokenizer = _splitter(SPLIT_PATTERN)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return json.dumps(json.loads(model.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n"


def _parse(json_text: str) -> tuple[str, list[bytes]]:
    """(split pattern, bytes of every ordinary token by id). Raises ValueError saying what is wrong."""
    alphabet = byte_alphabet()
    try:
        content = json.loads(json_text)
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        vocab: dict[str, int] = content["model"]["vocab"]
        merges = [(left, right) for left, right in content["model"]["merges"]]
        numbered = {token: i for i, token in enumerate(alphabet + [left + right for left, right in merges])}
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"its parts are not where a tokenizer has them: {error!r}") from error
    if (
        len(numbered) != NUM_BYTES + len(merges)
        or vocab != numbered
        or not vocab.keys() >= {p for pair in merges for p in pair}
    ):
        raise ValueError(f"the vocabulary is not the {NUM_BYTES} bytes and then one new token for each merge, in order")
    if added != {name: len(numbered) + i for i, name in enumerate(SPECIAL_TOKENS)}:
        raise ValueError("the special tokens are not ours, in our order, after all others")
    byte_of = {character: byte for byte, character in enumerate(alphabet)}
    return pattern, [bytes(byte_of[character] for character in token) for token in numbered]
