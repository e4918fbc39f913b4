"""Generated conversations: right answers, strict judges, the same in every process."""

import hashlib
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from asking import question, reply, sample

from nanochat.abilities import ABILITIES, SPLITS, answer_text, mixture, split_of, word_f1, words
from nanochat.calculator import calculate
from nanochat.chat import check_conversation, conversation_text, render_conversation
from nanochat.common import UserError
from nanochat.knowledge import read_facts
from nanochat.stdlib_corpus import train_documents
from nanochat.tokenizer import Tokenizer

EVERY = [(name, split) for name in ABILITIES for split in SPLITS]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Learned from what the main job's is: text that is pretrained on, and conversations."""
    conversations = [conversation_text(conversation) for conversation in mixture(5000)]
    return Tokenizer.train([*conversations, *(document.text for document in train_documents())], 2048)


# What all abilities promise -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), EVERY)
def test_every_conversation_is_valid_and_its_own_answer_is_judged_right(name, split):
    for conversation in sample(name, split):
        check_conversation(conversation)
        assert conversation["subject"] == name
        assert ABILITIES[name].judge(conversation, reply(conversation))
        assert ABILITIES[name].judge(conversation, answer_text(reply(conversation)))
        parts = reply(conversation)
        for text in [parts] if isinstance(parts, str) else [part["text"] for part in parts]:
            assert text.isascii() and text.isprintable() and text


@pytest.mark.parametrize(("name", "split"), EVERY)
def test_answers_of_other_conversations_are_judged_wrong(name, split):
    conversations = sample(name, split, 60)
    ability = ABILITIES[name]
    right = wrong = 0
    for one, other in combinations(conversations, 2):
        if answer_text(reply(one)) != answer_text(reply(other)):
            wrong += not ability.judge(one, reply(other))
            right += ability.judge(one, reply(other))
    assert wrong > 500
    assert right <= (0.02 * wrong if name == "docs" else 0)  # two docstrings can be nearly the same sentence


@pytest.mark.parametrize("name", ABILITIES)
def test_an_empty_reply_and_the_repeated_question_are_judged_wrong(name):
    for conversation in sample(name, "test", 100):
        assert not ABILITIES[name].judge(conversation, "")
        assert not ABILITIES[name].judge(conversation, [])
        if name not in ("identity", "arithmetic"):
            assert not ABILITIES[name].judge(conversation, question(conversation))


def test_conversations_are_the_same_in_another_process_with_another_hash_seed():
    program = (
        "import json; from nanochat.abilities import *;"
        "print(json.dumps([[a.conversation(s, 7) for s in SPLITS] for a in ABILITIES.values()] + list(mixture(50, 3))))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "99", "PATH": "", "PYTHONIOENCODING": "utf-8"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    here = [[ability.conversation(split, 7) for split in SPLITS] for ability in ABILITIES.values()]
    assert json.loads(output) == [*here, *mixture(50, 3)]


def test_conversations_differ_from_index_to_index():
    for name in ABILITIES:
        assert len({json.dumps(conversation) for conversation in sample(name, "train", 200)}) > 100


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="'valid' is unknown; there are train, val, test"):
        ABILITIES["spelling"].conversation("valid", 0)


# Spelling and counting ------------------------------------------------------------------------------------------


def test_a_spelled_word_is_one_token_per_letter(tokenizer):
    for conversation in sample("spelling", "train", 300):
        answer = reply(conversation)
        letters = answer.partition(" is spelled")[2]
        ids = tokenizer.encode(answer)
        tail = ids[-len(letters) // 2 :]
        assert tokenizer.decode(tail) == letters
        assert [tokenizer.decode([token]) for token in tail] == [f" {letter}" for letter in letters.split()]
    assert all(len(tokenizer.encode(f" {letter}")) == 1 for letter in LETTERS)


def test_a_quoted_word_has_the_same_tokens_in_question_and_call(tokenizer):
    def inside(text: str, word: str) -> list[int]:
        ids = tokenizer.encode(text)
        before = tokenizer.encode(text[: text.index(word)])
        return ids[len(before) : len(before) + len(tokenizer.encode(word))]

    for word in words("test")[:200]:
        wanted = tokenizer.encode(word)
        assert inside(f"How many a are in '{word}'?", word) == wanted
        assert inside(f" '{word}'.count('a')", word) == wanted


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("It is spelled b a n a n a", True),
        ("The word 'banana' is spelled b a n a n a", True),
        ("The word 'banana' is spelled b a n a n o", False),
        ("The word 'bananas' is spelled b a n a n a", True),  # what is spelled counts, not what introduces it
        ("The word 'banana' is spelled", False),
        ("b-a-n-a-n-a", True),
        ("B, A, N, A, N, A.", True),
        ("B - A - N - A - N - A", True),
        ("The letters are: b a n a n a!", True),
        ("It is spelled\nb a n a n a", True),
        ("banana", False),
        ("It is spelled b a n a n", False),
        ("It is spelled b a n a n a s", False),
        ("b a n a n a or b a n a n o", False),
        ("b a n a n o is b a n a n a", False),
        ("It is spelled b a n a n a ing", False),
        ("un b a n a n a", False),
        ("It is spelled b a n a n a's", False),
        ("b a n a n a_s", False),
        ("b a n a n a 5 x", False),
    ],
)
def test_spelling_is_judged_by_its_letters(text, is_right):
    messages = [
        {"role": "user", "content": "Spell banana"},
        {"role": "assistant", "content": "It is spelled b a n a n a"},
    ]
    assert ABILITIES["spelling"].judge({"messages": messages}, text) == is_right


