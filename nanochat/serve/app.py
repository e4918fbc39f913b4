"""The web application: chat page, OpenAI-compatible interface, health and figures.

The event loop only moves bytes. A generation runs in a worker's thread (`serve.workers`), which passes each piece of
text to the loop; beside every answer a small task waits for the client to leave and then cancels the generation, the
same way for streams and for whole answers, waiting or running.

It is meant for the person at this computer (`serve.guard`). Conversations are neither stored nor logged.

Starlette is an optional extra, so it is imported when an application is made, not with this module.
"""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.serve import limits
from nanochat.serve.guard import Guard
from nanochat.serve.limits import Defaults
from nanochat.serve.replies import UNFINISHED, Reply, error_object
from nanochat.serve.requests import ChatRequest, RequestError, parse_chat_request
from nanochat.serve.workers import Busy, Delta, Finish, Generation, Stopped, Workers

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp

UI = Path(__file__).parent / "ui"


def create_app(
    workers: Workers,
    defaults: Defaults = Defaults(),  # noqa: B008 (frozen)
    names: Collection[str] = (),
) -> "ASGIApp":
    """The ASGI application in front of `workers`, which it starts and closes.

    names: what clients may call this server beside the names that `Guard` allows anyway.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response

    async def refuse(request: "Request", error: Exception) -> Response:
        status, content, headers = describe_error(error)
        return JSONResponse(content, status, headers)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        workers.start()
        yield
        await asyncio.to_thread(workers.close)

    refusals = (RequestError, Busy, Stopped, HTTPException, ClientDisconnect, Exception)
    routes = make_routes(workers, defaults, describe_model(workers, defaults))
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(refusals, refuse), lifespan=lifespan)
    return Guard(app, names)


def create_server(
    workers: Workers,
    defaults: Defaults = Defaults(),  # noqa: B008 (frozen)
    names: Collection[str] = (),
    drain_s: float = 2.0,
) -> "uvicorn.Server":
    """A server to `run(sockets=[...])`. Told to stop, it refuses new questions; answers may go on for `drain_s`."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await asyncio.to_thread(workers.close, drain_s)  # every answer gets its end before connections are closed
            await super().shutdown(sockets)

    app = create_app(workers, defaults, names)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    return Server(config)


def make_routes(workers: Workers, defaults: Defaults, model_card: dict[str, Any]) -> "list[BaseRoute]":
    """What can be asked, and what is answered."""
    from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    seeds = random.Random(defaults.seed)

    async def page(request: "Request") -> Response:
        return FileResponse(UI / "index.html")

    async def health(request: "Request") -> Response:
        is_ready = workers.num_ready > 0
        status = {"status": "ok" if is_ready else "no worker is running", "ready": is_ready, "model": defaults.model}
        return JSONResponse(status, 200 if is_ready else 503)

    async def stats(request: "Request") -> Response:
        return JSONResponse(workers.stats())

    async def models(request: "Request") -> Response:
        return JSONResponse({"object": "list", "data": [model_card]})

    async def chat(request: "Request") -> Response:
        asked = parse_chat_request(await read_body(request), defaults, seeds.getrandbits(31))
        answer, reply = Answer(workers, asked, request), Reply(defaults.model)
        if asked.stream:
            return StreamingResponse(answer.stream(reply), media_type="text/event-stream")
        finish = await answer.collect(reply)
        if finish.reason in UNFINISHED:
            status = 500 if finish.reason == "error" else 503
            return JSONResponse(error_object(UNFINISHED[finish.reason], kind="server_error"), status)
        return JSONResponse(reply.whole(finish))

    return [
        Route("/", page),
        Route("/health", health),
        Route("/stats", stats),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Mount("/ui", StaticFiles(directory=UI)),
    ]


def describe_model(workers: Workers, defaults: Defaults) -> dict[str, Any]:
    """OpenAI's model object, and beside it what a client of this server may want to know."""
    known = {
        "max_body_bytes": limits.MAX_BODY_BYTES,
        "max_messages": limits.MAX_MESSAGES,
        "max_message_chars": limits.MAX_MESSAGE_CHARS,
        "max_total_chars": limits.MAX_TOTAL_CHARS,
        "max_temperature": limits.MAX_TEMPERATURE,
        "max_top_k": limits.MAX_TOP_K,
        "max_tokens": limits.MAX_TOKENS,
    }
    settings = {"temperature": defaults.temperature, "top_k": defaults.top_k, "max_tokens": defaults.max_tokens}
    about = {"context_tokens": workers.context_tokens, "defaults": settings, "limits": known}
    return {"id": defaults.model, "object": "model", "created": 0, "owned_by": "nanochat", "nanochat": about}


def describe_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an exception."""
    if isinstance(error, RequestError):
        return error.status, error_object(error.message, param=error.param, code=error.code), {}
    if isinstance(error, Busy):
        content = error_object(str(error), kind="rate_limit_error", code="queue_full")
        return 429, content, {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, Stopped):
        return 503, error_object("no worker is running; the server is stopping or broken", kind="server_error"), {}
    status = getattr(error, "status_code", 500)  # starlette's own: no such path, wrong method
    message = getattr(error, "detail", "the server failed; its log says why")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, error_object(message, kind=kind), dict(getattr(error, "headers", None) or {})


async def read_body(request: "Request") -> bytes:
    """The whole body. Raises RequestError if it is not declared as JSON, or as soon as it is too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type must be application/json, not {kind[:40]!r}", status=415)
    too_large = RequestError(f"the body is larger than {limits.MAX_BODY_BYTES:,} bytes", status=413)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


class Answer:
    """A generation as the event loop sees it. Raises Busy or Stopped at once if it cannot be queued.

    It is cancelled when its reader stops reading and when its client leaves, whichever is noticed.
    """

    def __init__(self, workers: Workers, asked: ChatRequest, request: "Request") -> None:
        loop = asyncio.get_running_loop()
        self._asked = asked
        self._workers = workers
        self._events: asyncio.Queue[Delta | Finish] = asyncio.Queue()

        def emit(event: Delta | Finish) -> None:
            with suppress(RuntimeError):  # a loop that has been closed meanwhile needs no events
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._generation = workers.submit(asked, emit)
        self._watcher = loop.create_task(cancel_when_gone(request, workers, self._generation))

    async def stream(self, reply: Reply) -> AsyncIterator[bytes]:
        """Server-sent events."""
        yield reply.opening()
        async for event in self._until_finished():
            if isinstance(event, Finish):
                yield reply.closing(event, self._asked.include_usage)
            else:
                yield reply.event(event)

    async def collect(self, reply: Reply) -> Finish:
        """Fill `reply`; returns how it ended."""
        finish = Finish("error")
        async for event in self._until_finished():
            if isinstance(event, Finish):
                finish = event
            else:
                reply.add(event)
        return finish

    async def _until_finished(self) -> AsyncIterator[Delta | Finish]:
        try:
            while True:
                event = await self._events.get()
                yield event
                if isinstance(event, Finish):
                    return
        finally:
            self._watcher.cancel()
            self._workers.cancel(self._generation)


async def cancel_when_gone(request: "Request", workers: Workers, generation: Generation) -> None:
    """Wait until the client leaves; its body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    workers.cancel(generation)
