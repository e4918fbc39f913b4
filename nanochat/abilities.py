"""Conversations made by rule: five abilities that a small model can learn in minutes, each with a judge.

    spelling     How do you spell banana?             The word 'banana' is spelled b a n a n a
    counting     How many a are in 'banana'?          [ 'banana'.count('a')] -> [3] The answer is 3.
    arithmetic   What is 37*24?                       [37*24] -> [888] The answer is 888.
    docs         What does `os.path.join` do?         Join two or more pathname components, inserting '/' as needed.
    identity     Who are you?                         what `knowledge.md` says: the one place of these facts

`ability.conversation(split, index)` is the same in every process for the same arguments, and there is one for every
index. What is held out between the splits "train", "val" and "test":

    words, operand pairs     by a hash; a word is on the same side in spelling and in counting
    phrasings                by lists (`phrasings`): no question of one split has the wording of one of another
    docstrings               "train" and "test" ask about modules that may be trained on (`stdlib_corpus`), so "test" is
                             recall under other words; "val" asks about held-out modules, which nobody can know by heart

A judge reads a reply as message content (a string or parts, as `chat.ReplyReader` gives them) and looks at its text
parts only, never at tool calls and outputs.

Why the answers look as they do. A vocabulary learned from the library has a token for each of ` a` to ` z` (from 2,048
entries on; with `-` or `,` between the letters most would take two), so a spelled word is one token per letter, the
first letter included because a space stands before it. The call ` 'table'.count('t')` begins with a space so that the
split pattern sees a quote and `table`, as in a question, and not the contraction `'t`. A spelling repeats the word in
the same quotes before its letters: finding the word is then one skill for both, and its letters follow from what stands
next to them (dev/LOG.md 2026-11-21). Answers are short, calls come
first, and one sentence ends both kinds of tool use: a small model has little to learn but the skill.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from random import Random
from typing import Protocol

from nanochat import stdlib_corpus
from nanochat.calculator import calculate
from nanochat.chat import Conversation, Message, Part
from nanochat.common import UserError
from nanochat.knowledge import read_facts
from nanochat.phrasings import COUNT, ENDINGS, EXPLAIN, FRAMES, OPENINGS, ORDERS, SPELL, WORDINGS

SPLITS = ("train", "val", "test")
VAL_PERCENT, TEST_PERCENT = 4, 8  # of words and operand pairs
EMBEDDED_FRAC = 0.2  # of the questions trained on, that get an opening; as many get an ending
DISTRACTED_FRAC = 0.12  # of the questions trained on, but about itself, that follow a sentence of the library
NOISY_FRAC, CHANGED_FRAC = 0.3, 0.1  # of the questions about itself; of their words, missing, and as many too many
Content = str | list[Part]


class Ability(Protocol):
    """Conversations without end, and a judge of replies to them."""

    @property
    def name(self) -> str: ...

    def conversation(self, split: str, index: int) -> Conversation:
        """Number `index` of a split; its last message is a right answer."""

    def judge(self, conversation: Conversation, reply: Content) -> bool:
        """Whether `reply` would do in the place of the last message."""


def split_of(item: str) -> str:
    """The split that a word or operand pair belongs to."""
    percent = int.from_bytes(hashlib.sha256(item.encode()).digest()[:4], "big") % 100
    return "val" if percent < VAL_PERCENT else "test" if percent < VAL_PERCENT + TEST_PERCENT else "train"


def answer_text(content: Content) -> str:
    """The text of an answer, without tool calls and their outputs."""
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def _rng(name: str, split: str, index: int) -> Random:
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; there are {', '.join(SPLITS)}")
    return Random(f"{name} {split} {index}")  # a string seeds through sha512, never through hash()


def _conversation(ability: str, question: str, answer: Content) -> Conversation:
    turns: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "subject": ability}


def _reference(conversation: Conversation) -> str:
    return answer_text(conversation["messages"][-1]["content"])


def _with_tool(call: str) -> list[Part]:
    output = calculate(call)
    return [
        {"type": "python", "text": call},
        {"type": "python_output", "text": output},
        {"type": "text", "text": f"The answer is {output}."},
    ]


def _ends_in_same_number(conversation: Conversation, reply: Content) -> bool:
    """The last number of the reply equals the last of the right answer."""
    wanted, given = _last_number(_reference(conversation)), _last_number(answer_text(reply))
    return given is not None and given == wanted


def _last_number(text: str) -> Decimal | None:
    numbers = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _casually(rng: Random, question: str) -> str:
    """As people type: sometimes without the capital, sometimes without the mark at the end."""
    if rng.random() < 0.2:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.!") if rng.random() < 0.2 and question[-1] in "?.!" else question


def _typed(rng: Random, split: str, template: str, distracted_frac: float = DISTRACTED_FRAC) -> str:
    """A question as people type it; in training, some stand among words that have nothing to do with them."""
    text = _casually(rng, template)
    if split != "train":
        return text
    opening = rng.choice(OPENINGS) if rng.random() < EMBEDDED_FRAC else ""
    if rng.random() < distracted_frac:  # the word to find is not simply the unusual one
        opening = rng.choice(docstrings("train"))[1] + " "
    ending = rng.choice(ENDINGS) if rng.random() < EMBEDDED_FRAC else ""
    return opening + text + ending


# Spelling and counting ------------------------------------------------------------------------------------------


@cache
def words(split: str) -> tuple[str, ...]:
    """The words of 4 to 12 letters of a split, from the text that may be trained on."""
    return tuple(word for word in stdlib_corpus.words(stdlib_corpus.train_documents()) if split_of(word) == split)


def _quoted(rng: Random, text: str) -> str:
    mark = rng.choice(["", "", "'", '"'])
    return f"{mark}{text}{mark}"


@dataclass(frozen=True)
class Spelling:
    """A word's letters. Right is a reply that says them and nothing else, but for an introduction before them.

    The introduction may say the word; it counts for nothing, right or wrong.
    """

    name: str = "spelling"

    def conversation(self, split: str, index: int) -> Conversation:
        rng = _rng(self.name, split, index)
        word = rng.choice(words(split))
        question = _typed(rng, split, rng.choice(SPELL[split])).replace("{w}", _quoted(rng, word))
        return _conversation(self.name, question, f"The word '{word}' is spelled {' '.join(word)}")

    def judge(self, conversation: Conversation, reply: Content) -> bool:
        return _spelled_word(answer_text(reply)) == _spelled_word(_reference(conversation))


SPELLED = r"[a-z](?:[ ,.:\n-]{1,3}[a-z])+"  # single letters with separators


def _spelled_word(text: str) -> str | None:
    """What a reply spells after an introduction such as "It is spelled"; None where it says anything else."""
    match = re.fullmatch(rf"(.*(?::|\b(?:spelled|is|are|as)))?\s*({SPELLED})[.!]?", text.strip().lower(), re.DOTALL)
    if not match or re.search(rf"\b{SPELLED}\b", match[1] or ""):
        return None
    return re.sub("[^a-z]", "", match[2])


@dataclass(frozen=True)
class Counting:
    """How often a letter occurs in a word, by the calculator. Right is a reply that ends in the number."""

    name: str = "counting"

    def conversation(self, split: str, index: int) -> Conversation:
        rng = _rng(self.name, split, index)
        word = rng.choice(words(split))
        letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        template = rng.choice(COUNT[split])
        is_plural = re.search(r"\{l\}'?s", template) is not None  # "how many a's", never "how many 'a''s"
        shown = letter if is_plural else _quoted(rng, letter)
        question = _typed(rng, split, template).replace("{w}", _quoted(rng, word)).replace("{l}", shown)
        return _conversation(self.name, question, _with_tool(f" '{word}'.count('{letter}')"))

    def judge(self, conversation: Conversation, reply: Content) -> bool:
        return _ends_in_same_number(conversation, reply)


# Arithmetic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """Two numbers of 1 to 4 digits, + - * /, always by the calculator. Right is a reply that ends in the result."""

    name: str = "arithmetic"

    def conversation(self, split: str, index: int) -> Conversation:
        rng = _rng(self.name, split, index)
        sign = rng.choice("+-*/")
        a, b = _operands(rng, sign)
        while split_of(f"{min(a, b)} {max(a, b)}") != split:  # who has seen 24*37 knows 37*24
            a, b = _operands(rng, sign)
        question = _asked(rng, split, sign).replace("{a}", str(a)).replace("{b}", str(b))
        return _conversation(self.name, question, _with_tool(f"{a}{sign}{b}"))

    def judge(self, conversation: Conversation, reply: Content) -> bool:
        return _ends_in_same_number(conversation, reply)


def _operands(rng: Random, sign: str) -> tuple[int, int]:
    a, b = (rng.randrange(10 ** (size - 1) * (size > 1), 10**size) for size in rng.choices(range(1, 5), k=2))
    if sign == "/":
        b = max(b, 1)
        if rng.random() < 0.6:  # most divisions that people ask for come out even
            a = b * rng.randint(1, 9999 // b)
    return a, b


def _asked(rng: Random, split: str, sign: str) -> str:
    """A question about {a} and {b}."""
    phrases, orders = WORDINGS[sign]
    way = rng.random()
    if way < 0.25:
        text, expression = rng.choice(ORDERS[split]), rng.choice(orders)
        if text.startswith("{e}"):
            expression = expression[0].upper() + expression[1:]
    else:
        symbols = (f"{{a}}{sign}{{b}}", f"{{a}} {sign} {{b}}")
        text, expression = rng.choice(FRAMES[split]), rng.choice(symbols if way < 0.65 else phrases)
    return _typed(rng, split, text).replace("{e}", expression)


# Docstrings -----------------------------------------------------------------------------------------------------

STOP_WORDS = frozenset(re.findall("[a-z]+", "a an the of to in is are for and or if as it its that this be by with on"))
MIN_F1 = 0.5


@cache
def docstrings(split: str) -> tuple[tuple[str, str], ...]:
    """(dotted name, first sentence) in order of name: of held-out modules for "val", else of those trained on."""
    side = stdlib_corpus.val_documents() if split == "val" else stdlib_corpus.train_documents()
    return tuple(sorted(stdlib_corpus.first_sentences(side).items()))


@dataclass(frozen=True)
class Docs:
    """The first sentence of a docstring.

    Right is a reply with F1 of at least 0.5 against it, over lower-case words and numbers without STOP_WORDS.
    """

    name: str = "docs"

    def conversation(self, split: str, index: int) -> Conversation:
        rng = _rng(self.name, split, index)
        name, sentence = rng.choice(docstrings(split))
        shown = f"`{name}`" if rng.random() < 0.5 else name
        return _conversation(self.name, _typed(rng, split, rng.choice(EXPLAIN[split])).replace("{n}", shown), sentence)

    def judge(self, conversation: Conversation, reply: Content) -> bool:
        return word_f1(answer_text(reply), _reference(conversation)) >= MIN_F1


def word_f1(text: str, reference: str) -> float:
    """Twice the shared words over all words of both, as bags of words."""
    ours, theirs = (
        Counter(word for word in re.findall(r"[a-z0-9_]+", side.lower()) if word not in STOP_WORDS)
        for side in (text, reference)
    )
    total = sum(ours.values()) + sum(theirs.values())
    return 2 * sum((ours & theirs).values()) / total if total else 0.0


# Identity -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Who the assistant is and what it can do, greetings included.

    Right is a reply that has the words that the fact needs and an F1 of at least 0.5 against its answer: "No problem, I
    have access to the internet" has the words `no` and `internet` too.
    """

    name: str = "identity"

    def conversation(self, split: str, index: int) -> Conversation:
        rng = _rng(self.name, split, index)
        fact = rng.choice(read_facts())
        wording = rng.choice(fact.questions[split])
        question = _noisy(rng, wording) if split == "train" else wording
        question = _mistyped(rng, _typed(rng, split, question, distracted_frac=0.0))
        if split == "train" and _plain(question) in _held_out():
            question = wording
        return _conversation(self.name, question.lower() if rng.random() < 0.2 else question, fact.answer)

    def judge(self, conversation: Conversation, reply: Content) -> bool:
        wanted, given = _reference(conversation), answer_text(reply)
        fact = next(fact for fact in read_facts() if fact.answer == wanted)
        return fact.accepts(given) and word_f1(given, wanted) >= MIN_F1


