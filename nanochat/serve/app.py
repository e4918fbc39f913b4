"""The web application: chat page, OpenAI-compatible interface, health and figures.

The event loop only moves bytes. An answer is written in its model's own thread (`serve.workers`), side by side with
others, and passed piece by piece to the loop (`serve.answers`); prompts are tokenized in threads too.

It is meant for the person at this computer (`serve.guard`). Conversations are neither stored nor logged, unless it is
told to (`serve.conversations`).

Starlette and uvicorn are an optional extra, so they are imported when an application is made, not with this module.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from nanochat.serve import limits
from nanochat.serve.connections import patient_protocol
from nanochat.serve.guard import Guard
from nanochat.serve.limits import LIMITS, RequestError
from nanochat.serve.replies import error_object
from nanochat.serve.routes import House, routes_of
from nanochat.serve.workers import Busy, Stopped

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp


def create_app(house: House) -> "ASGIApp":
    """The ASGI application in front of the models' workers, which it starts and closes."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse

    async def refuse(request: "Request", error: Exception) -> "Response":
        status, content, headers = describe_error(error)
        if request.url.path == "/chat/completions":
            content["detail"] = content["error"]["message"]  # where the ancestor's clients look for it
        return JSONResponse(content, status, headers)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for workers in house.models:
            workers.start()
        yield
        await asyncio.gather(*(asyncio.to_thread(workers.close) for workers in house.models))

    refusals = (RequestError, Busy, Stopped, HTTPException, ClientDisconnect, Exception)
    app = Starlette(routes=routes_of(house), exception_handlers=dict.fromkeys(refusals, refuse), lifespan=lifespan)
    return Guard(app, house.access)


def create_server(house: House, drain_s: float = 10.0) -> "uvicorn.Server":
    """A server to `run(sockets=[...])`. Told to stop, it refuses new questions; answers may go on for `drain_s`."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for workers in house.models:
                workers.stop_taking()
            deadline = time.monotonic() + drain_s
            while any(workers.num_running for workers in house.models) and time.monotonic() < deadline:
                if self.force_exit:  # a second Ctrl-C
                    break
                await asyncio.sleep(0.02)
            # every answer gets its end before connections are closed
            await asyncio.gather(*(asyncio.to_thread(workers.close) for workers in house.models))
            await super().shutdown(sockets)

    config = uvicorn.Config(
        create_app(house),
        http=patient_protocol(),
        ws="none",
        h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
        limit_concurrency=limits.MAX_CONNECTIONS,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return Server(config)


def describe_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an exception."""
    if isinstance(error, RequestError):
        return error.status, error_object(error.message, param=error.param, code=error.code), {}
    if isinstance(error, Busy):
        content = error_object(str(error), kind="rate_limit_error", code=LIMITS["max_waiting"].code)
        return LIMITS["max_waiting"].status or 429, content, {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, Stopped):
        content = error_object("no worker is running; the server is stopping or broken", kind="server_error")
        return 503, content, {"Retry-After": "10"}
    status = getattr(error, "status_code", 500)  # starlette's own: no such path, wrong method
    message = getattr(error, "detail", "the server failed; its log says why")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, error_object(message, kind=kind), dict(getattr(error, "headers", None) or {})
