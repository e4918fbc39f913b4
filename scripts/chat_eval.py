"""Ask a chat model held-out questions of every ability, and judge its answers.

    python -m scripts.chat_eval                                   # the newest fine-tuned model, 500 questions each
    python -m scripts.chat_eval --abilities=spelling,arithmetic --max-problems=100
    python -m scripts.chat_eval --split=val                       # for choosing between models: test is for the last

Greedy answers, decoded side by side. No question is asked twice: a second greedy answer would be a copy, no trial. So
an ability with fewer different questions has a smaller n. Rates come with Wilson's 95 % interval; the last line is
JSON. An evaluation of all abilities on the test side leaves a record for the report, unless it has a larger one of the
same model; a part of it leaves none.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from nanochat import cli
from nanochat.common import (
    UserError,
    prepare_process,
    print0,
    read_record,
    record_path,
    record_stage,
    show_progress,
    to_json,
)

if TYPE_CHECKING:
    from nanochat.abilities import Ability
    from nanochat.chat import Conversation
    from nanochat.evals.chat import Answer

DRAWS_PER_PROBLEM = 20  # an ability that has not given enough different questions by then has no more of them


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_choice_flags(parser, default="sft")
    parser.flag("--abilities", str, "", "names separated by commas; empty: all", "-a")
    parser.flag("--max-problems", cli.positive_int, 500, "most questions per ability", "-x")
    parser.flag("--split", cli.one_of("test", "val"), "test", "side whose questions are asked")
    parser.flag("--max-new-tokens", cli.positive_int, 64, "longest answer", "-m")
    parser.flag("--batch-size", cli.positive_int, 64, "questions decoded side by side", "-b")
    cli.add_engine_flags(parser)
    cli.add_device_flags(parser)
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    from nanochat.abilities import ABILITIES
    from nanochat.checkpoint import find_checkpoint
    from nanochat.engine import Engine
    from nanochat.evals.chat import answer_all, wilson_interval
    from nanochat.parallel import runtime

    names = args.abilities.split(",") if args.abilities else list(ABILITIES)
    unknown = [name for name in names if name not in ABILITIES]
    if unknown:
        raise UserError(f"--abilities: {', '.join(unknown)} unknown; there are {', '.join(ABILITIES)}")
    checkpoint = find_checkpoint(args.source, args.model_tag, args.step)
    tokenizer = checkpoint.tokenizer()
    with runtime(args.device_type) as rt, record_stage("chat_eval") as record:
        model = checkpoint.build_model(rt.device, rt.dtype).for_decoding(args.int8)
        stop_ids = [tokenizer.bos, tokenizer.special("<|assistant_end|>")]
        engine = Engine(model, stop_ids, args.batch_size, prefix_cache_bytes=0, deterministic=args.deterministic)
        results: dict[str, object] = {}
        samples: list[dict[str, object]] = []
        for name in names:
            ability = ABILITIES[name]
            questions = distinct_questions(ability, args.split, args.max_problems)
            on_progress = partial(show_progress, name, total=len(questions))
            answers = answer_all(
                engine, tokenizer, questions, ability.judge, args.max_new_tokens, args.batch_size, on_progress
            )
            right = sum(answer.is_right for answer in answers)
            low, high = wilson_interval(right, len(answers))
            results[name] = {"accuracy": right / len(answers), "n": len(answers), "interval": [low, high]}
            interval = f"95 %: {100 * low:.1f} to {100 * high:.1f}, {len(answers)} questions"
            print0(f"{name:<12} {100 * right / len(answers):5.1f} %  ({interval})")
            for answer in one_right_one_wrong(answers):
                question = question_of(answer.conversation)
                samples.append({"question": question, "reply": answer.text, "right": answer.is_right})
        result = {"model": str(checkpoint.folder), "step": checkpoint.step, "abilities": results}
        is_whole = args.split == "test" and set(names) == set(ABILITIES)
        if is_whole and args.max_problems >= problems_on_record(checkpoint.fingerprint):
            record.update(result, fingerprint=checkpoint.fingerprint, samples=samples, flags=vars(args))
        else:
            print0("note: a part of the evaluation, or a smaller one, so the report keeps the record that it has")
        print0(to_json({**result, "split": args.split}))


def problems_on_record(fingerprint: str) -> int:
    """--max-problems of the evaluation that the report has of a model; 0 where it has none."""
    try:
        record = read_record(record_path("chat_eval"))
    except UserError:  # there is none, or it is damaged
        return 0
    return int(record["flags"]["max_problems"]) if record.get("fingerprint") == fingerprint else 0


def distinct_questions(ability: "Ability", split: str, at_most: int) -> "list[Conversation]":
    """The first conversations of a split that ask different questions, case and final punctuation aside."""
    found: dict[str, Conversation] = {}
    for index in range(DRAWS_PER_PROBLEM * at_most):
        conversation = ability.conversation(split, index)
        found.setdefault(question_of(conversation).casefold().rstrip("?.! "), conversation)
        if len(found) == at_most:
            break
    return list(found.values())


def question_of(conversation: "Conversation") -> str:
    """The user's last message; the message behind it is the right answer."""
    return str(conversation["messages"][-2]["content"])


def one_right_one_wrong(answers: "Sequence[Answer]") -> "list[Answer]":
    """The first right and the first wrong answer, where there are such: what the report shows."""
    first = {answer.is_right: answer for answer in reversed(answers)}
    return [first[is_right] for is_right in (True, False) if is_right in first]


if __name__ == "__main__":
    cli.run(main)
