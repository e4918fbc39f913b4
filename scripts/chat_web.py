"""Serve a model: a chat page for the browser, and an OpenAI-compatible interface.

    python -m scripts.chat_web                          # then open the address it prints
    python -m scripts.chat_web --source=sft -g d4 --port=8001
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Only this computer can reach it unless --host says otherwise. Others may then call it by its address, its own name, or
the name that --host gives. Needs the extra `serve` (bash runs/setup.sh serve).
When a conversation outgrows the context, its oldest turns are forgotten first.
"""

import contextlib
import errno
import signal
import socket
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec

from nanochat import cli
from nanochat.common import UserError, prepare_process, print0
from nanochat.serve.limits import DEFAULT_PORT, MAX_TEMPERATURE, MAX_TOKENS, MAX_TOP_K, Defaults

EVERYWHERE = ("", "0.0.0.0", "::")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_choice_flags(parser, default="sft")
    parser.flag("--port", cli.number_between(0, 65535, whole=True), DEFAULT_PORT, "port; 0 takes any free one", "-p")
    parser.flag("--host", str, "127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    temperature, top_k = cli.number_between(0, MAX_TEMPERATURE), cli.number_between(0, MAX_TOP_K, whole=True)
    max_tokens, known = cli.number_between(1, MAX_TOKENS, whole=True), Defaults()
    parser.flag("--temperature", temperature, known.temperature, "where a request does not say", "-t")
    parser.flag("--top-k", top_k, known.top_k, "where a request does not say; 0: off", "-k")
    parser.flag("--max-tokens", max_tokens, known.max_tokens, "where a request does not say", "-m")
    cli.add_device_flags(parser)
    return parser.parse(argv)


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
    """Load the model and answer requests until the process is told to stop."""
    from nanochat.checkpoint import find_checkpoint
    from nanochat.engine import Engine
    from nanochat.parallel import runtime
    from nanochat.serve.app import create_server
    from nanochat.serve.guard import is_loopback
    from nanochat.serve.workers import Workers

    checkpoint = find_checkpoint(args.source, args.model_tag, args.step)
    tokenizer = checkpoint.tokenizer()
    if args.source == "base":
        print0("warning: a base model has not learned to chat; its answers will be odd")
    with runtime(args.device_type) as rt:
        model = checkpoint.build_model(rt.device, rt.dtype)
        engine = Engine(model, stop_ids=[tokenizer.bos, tokenizer.special("<|assistant_end|>")])
        name = f"{args.source}-{checkpoint.folder.parent.name}"
        defaults = Defaults(name, args.temperature, args.top_k, args.max_tokens, args.seed)
        server = create_server(Workers([engine], tokenizer), defaults, names=[args.host])
        print0(f"{name}, step {checkpoint.step}, on {rt.describe()}")
        if not is_loopback(listener.getsockname()[0]):
            print0(f"warning: --host={args.host}: everybody who can reach this machine can use the model; no passwords")
        print0(f"talk to it at {address(args.host, listener)}  (Ctrl-C stops it)")
        server.run(sockets=[listener])


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