@pytest.mark.parametrize("ability", [ABILITIES["counting"], ABILITIES["arithmetic"]])
@pytest.mark.parametrize("split", SPLITS)
def test_every_output_is_the_calculators_own(ability, split):
    for index in range(1500):
        call, output, text = reply(ability.conversation(split, index))
        assert [call["type"], output["type"], text["type"]] == ["python", "python_output", "text"]
        assert output["text"] == calculate(call["text"])
        assert text["text"] == f"The answer is {output['text']}."


def test_the_letter_of_a_count_is_mostly_in_the_word():
    outputs = [reply(conversation)[1]["text"] for conversation in sample("counting", "train", 2000)]
    assert 0.05 < outputs.count("0") / len(outputs) < 0.2
    assert {"1", "2", "3"} <= set(outputs)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("The answer is 888.", True),
        ("37*24 = 888", True),
        ("It is 888.0", True),
        ("888 is what 37 times 24 gives", False),
        ("The answer is 887.", False),
        ("The answer is -888.", False),
        ("eight hundred", False),
        ([{"type": "python_output", "text": "888"}], False),
        ([{"type": "python", "text": "1+1"}, {"type": "text", "text": "The answer is 888."}], True),
    ],
)
def test_arithmetic_is_judged_by_the_last_number_of_the_text(text, is_right):
    messages = [{"role": "user", "content": "What is 37*24?"}, {"role": "assistant", "content": "The answer is 888."}]
    assert ABILITIES["arithmetic"].judge({"messages": messages}, text) == is_right


# Docstrings and identity ----------------------------------------------------------------------------------------


def test_docstrings_are_judged_by_shared_words():
    assert word_f1("Split a pathname.", "split the PATHNAME") == 1
    assert word_f1("", "Split a pathname.") == 0
    assert word_f1("Split a string", "Split a pathname.") == pytest.approx(0.5)
    assert word_f1("the of a", "Split a pathname") == 0


def test_every_fact_accepts_its_own_answer_and_no_other():
    facts = read_facts()
    assert [
        (one.name, other.name) for one in facts for other in facts if one.accepts(other.answer) != (one is other)
    ] == []
    assert len({fact.answer for fact in facts}) == len(facts)


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("spelling", "Yes, I cannot spell"),
        ("internet", "No problem, I have access to the internet"),
        ("licence", "I am not MIT licensed"),
        ("other", "No, nanochat? I am another company's assistant"),
    ],
)
def test_the_needed_words_alone_are_no_right_answer(name, reply):
    fact = next(fact for fact in read_facts() if fact.name == name)
    messages = [{"role": "user", "content": fact.questions["test"][0]}, {"role": "assistant", "content": fact.answer}]
    assert ABILITIES["identity"].judge({"messages": messages}, fact.answer)
    assert not ABILITIES["identity"].judge({"messages": messages}, reply)


def test_a_reply_that_claims_to_be_another_assistant_is_wrong():
    name = next(fact for fact in read_facts() if fact.name == "name")
    assert name.accepts("Well, my name is nanochat!")
    assert not name.accepts("My name is nanochat, made by OpenAI.")
    assert not name.accepts("My name is ChatGPT.")


def test_every_fact_of_the_knowledge_file_is_asked_for():
    answers = {reply(conversation) for conversation in sample("identity", "train", 2000)}
    assert answers == {fact.answer for fact in read_facts()}


def test_greetings_in_other_languages_are_answered_kindly_in_english():
    foreign = next(fact for fact in read_facts() if fact.name == "foreign")
    assert any(not text.isascii() for text in foreign.questions["test"])
    assert foreign.answer.isascii() and "English" in foreign.answer and "Greetings" in foreign.answer


def test_a_fact_without_questions_is_refused(tmp_path):
    path = tmp_path / "facts.md"
    path.write_text("### name\nIt is x.\n- needs: x\n- train: What?\n- val: Who?\n")
    with pytest.raises(UserError, match=r"facts.md, fact 'name': needs an answer and a list with exactly needs, train"):
        read_facts(path)


# Mixtures -------------------------------------------------------------------------------------------------------


def test_a_mixture_follows_its_weights_and_seed():
    weights = {"spelling": 3.0, "arithmetic": 1.0, "identity": 0.0}
    names = [conversation["subject"] for conversation in mixture(2000, 1, "train", weights)]
    assert set(names) == {"spelling", "arithmetic"}
    assert 0.7 < names.count("spelling") / 2000 < 0.8
    assert list(mixture(20, 1)) == list(mixture(20, 1)) != list(mixture(20, 2))
    assert list(mixture(10, 1)) == list(mixture(20, 1))[:10]


def test_some_conversations_of_a_mixture_begin_with_greetings_and_are_judged_alike():
    conversations = list(mixture(1000, 5))
    greeted = [conversation for conversation in conversations if len(conversation["messages"]) == 4]
    assert 50 < len(greeted) < 160
    for conversation in conversations:
        check_conversation(conversation)
        assert ABILITIES[conversation["subject"]].judge(conversation, reply(conversation))


def test_a_mixture_of_a_thousand_is_short_in_tokens(tokenizer):
    lengths = [len(render_conversation(tokenizer, conversation)[0]) for conversation in mixture(300, 0)]
    assert sum(lengths) / len(lengths) < 60
    assert max(lengths) < 150


@pytest.mark.parametrize("weights", [{}, {"spelling": 0}, {"spelling": -1, "docs": 2}, {"poetry": 1}])
def test_weights_that_choose_nothing_are_refused(weights):
    with pytest.raises(UserError, match="weights"):
        mixture(10, 0, "train", weights)


def test_the_words_of_a_split_do_not_depend_on_the_others():
    number = int.from_bytes(hashlib.sha256(b"banana").digest()[:4], "big") % 100
    assert split_of("banana") == ("val" if number < 4 else "test" if number < 12 else "train")
