"""What the test and the validation side of generated conversations hold back from training, and that they do."""

import re
from itertools import combinations, pairwise
from random import Random

import pytest
from asking import bare, plain, question, reply, sample

from nanochat import abilities
from nanochat.abilities import ABILITIES, SPLITS, docstrings, words
from nanochat.knowledge import read_facts
from nanochat.phrasings import ENDINGS, OPENINGS
from nanochat.stdlib_corpus import train_documents, val_documents


def test_words_of_the_splits_are_disjoint_and_many():
    sides = {split: set(words(split)) for split in SPLITS}
    assert all(sides[a].isdisjoint(sides[b]) for a, b in combinations(SPLITS, 2))
    assert len(sides["train"]) >= 7_000  # 10,640 on Python 3.11
    assert len(sides["test"]) >= 500
    assert all(re.fullmatch("[a-z]{4,12}", word) for side in sides.values() for word in side)
    assert {len(word) for word in sides["test"]} == set(range(4, 13))


@pytest.mark.parametrize("name", ["spelling", "counting"])
def test_conversations_are_about_words_of_their_split(name):
    for split in SPLITS:
        for conversation in sample(name, split):
            assert set(words(split)) & set(re.findall("[a-z]+", question(conversation)))
            answer = reply(conversation)
            word = answer.partition("spelled ")[2].replace(" ", "") if isinstance(answer, str) else answer[0]["text"]
            assert re.sub(r"^ '|'\.count.*", "", word) in words(split)


def test_operand_pairs_of_the_splits_are_disjoint_in_either_order():
    pairs: dict[str, set[frozenset[str]]] = {}
    for split in SPLITS:
        calls = [reply(conversation)[0]["text"] for conversation in sample("arithmetic", split, 3000)]
        pairs[split] = {frozenset(re.findall(r"\d+", call)) for call in calls}
        assert {len(number) for pair in pairs[split] for number in pair} == {1, 2, 3, 4}
        assert {re.sub(r"\d", "", call) for call in calls} == set("+-*/")
    assert all(pairs[a].isdisjoint(pairs[b]) for a, b in combinations(SPLITS, 2))


@pytest.mark.parametrize("table", ["SPELL", "COUNT", "FRAMES", "ORDERS", "EXPLAIN"])
def test_phrasings_of_the_splits_are_disjoint(table):
    phrasings = {split: set(map(bare, getattr(abilities, table)[split])) for split in SPLITS}
    assert all(phrasings[split] for split in SPLITS)
    assert all(phrasings[a].isdisjoint(phrasings[b]) for a, b in combinations(SPLITS, 2))
    trained = getattr(abilities, table)["train"]
    spoken = {
        plain(opening + text + ending) for opening in ("", *OPENINGS) for text in trained for ending in ("", *ENDINGS)
    }
    assert spoken.isdisjoint(plain(text) for split in ("val", "test") for text in getattr(abilities, table)[split])


def test_no_question_about_itself_stands_twice():
    asked = [
        (plain(text), fact.name, split) for fact in read_facts() for split in SPLITS for text in fact.questions[split]
    ]
    seen = sorted(asked)
    assert [pair for pair in pairwise(seen) if pair[0][0] == pair[1][0]] == []
    assert len(read_facts()) >= 30
    assert all(len(fact.questions["train"]) >= 8 and len(fact.questions["test"]) >= 3 for fact in read_facts())


def test_no_question_about_itself_is_a_trained_one_in_other_words_of_no_meaning():
    trained = {bare(text) for fact in read_facts() for text in fact.questions["train"]}
    held_out = [text for fact in read_facts() for split in ("val", "test") for text in fact.questions[split]]
    assert [text for text in held_out if bare(text) in trained] == []


@pytest.mark.parametrize("name", ABILITIES)
def test_no_held_out_question_is_trained_on(name):
    trained = {plain(question(conversation)) for conversation in sample(name, "train", 4000)}
    for split in ("val", "test"):
        assert trained.isdisjoint(plain(question(conversation)) for conversation in sample(name, split, 1000))


def test_a_noisy_question_about_itself_never_becomes_a_held_out_one(monkeypatch):
    fact = read_facts()[0]
    held_out = fact.questions["test"][0]
    monkeypatch.setattr(abilities, "_noisy", lambda rng, question: held_out)
    asked = {question(conversation) for conversation in sample("identity", "train", 300)}
    assert plain(held_out) not in set(map(plain, asked)) and len(asked) > 200


def test_only_training_questions_about_itself_are_noisy(monkeypatch):
    def listed(split: str) -> int:
        known = {plain(text) for fact in read_facts() for text in fact.questions[split]}
        return sum(plain(question(conversation)) in known for conversation in sample("identity", split, 2000))

    noisy = {split: listed(split) for split in SPLITS}
    monkeypatch.setattr(abilities, "NOISY_FRAC", 0.0)
    assert listed("train") - noisy["train"] > 100  # the rest: openings, endings, typing errors
    assert {split: listed(split) for split in ("val", "test")} == {split: noisy[split] for split in ("val", "test")}
    assert min(noisy["val"], noisy["test"]) > 1800  # typing errors alone


def test_noise_removes_and_adds_words(monkeypatch):
    monkeypatch.setattr(abilities, "NOISY_FRAC", 1.0)
    monkeypatch.setattr(abilities, "CHANGED_FRAC", 1 / 3)
    words_asked = ["one", "two", "three", "four", "five", "six"]
    made = [abilities._noisy(Random(seed), " ".join(words_asked)).split() for seed in range(200)]
    kept = [[word for word in words if word in words_asked] for words in made]
    assert any(len(words) < 6 for words in kept) and any(set(words) - set(words_asked) for words in made)
    assert all(sorted(words, key=words_asked.index) == words for words in kept)


@pytest.mark.parametrize("name", ["spelling", "counting", "arithmetic", "docs"])
def test_openings_and_endings_stand_around_training_questions_alone(name):
    def is_embedded(text: str) -> bool:
        return text.startswith(("By the way, ", "Excuse me, ", "We had a bet. ")) or text.endswith((" plz", " asap"))

    assert any(is_embedded(question(conversation)) for conversation in sample(name, "train", 1000))
    for split in ("val", "test"):
        assert not any(is_embedded(question(conversation)) for conversation in sample(name, split, 1000))


def test_sentences_of_the_library_stand_before_training_questions_alone():
    sentences = tuple(f"{sentence} " for _, sentence in docstrings("train"))
    for name in ABILITIES.keys() - {"identity"}:
        shares = {
            split: sum(question(conversation).startswith(sentences) for conversation in sample(name, split, 500))
            for split in SPLITS
        }
        assert 25 < shares["train"] < 100 and shares["val"] == shares["test"] == 0


def test_docstrings_follow_the_side_of_their_module():
    def modules(documents):
        return {document.owner for document in documents}

    assert modules(train_documents()).isdisjoint(modules(val_documents()))
    assert set(docstrings("train")) == set(docstrings("test"))
    assert {name for name, _ in docstrings("train")}.isdisjoint(name for name, _ in docstrings("val"))
    assert len(docstrings("train")) > 1000
    assert len(docstrings("val")) > 50
