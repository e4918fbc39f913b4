"""Serve models: a chat page for the browser, and an OpenAI-compatible interface (docs/server.md).

    python -m scripts.chat_web                          # then open the address it prints
    python -m scripts.chat_web --source=sft -g d4 --port=8001
    python -m scripts.chat_web --model-tag=d4,d6        # two models, to be compared side by side
    python -m scripts.chat_web --host=0.0.0.0 --api-key-file=keys.txt
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Only this computer can reach it unless --host says otherwise. Others may then call it by its address, its own name, or
the name that --host gives. Needs the extra `serve` (bash runs/setup.sh serve).
Several --model-tag, with commas between, are several models: d4 at its newest step, d4@500 at that one. A request's
`model` chooses among them, and the first answers where it does not.
"""

import contextlib
import errno
import signal
import socket
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat import cli
from nanochat.common import UserError, prepare_process, print0
from nanochat.serve.access import Access, check_origins, is_loopback, read_keys
from nanochat.serve.limits import DEFAULT_PORT, MAX_TEMPERATURE, MAX_TOKENS, MAX_TOP_K, MAX_WAITING, Defaults

if TYPE_CHECKING:
    from nanochat.parallel import Runtime
    from nanochat.serve.workers import Workers

EVERYWHERE = ("", "0.0.0.0", "::")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    parser.flag("--source", cli.one_of("base", "mid", "sft", "rl"), "sft", "stage the models come from", "-i")
    tags = "their folders, with commas between; empty: the deepest, then the newest"
    parser.flag("--model-tag", model_tags, (), tags, "-g", metavar="TAG[@STEP]")
    parser.flag("--step", cli.non_negative_int, None, "checkpoint step; else the newest", "-s", "--model-step")
    parser.flag("--num-gpus", cli.positive_int, 1, "GPUs that share the work, each with all models")
    parser.flag("--port", cli.number_between(0, 65535, whole=True), DEFAULT_PORT, "port; 0 takes any free one", "-p")
    parser.flag("--host", str, "127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    add_answer_flags(parser)
    parser.flag("--api-key-file", str, "", "file of keys, one a line: who sends none of them sees the page only")
    parser.flag("--cors-origin", str, "", "origins of web pages that may use the server, with commas between")
    parser.flag("--log-conversations", str, "", "file to append all conversations to; empty: they are not logged")
    parser.flag("--drain", cli.non_negative_float, 10.0, "seconds that running answers have when it is told to stop")
    cli.add_engine_flags(parser)
    cli.add_device_flags(parser)
    parser.check(lambda a: cli.problem_of(check_origins, origins(a)))
    parser.check(lambda a: "--step: give it behind each tag, as in d4@500" if _has_steps(a) else None)
    return parser.parse(argv)


def add_answer_flags(parser: cli.Parser) -> None:
    """How answers are written, and how many."""
    temperature, top_k = cli.number_between(0, MAX_TEMPERATURE), cli.number_between(0, MAX_TOP_K, whole=True)
    max_tokens, known = cli.number_between(1, MAX_TOKENS, whole=True), Defaults()
    parser.flag("--temperature", temperature, known.temperature, "where a request does not say", "-t")
    parser.flag("--top-k", top_k, known.top_k, "where a request does not say; 0: off", "-k")
    parser.flag("--max-tokens", max_tokens, known.max_tokens, "where a request does not say", "-m")
    context = "of a conversation that outgrows the model's context, forget the oldest turns, or refuse it"
    parser.flag("--context", cli.one_of("truncate", "refuse"), "truncate", context)
    parser.flag("--max-rows", cli.number_between(1, 1024, whole=True), 16, "answers that a model writes side by side")
    parser.flag("--max-waiting", cli.non_negative_int, MAX_WAITING, "answers that may wait; the next are told to retry")


def model_tags(text: str) -> tuple[tuple[str, int | None], ...]:
    """Folders of runs, each with a step if one is wanted.

    >>> model_tags("d4,d6@500")
    (('d4', None), ('d6', 500))
    """
    found = []
    for word in text.split(",") if text else []:
        tag, at, step = word.partition("@")
        if not tag:
            raise ValueError("a name is missing; write d4, d4@500, or several with commas between")
        found.append((cli.folder_name(tag), cli.non_negative_int(step) if at else None))
    if len(set(found)) < len(found):
        raise ValueError("the same model twice")
    return tuple(found)


def origins(args: Namespace) -> list[str]:
    return [origin for origin in args.cors_origin.split(",") if origin]


def _has_steps(args: Namespace) -> bool:
    return args.step is not None and (len(args.model_tag) > 1 or any(step is not None for _, step in args.model_tag))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"the web server needs {' and '.join(missing)}: bash runs/setup.sh serve")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager ends it as Ctrl-C does
    try:
        with listen(args.host, args.port) as listener, contextlib.suppress(KeyboardInterrupt):
            serve(args, listener)
        print0("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def serve(args: Namespace, listener: socket.socket) -> None:
    """Load the models and answer requests until the process is told to stop."""
    from nanochat.parallel import runtime
    from nanochat.serve.app import create_server
    from nanochat.serve.conversations import ConversationLog
    from nanochat.serve.routes import House

    keys = read_keys(Path(args.api_key_file)) if args.api_key_file else []
    log = ConversationLog(Path(args.log_conversations)) if args.log_conversations else None
    if args.source == "base":
        print0("warning: a base model has not learned to chat; its answers will be odd")
    with runtime(args.device_type) as rt:
        models = load_models(args, rt)
        defaults = Defaults(args.temperature, args.top_k, args.max_tokens, args.seed)
        access = Access([args.host], keys, origins(args))
        server = create_server(House(models, defaults, access, args.context, log), args.drain)
        print0(f"{', '.join(model.name for model in models)} on {rt.describe()}")
        if not is_loopback(listener.getsockname()[0]):
            who = "who have a key" if keys else "for there are no keys (--api-key-file)"
            print0(f"warning: --host={args.host}: others who can reach this machine can use it, {who}")
        if log:
            print0(f"warning: all conversations are written to {args.log_conversations}")
        print0(f"talk to it at {address(args.host, listener)}  (Ctrl-C stops it)")
        server.run(sockets=[listener])


def load_models(args: Namespace, rt: "Runtime") -> "list[Workers]":
    """The models that the flags choose, on every device that serves."""
    import torch

    from nanochat.checkpoint import find_checkpoint
    from nanochat.engine import Engine
    from nanochat.serve.workers import Workers

    if args.num_gpus > 1 and (rt.device.type != "cuda" or torch.cuda.device_count() < args.num_gpus):
        there = torch.cuda.device_count() if rt.device.type == "cuda" else 0
        raise UserError(f"--num-gpus={args.num_gpus}: there are {there} here; leave it out")
    devices = [torch.device("cuda", i) for i in range(args.num_gpus)] if args.num_gpus > 1 else [rt.device]
    models = []
    for tag, step in args.model_tag or [("", None)]:
        checkpoint = find_checkpoint(args.source, tag, args.step if step is None else step)
        tokenizer = checkpoint.tokenizer()
        stop_ids = [tokenizer.bos, tokenizer.special("<|assistant_end|>")]
        built = [checkpoint.build_model(device, rt.dtype).for_decoding(args.int8) for device in devices]
        engines = [Engine(model, stop_ids, args.max_rows, deterministic=args.deterministic) for model in built]
        name = f"{args.source}-{checkpoint.folder.parent.name}" + (f"@{step}" if step is not None else "")
        models.append(Workers(engines, tokenizer, name, args.max_waiting))
        print0(f"{name}: step {checkpoint.step}, context {checkpoint.config.sequence_len:,} tokens")
    return models


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded: a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except UnicodeError as error:
        raise UserError(f"--host={host}: is no host name; use 127.0.0.1 for this computer") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port={port}: already in use on {host}; stop the other program, or choose another with "
                f"--port={port + 1 if port < 65535 else 8000} (--port=0 takes any free one)"
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port={port}: needs more rights; choose one from 1024, such as --port=8000") from error
        raise UserError(
            f"--host={host}: cannot listen there ({error.strerror or error}); use 127.0.0.1 for this computer, 0.0.0.0 "
            "for all its addresses"
        ) from error


def address(host: str, listener: socket.socket) -> str:
    """What to type into a browser on this computer."""
    shown = "localhost" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/"


if __name__ == "__main__":
    cli.run(main)