def _noisy(rng: Random, question: str) -> str:
    """Some questions lack words and have others too many (random deletion and insertion: Wei and Zou 2019, "EDA")."""
    if rng.random() >= NOISY_FRAC:
        return question
    kept = [word for word in question.split() if rng.random() >= CHANGED_FRAC] or [question]
    for _ in range(sum(rng.random() < CHANGED_FRAC for _ in kept)):
        kept.insert(rng.randrange(len(kept) + 1), rng.choice(_words_of_questions()))
    return " ".join(kept)


@cache
def _words_of_questions() -> tuple[str, ...]:
    texts = [question for fact in read_facts() for question in fact.questions["train"]]
    return tuple(sorted({word for text in texts for word in text.split()}))


def _plain(question: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", question.lower()))


@cache
def _held_out() -> frozenset[str]:
    return frozenset(
        _plain(text) for fact in read_facts() for split in ("val", "test") for text in fact.questions[split]
    )


def _mistyped(rng: Random, question: str) -> str:
    """One time in ten, two neighbouring letters inside a long word are swapped or one of them is missing."""
    places = [match.start() + 1 for match in re.finditer(r"(?<![A-Za-z])[A-Za-z]{5,}", question)]
    if not places or rng.random() >= 0.1:
        return question
    at = rng.choice(places) + rng.randrange(2)
    return question[:at] + rng.choice(["", question[at + 1]]) + question[at] + question[at + 2 :]


# All together ---------------------------------------------------------------------------------------------------

ABILITIES: dict[str, Ability] = {
    ability.name: ability for ability in (Spelling(), Counting(), Arithmetic(), Docs(), Identity())
}
# Docstrings are long and hardly to be learned in minutes, so they get little (dev/LOG.md 2026-11-21).
WEIGHTS: Mapping[str, float] = {"spelling": 5, "counting": 3, "arithmetic": 2, "docs": 0.3, "identity": 7}
GREETED_FRAC = 0.1  # of the conversations of a mixture, which begin with an exchange of greetings


class Mixture(Sequence[Conversation]):
    """Conversations of several abilities, each made when it is asked for, always the same."""

    def __init__(self, num: int, seed: int, split: str, weights: Mapping[str, float]) -> None:
        if not set(weights) <= set(ABILITIES) or min(weights.values(), default=0) < 0 or not sum(weights.values()):
            raise UserError(f"weights {dict(weights)}: give some of {', '.join(ABILITIES)} a weight above 0")
        _rng("mixture", split, 0)  # refuses an unknown split now
        self._num, self._seed, self._split, self._weights = num, seed, split, dict(weights)

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]  # no slices: tasks have their own
        if not 0 <= index < self._num:
            raise IndexError(f"conversation {index} of {self._num}")
        number = self._seed * 2**32 + index
        rng = _rng("mixture", self._split, number)
        ability = rng.choices(list(self._weights), list(self._weights.values()))[0]
        conversation = ABILITIES[ability].conversation(self._split, number)
        if rng.random() < GREETED_FRAC:
            greeting = next(fact for fact in read_facts() if fact.name == "greeting")
            question = _casually(rng, rng.choice(greeting.questions[self._split]))
            conversation["messages"][:0] = _conversation(ability, question, greeting.answer)["messages"]
        return conversation


def mixture(num: int, seed: int = 0, split: str = "train", weights: Mapping[str, float] = WEIGHTS) -> Mixture:
    """`num` conversations that mix the abilities by weight."""
    return Mixture(num, seed, split, weights)
