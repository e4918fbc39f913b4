"""Ask a chat model held-out questions of every ability, and judge its answers.

    python -m scripts.chat_eval                                   # the newest fine-tuned model, 500 questions each
    python -m scripts.chat_eval --abilities=spelling,arithmetic --max-problems=100
    python -m scripts.chat_eval --split=val                       # for choosing between models: test is for the last

Greedy answers, decoded side by side. Rates come with Wilson's 95 % interval; the last line is JSON.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanochat import cli
from nanochat.common import UserError, prepare_process, print0, record_stage

if TYPE_CHECKING:
    from nanochat.evals.chat import Answer


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_choice_flags(parser, default="sft")
    parser.flag("--abilities", str, "", "names separated by commas; empty: all", "-a")
    parser.flag("--max-problems", cli.positive_int, 500, "questions per ability", "-x")
    parser.flag("--split", cli.one_of("test", "val"), "test", "side whose questions are asked")
    parser.flag("--max-new-tokens", cli.positive_int, 64, "longest answer", "-m")
    parser.flag("--batch-size", cli.positive_int, 64, "questions decoded side by side", "-b")
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
        model = checkpoint.build_model(rt.device, rt.dtype)
        engine = Engine(model, stop_ids=[tokenizer.bos, tokenizer.special("<|assistant_end|>")])
        results: dict[str, object] = {}
        samples: list[dict[str, object]] = []
        for name in names:
            ability = ABILITIES[name]
            questions = [ability.conversation(args.split, i) for i in range(args.max_problems)]
            answers = answer_all(engine, tokenizer, questions, ability.judge, args.max_new_tokens, args.batch_size)
            right = sum(answer.is_right for answer in answers)
            low, high = wilson_interval(right, len(answers))
            results[name] = {"accuracy": right / len(answers), "n": len(answers), "interval": [low, high]}
            print0(f"{name:<12} {100 * right / len(answers):5.1f} %  (95 %: {100 * low:.1f} to {100 * high:.1f})")
            for answer in one_right_one_wrong(answers):
                question = str(answer.conversation["messages"][-2]["content"])
                samples.append({"question": question, "reply": answer.text, "right": answer.is_right})
        print0(json.dumps({"model": str(checkpoint.folder), "split": args.split, "abilities": results}))
        if args.split == "test":
            record.update(model=str(checkpoint.folder), step=checkpoint.step, abilities=results, samples=samples)


def one_right_one_wrong(answers: "Sequence[Answer]") -> "list[Answer]":
    """The first right and the first wrong answer, where there are such: what the report shows."""
    first = {answer.is_right: answer for answer in reversed(answers)}
    return [first[is_right] for is_right in (True, False) if is_right in first]


if __name__ == "__main__":
    cli.run(main)
