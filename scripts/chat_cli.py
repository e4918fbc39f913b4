"""Talk to a model on the command line.

    python -m scripts.chat_cli                          # a conversation; quit or Ctrl-D ends it, clear starts anew
    python -m scripts.chat_cli -p "How many r are in strawberry?"
    python -m scripts.chat_cli --source=base -p "Once upon a time"     # a base model continues the text

When a conversation outgrows the context, its oldest turns are forgotten first, and a note on stderr says so. Ctrl-C
stops an answer; what was said stays said.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanochat import cli
from nanochat.common import prepare_process
from nanochat.serve.limits import MAX_TEMPERATURE, Defaults

if TYPE_CHECKING:
    from nanochat.chat import Message, Part, ReplyReader
    from nanochat.engine import Engine, Sampling
    from nanochat.tokenizer import Tokenizer


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_choice_flags(parser, default="sft")
    parser.flag("--prompt", cli.some_text, None, "answer this once and leave", "-p")
    temperature, known = cli.number_between(0, MAX_TEMPERATURE), Defaults()
    parser.flag("--temperature", temperature, known.temperature, "0 always takes the likeliest token", "-t")
    parser.flag("--top-k", cli.non_negative_int, known.top_k, "sample among the k likeliest tokens, 0 among all", "-k")
    parser.flag("--max-tokens", cli.positive_int, 256, "longest answer in tokens", "-m")
    cli.add_device_flags(parser)
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    from nanochat.chat import ReplyReader
    from nanochat.checkpoint import find_checkpoint
    from nanochat.engine import Engine, Sampling
    from nanochat.parallel import runtime

    checkpoint = find_checkpoint(args.source, args.model_tag, args.step)
    if not args.model_tag:
        print(f"model: {checkpoint.folder}", file=sys.stderr)
    tokenizer = checkpoint.tokenizer()
    with runtime(args.device_type) as rt:
        model = checkpoint.build_model(rt.device, rt.dtype)
        engine = Engine(model, stop_ids=[tokenizer.bos, tokenizer.special("<|assistant_end|>")])
        sampling = Sampling(args.temperature, args.top_k, args.seed)
        if args.source == "base":
            continue_text(engine, tokenizer, args, sampling)
        elif args.prompt:
            question: Message = {"role": "user", "content": args.prompt}
            answer(engine, tokenizer, [question], args.max_tokens, sampling, ReplyReader(tokenizer))
        else:
            converse(engine, tokenizer, args, sampling)


def converse(engine: "Engine", tokenizer: "Tokenizer", args: Namespace, sampling: "Sampling") -> None:
    """Read, answer, remember, until the user leaves. Every answer draws from a seed of its own."""
    from dataclasses import replace

    from nanochat.chat import ReplyReader

    print("quit ends the conversation, clear starts a new one; Ctrl-C stops an answer or drops a line, twice it leaves")
    messages: list[Message] = []
    dropped = False  # the last line, by Ctrl-C
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt) as end:
            print()
            if dropped or isinstance(end, EOFError):
                return
            dropped = True
            continue
        dropped = False
        if text in ("quit", "exit"):
            return
        if text == "clear":
            messages.clear()
        elif text:
            messages.append({"role": "user", "content": text})
            print("\nassistant: ", end="", flush=True)
            reply = ReplyReader(tokenizer)
            own_seed = replace(sampling, seed=sampling.seed + len(messages))
            try:
                answer(engine, tokenizer, messages, args.max_tokens, own_seed, reply)
            except KeyboardInterrupt:
                print("(stopped)")
            messages.append({"role": "assistant", "content": reply.parts})


def answer(
    engine: "Engine",
    tokenizer: "Tokenizer",
    messages: "list[Message]",
    max_tokens: int,
    sampling: "Sampling",
    reply: "ReplyReader",
) -> None:
    """Read the assistant's answer into `reply` and print it as it comes, tool calls in brackets."""
    from nanochat.tools import CalculatorHook

    prompt = fitting_prompt(tokenizer, messages, engine.model.config.sequence_len, max_tokens)
    show = PartPrinter()
    try:
        for token in engine.generate(prompt, max_tokens, sampling, hooks=[CalculatorHook(tokenizer)]):
            show(reply.push(token.token_id))
    finally:  # also of an answer that Ctrl-C stops
        show(reply.flush())
        show.end()


def fitting_prompt(tokenizer: "Tokenizer", messages: "list[Message]", context: int, max_tokens: int) -> list[int]:
    """The conversation's ids, shortened so that the answer has room: as much as it may want, or half of the context."""
    from nanochat.chat import prompt_room, render_for_completion

    room = prompt_room(context, max_tokens)
    prompt = render_for_completion(tokenizer, {"messages": messages}, sys.maxsize)
    if len(prompt) > room:
        tell_shortened(len(prompt), room)
        prompt = render_for_completion(tokenizer, {"messages": messages}, room)
    return prompt


def tell_shortened(num_tokens: int, room: int) -> None:
    print(f"note: of {num_tokens} tokens only the last {room} or fewer fit; the beginning is left out", file=sys.stderr)


class PartPrinter:
    """Prints message parts as they grow: text as it is (but no escape sequences), tool calls as [37*24] [= 888]."""

    def __init__(self) -> None:
        from nanochat.chat import terminal_text

        self._shown = terminal_text
        self._kind = "text"
        self._openings = {"text": "", "python": "[", "python_output": "[= "}

    def __call__(self, parts: "list[Part]") -> None:
        for part in parts:
            if part["type"] != self._kind:
                self._close()
                self._kind = part["type"]
                print(self._openings[self._kind], end="")
            print(self._shown(part["text"]), end="", flush=True)

    def end(self) -> None:
        self._close()
        print(flush=True)

    def _close(self) -> None:
        if self._kind != "text":
            print("] ", end="")
        self._kind = "text"


def continue_text(engine: "Engine", tokenizer: "Tokenizer", args: Namespace, sampling: "Sampling") -> None:
    """Print --prompt (or nothing) and what a base model writes after it; of a long prompt it reads the end."""
    from nanochat.chat import TextStream, prompt_room, terminal_text

    room = prompt_room(engine.model.config.sequence_len, args.max_tokens, shortest=1)
    prompt = tokenizer.encode(args.prompt or "", prepend=tokenizer.bos)
    if len(prompt) > room:
        tell_shortened(len(prompt), room)
        prompt = [tokenizer.bos, *prompt[len(prompt) - (room - 1) :]]
    stream = TextStream(tokenizer)
    print(args.prompt or "", end="", flush=True)
    for token in engine.generate(prompt, args.max_tokens, sampling):
        print(terminal_text(stream.push(token.token_id)), end="", flush=True)
    print(stream.flush(), flush=True)


if __name__ == "__main__":
    cli.run(main)
