"""Talk to a model on the command line.

    python -m scripts.chat_cli                          # a conversation; /help tells what can be typed, Ctrl-D leaves
    python -m scripts.chat_cli -p "How many r are in strawberry?"
    python -m scripts.chat_cli --source=base -p "Once upon a time"     # a base model continues the text

When a conversation outgrows the context, its oldest turns are forgotten first, and a note on stderr says so. Ctrl-C
stops an answer; what was said stays said. docs/chat.md has more.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nanochat import cli
from nanochat.common import UserError, base_dir, prepare_process, printable
from nanochat.terminal.keyboard import ReadLine, open_editor, read_message
from nanochat.terminal.settings import SAMPLING, SETTINGS

if TYPE_CHECKING:
    from nanochat.engine import Engine
    from nanochat.terminal.session import Session
    from nanochat.tokenizer import Tokenizer


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_choice_flags(parser, default="sft")
    parser.flag("--prompt", cli.some_text, None, "answer this once and leave", "-p")
    for setting in SETTINGS:
        if setting.name != "seed":  # which all recipes have
            parser.flag(setting.flag, setting.kind, setting.default, setting.help, *setting.letters)
    parser.switch("--python-tool", "the model may run Python programs, in the sandbox")
    cli.add_engine_flags(parser)
    cli.add_device_flags(parser)
    alone = "--python-tool: a base model calls no tools; leave the flag out, or take another --source"
    parser.check(lambda args: alone if args.python_tool and args.source == "base" else None)
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    from nanochat.checkpoint import find_checkpoint
    from nanochat.engine import Engine
    from nanochat.parallel import runtime
    from nanochat.terminal.session import Session

    python = open_python_tool() if args.python_tool else None
    checkpoint = find_checkpoint(args.source, args.model_tag, args.step)
    if not args.model_tag:
        print(f"model: {checkpoint.folder}", file=sys.stderr)
    tokenizer = checkpoint.tokenizer()
    settings = {setting.name: getattr(args, setting.name) for setting in SETTINGS}
    with runtime(args.device_type) as rt:
        model = checkpoint.build_model(rt.device, rt.dtype).for_decoding(args.int8)
        stop_ids = [tokenizer.bos, tokenizer.special("<|assistant_end|>")]
        engine = Engine(model, stop_ids, deterministic=args.deterministic)
        if args.source == "base":
            continue_text(engine, tokenizer, args.prompt or "", settings)
            return
        session = Session(engine, tokenizer, settings, python)
        if not args.prompt:
            start_conversation(session)
            return
        session.say(args.prompt)
        if session.answer().is_stopped:
            raise KeyboardInterrupt


def open_python_tool() -> Callable[[str], str]:
    """The sandbox as a function from a program to its output. Raises UserError where it does not hold."""
    from nanochat.python_tool import python_tool
    from nanochat.sandbox.execute import execute_code

    return python_tool(execute_code)


def start_conversation(session: "Session") -> None:
    """With line editing and a history where there is a terminal."""
    from nanochat.terminal.commands import COMMANDS

    if sys.stdin is None:  # closed
        raise UserError("there is no input to read messages from; ask with -p, or open stdin")
    editor = open_editor(base_dir() / "chat_history.jsonl", [f"/{name}" for name in COMMANDS])
    converse(session, remember=editor.remember if editor else lambda message: None)


def converse(session: "Session", read_line: ReadLine = input, remember: Callable[[str], None] = lambda _: None) -> None:
    """Read, answer or obey, until the user leaves."""
    from nanochat.terminal.commands import QUIT, answer_to, run_command
    from nanochat.terminal.session import interruptible

    print(f"/help lists what you can type; Ctrl-C stops an answer, twice it leaves; seed {session.settings['seed']}")
    was_dropped = False  # the last message, by Ctrl-C
    while True:
        try:
            print()
            message = read_message(read_line)
        except (EOFError, KeyboardInterrupt) as end:
            print()
            if was_dropped or isinstance(end, EOFError):
                return
            was_dropped = True
            continue
        was_dropped = False
        if not message.strip():
            continue
        remember(message.rstrip())
        if message.strip() in QUIT:
            return
        try:
            with interruptible():  # Ctrl-C that comes a little too late for an answer ends nothing
                run_command(session, message) or answer_to(session, message)
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        except KeyboardInterrupt:  # pressed again and again
            print()


def continue_text(engine: "Engine", tokenizer: "Tokenizer", text: str, settings: dict[str, Any]) -> None:
    """Print a text and what a base model writes after it; of a long one it reads the end."""
    from nanochat.chat import TextStream, prompt_room, terminal_text
    from nanochat.engine import Sampling

    room = prompt_room(engine.model.config.sequence_len, settings["max_tokens"], shortest=1)
    prompt = tokenizer.encode(text, prepend=tokenizer.bos)
    if len(prompt) > room:
        print(f"note: of {len(prompt)} tokens the model sees only the last {room}", file=sys.stderr)
        prompt = [tokenizer.bos, *prompt[len(prompt) - (room - 1) :]]
    sampling = Sampling(seed=settings["seed"], **{name: settings[name] for name in SAMPLING})
    stream = TextStream(tokenizer)
    print(text, end="", flush=True)
    for token in engine.generate(prompt, settings["max_tokens"], sampling):
        print(terminal_text(stream.push(token.token_id)), end="", flush=True)
    print(stream.flush(), flush=True)


if __name__ == "__main__":
    cli.run(main)
