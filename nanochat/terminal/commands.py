"""Slash commands: `/name`, then what it is about. `COMMANDS` lists them for /help, Tab and the loop alike.

What begins with a slash but is no `/name` (`/etc/hosts`, `// a comment`) is said to the model, and so is a message that
begins with a space.
"""

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from nanochat.chat import Conversation, Message, check_conversation, terminal_text
from nanochat.common import UserError, atomic_write, plural, printable, reading
from nanochat.terminal.session import Drawn, PartPrinter, Session
from nanochat.terminal.settings import SETTINGS, Setting
from nanochat.tokenizer import replace_surrogates

MAX_FILE_BYTES = 1 << 24  # of a conversation that is loaded
QUIT = ("quit", "exit", "/quit", "/exit")
WORDS = {"clear": "/clear"}  # without a slash, as ever
_COMMAND = re.compile(r"/([A-Za-z][A-Za-z_-]*)(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """argument: what may follow, by name; empty: nothing."""

    argument: str
    help: str
    run: Callable[[Session, str], None]


def run_command(session: Session, message: str) -> bool:
    """Do what a message says if it is a command; whether it was one. Raises UserError for what cannot be done."""
    match = _COMMAND.fullmatch(WORDS.get(message.rstrip(), message.rstrip()))
    if not match:
        return False
    name, argument = re.sub("[-_]", "", match[1].lower()), (match[2] or "").strip()
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(f"/{match[1]}: unknown; /help lists what there is, and a line that begins with a space is said")
    if argument and not command.argument:
        raise UserError(f"/{name}: takes nothing behind it; a line that begins with a space is said to the model")
    command.run(session, argument)
    return True


# What they do ---------------------------------------------------------------------------------------------------


def _help(session: Session, argument: str) -> None:
    now = {setting.word: f" (now {session.settings[setting.name]})" for setting in SETTINGS}
    for name, command in COMMANDS.items():
        print(f"  {f'/{name} {command.argument}':<15} {command.help}{now.get(name, '')}")
    print("  quit            leave, as Ctrl-D does")
    print('A \\ at the end of a line continues it; between two lines of """ everything is one message.')


def _clear(session: Session, argument: str) -> None:
    session.clear()
    print("(a new conversation)")


def _system(session: Session, argument: str) -> None:
    if argument:
        session.system = "" if argument == "off" else argument
    print(f"system: {terminal_text(session.system) or '(none)'}")


def _set(setting: Setting, session: Session, argument: str) -> None:
    if argument:
        try:
            session.set(setting.name, setting.kind(argument))
        except ValueError as error:
            raise UserError(f"/{setting.word} {printable(argument)[:40]}: {error}") from error
    print(f"{setting.word}: {session.settings[setting.name]}")


def _retry(session: Session, argument: str) -> None:
    if not session.turns:
        raise UserError("/retry: there is no message to answer yet")
    answer(session)


def _undo(session: Session, argument: str) -> None:
    message = session.undo()
    if message is None:
        raise UserError("/undo: nothing was said yet")
    print(f"(taken back: {printable(str(message['content']))[:60]})")


def _save(session: Session, argument: str) -> None:
    path = _path("/save", argument)
    if not session.turns:
        raise UserError("/save: nothing was said yet")
    if os.path.exists(path) and path not in session.files:
        raise UserError(f"{path}: exists already, and did not come from this conversation; choose another name")
    with atomic_write(path) as temporary:
        line = json.dumps(session.conversation, ensure_ascii=False)
        temporary.write_text(f"{replace_surrogates(line)}\n", encoding="utf-8")
    session.files.add(path)
    print(f"(saved: {path})")


def _load(session: Session, argument: str) -> None:
    path = _path("/load", argument)
    messages = read_conversation(path)["messages"]
    has_system = messages[0]["role"] == "system"
    session.clear(messages[has_system:])
    session.system = str(messages[0]["content"]) if has_system else ""
    session.files.add(path)
    for message in messages:
        show_message(message)
    if messages[-1]["role"] == "user":
        answer(session)


def _tokens(session: Session, argument: str) -> None:
    print(f"context: {session.count_tokens():,} of {session.context:,} tokens")
    if session.last:
        print(f"last answer: {facts(session.last)}")


def answer_to(session: Session, message: str) -> None:
    """Say it, and have it answered. Blank lines around it, and the blanks around a single line, are no part of it."""
    text = message.strip("\n").rstrip()
    session.say(text if "\n" in text else text.strip())
    answer(session)


def answer(session: Session) -> None:
    """Have the last message answered, and tell the user who it is that speaks."""
    print("\nassistant: ", end="", flush=True)
    drawn = session.answer()
    if drawn.is_stopped:
        print("(stopped)" if drawn.num_tokens else "(stopped before a word came, as if nothing had been asked)")
    elif sys.stderr.isatty():
        print(f"({facts(drawn)}, context {drawn.context_used:,} of {session.context:,})", file=sys.stderr)


def facts(drawn: Drawn) -> str:
    cut = ", cut there: see /max" if drawn.is_cut else ""
    rate = f", {drawn.tokens_per_s:.1f} a second" if drawn.tokens_per_s else ""
    return f"{plural(drawn.num_tokens, 'token')}{cut}{rate}, seed {drawn.seed}"


def show_message(message: Message) -> None:
    """A message of an earlier day, as it looked."""
    print(f"\n{'you' if message['role'] == 'user' else message['role']}: ", end="")
    content = message["content"]
    show = PartPrinter()
    show([{"type": "text", "text": content}] if isinstance(content, str) else content)
    show.end()


# Files ----------------------------------------------------------------------------------------------------------


def _path(command: str, text: str) -> Path:
    if not text or "\0" in text:
        raise UserError(f"{command}: name a file, as in {command} talk.jsonl")
    return Path(os.path.expanduser(text)).absolute()


def read_conversation(path: Path) -> Conversation:
    """The one conversation of a JSON or JSONL file: `{"messages": [...]}`, or the bare list of messages.

    Raises UserError where the file holds anything else.
    """
    with reading(path):
        if not stat.S_ISREG((found := path.stat()).st_mode) or found.st_size > MAX_FILE_BYTES:
            raise UserError(f"{path}: must be a file of at most {MAX_FILE_BYTES >> 20} MB")
        content = path.read_bytes()
    try:
        read = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path}: holds no conversation as JSON, {{"messages": [...]}}, and no more than one'
        ) from error
    conversation = {"messages": read.get("messages") if isinstance(read, dict) else read}
    check_conversation(conversation, str(path))
    return cast(Conversation, conversation)


COMMANDS = {
    "help": Command("", "this list", _help),
    "clear": Command("", "a new conversation; the system text and the settings stay", _clear),
    "retry": Command("", "another answer to your last message", _retry),
    "undo": Command("", "take your last message and its answer back", _undo),
    "system": Command("TEXT", "what the model is told before all else; off: nothing", _system),
    "save": Command("FILE", "keep the conversation, as one line of JSON", _save),
    "load": Command("FILE", "go on with a conversation that was kept", _load),
    "tokens": Command("", "how much of the context is used, and how the last answer was drawn", _tokens),
    **{setting.word: Command(setting.metavar, setting.help, partial(_set, setting)) for setting in SETTINGS},
}
