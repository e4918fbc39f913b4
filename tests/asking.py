"""Questions and answers of generated conversations, for the tests of abilities."""

import re

from nanochat.abilities import ABILITIES
from nanochat.chat import Conversation


def sample(name: str, split: str, num: int = 400) -> list[Conversation]:
    return [ABILITIES[name].conversation(split, index) for index in range(num)]


def question(conversation: Conversation) -> str:
    content = conversation["messages"][-2]["content"]
    assert isinstance(content, str)
    return content


def reply(conversation: Conversation):
    return conversation["messages"][-1]["content"]


FILLERS = {"please", "the", "a", "an", "so", "just", "me", "for", "tell", "can", "could", "would", "you", "word"}


def plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+|[{}+]", text.lower()))


def bare(text: str) -> str:
    """Without words that carry no meaning: two questions that differ in these alone are one wording."""
    return " ".join(word for word in plain(text).split() if word not in FILLERS) or plain(text)
