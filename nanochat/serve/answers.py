"""A request's answers as the event loop sees them: queued, streamed or collected, cancelled when the client leaves.

The event loop only moves bytes. Beside every request a small task waits for its client to leave and then cancels what
is written for it, the same way for streams and for whole answers, waiting or running. A client that reads a stream
slowly holds nobody up: what it has not read waits here, up to a limit, beyond which it is given up.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nanochat.serve.limits import MAX_BODY_BYTES, MAX_BODY_SECONDS, MAX_UNREAD_EVENTS, RequestError, refusal
from nanochat.serve.replies import UNFINISHED, Event, Stream
from nanochat.serve.workers import Task, Workers
from nanochat.serve.writing import Delta, Finish

if TYPE_CHECKING:
    from starlette.requests import Request


class Answers:
    """The answers to one request. Raises Busy or Stopped at once if they cannot be queued.

    log: told in the end all that has been written.
    """

    def __init__(
        self,
        workers: Workers,
        tasks: Sequence[Task],
        request: "Request",
        log: Callable[[list[Event]], None] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._workers, self._log = workers, log
        self._num_open = len(tasks)
        self._is_unread = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # a loop that has been closed meanwhile needs no events
                loop.call_soon_threadsafe(self._take, event)

        self._generations = workers.submit(tasks, emit)
        self._watcher = loop.create_task(self._cancel_when_gone(request))

    async def stream(self, reply: Stream) -> AsyncIterator[bytes]:
        """Server-sent events. One answer that breaks off ends them all."""
        yield reply.opening()
        async for event in self._until_finished():
            if isinstance(event, Finish) and event.reason in UNFINISHED:
                yield reply.closing(UNFINISHED[event.reason])
                return
            yield reply.event(event)
        yield reply.closing()

    async def collect(self) -> list[Event]:
        """Everything, once all answers have ended or one has broken off."""
        events: list[Event] = []
        async for event in self._until_finished():
            events.append(event)
            if isinstance(event, Finish) and event.reason in UNFINISHED:
                break
        return events

    async def _until_finished(self) -> AsyncIterator[Event]:
        noted: list[Event] = []
        try:
            while self._num_open:
                event = await self._events.get()
                self._num_open -= isinstance(event, Finish)
                if self._log:
                    noted.append(event)
                yield event
        finally:
            self._watcher.cancel()
            self._cancel()
            if self._log:
                self._log(noted)

    def _take(self, event: Event) -> None:
        if isinstance(event, Finish) and self._is_unread:
            event = replace(event, reason="unread")
        elif isinstance(event, Delta) and self._events.qsize() >= MAX_UNREAD_EVENTS:
            self._is_unread = True
            self._cancel()
            return
        self._events.put_nowait(event)

    def _cancel(self) -> None:
        for generation in self._generations:
            self._workers.cancel(generation)

    async def _cancel_when_gone(self, request: "Request") -> None:
        """Wait until the client leaves; its body has been read, so nothing else can come."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._cancel()


async def read_body(request: "Request") -> bytes:
    """The whole body. Raises RequestError if it is not declared as JSON, too large as soon as it is, or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"Content-Type must be application/json, not {kind[:40]!r}", status=415)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        raise refusal("max_body_bytes")
    body = bytearray()

    async def read() -> bytes:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > MAX_BODY_BYTES:
                raise refusal("max_body_bytes")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), MAX_BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise refusal("max_body_seconds") from error
