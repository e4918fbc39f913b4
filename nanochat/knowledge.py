"""What the assistant says about itself, read from `knowledge.md`, the one place of these facts.

A fact is a heading `### name`, its answer (one paragraph), and a list: `needs` the words that a right answer must have
(`no/not` means either one), and the questions that ask for it, apart for training (`train`), validation and test.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nanochat.common import UserError

FIELDS = ("needs", "train", "val", "test")
# Nobody's answer about itself: a reply with one of these is wrong unless the fact's own answer has it too.
OTHERS = ("chatgpt", "openai", "claude", "anthropic", "gemini", "llama", "deepmind", "google", "meta")


@dataclass(frozen=True)
class Fact:
    """One thing to know, how it is asked for, and what its answer must say."""

    name: str
    answer: str
    needs: tuple[tuple[str, ...], ...]  # of every inner tuple, one word or phrase
    questions: dict[str, tuple[str, ...]]  # by split

    def accepts(self, reply: str) -> bool:
        """Whether the reply has every needed word and no name that does not belong here."""
        wrong = (name for name in OTHERS if name not in self.answer.lower())
        return all(any(_says(reply, word) for word in words) for words in self.needs) and not any(
            _says(reply, name) for name in wrong
        )


def _says(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text.lower()) is not None


@cache
def read_facts(path: Path | None = None) -> tuple[Fact, ...]:
    """The facts of a file, by default the knowledge.md beside this module. UserError where one is incomplete."""
    path = path or Path(__file__).with_name("knowledge.md")
    sections = re.split(r"^### ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return tuple(_fact(section, path) for section in sections[1:])


def _fact(section: str, path: Path) -> Fact:
    name, _, rest = section.partition("\n")
    body = re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]  # up to the next heading
    answer, *items = re.split(r"^- ", body.strip(), flags=re.MULTILINE)
    fields = {key: " ".join(value.split()) for key, _, value in (item.partition(":") for item in items)}
    if not answer.strip() or set(fields) != set(FIELDS) or not all(fields.values()):
        raise UserError(f"{path}, fact {name!r}: needs an answer and a list with exactly {', '.join(FIELDS)}")
    return Fact(
        name=name.strip(),
        answer=" ".join(answer.split()),
        needs=tuple(tuple(either.split("/")) for either in fields["needs"].lower().split(", ")),
        questions={split: tuple(fields[split].split(" | ")) for split in FIELDS[1:]},
    )
