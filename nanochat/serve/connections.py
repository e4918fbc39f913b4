"""Connections that do nothing: a client that never asks, or never takes what it asked for, loses its connection.

Neither holds up an engine, but each holds a socket and what waits to be sent; a few thousand would hold them all.
"""

from typing import Any

from nanochat.serve.limits import MAX_HEADER_SECONDS, MAX_STALL_SECONDS


def patient_protocol() -> type:
    """uvicorn's protocol with a clock: for a request's lines to come, and for a client that does not read.

    uvicorn is an optional extra, so it is imported when the class is made.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PatientProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._clock = self.loop.call_later(MAX_HEADER_SECONDS, self._close_if_idle)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._clock.cancel()
            self._clock = self.loop.call_later(MAX_HEADER_SECONDS, self._close_if_idle)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._clock.cancel()
            self._clock = self.loop.call_later(MAX_STALL_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            self._clock.cancel()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._clock.cancel()
            super().connection_lost(exc)

        def _close_if_idle(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return PatientProtocol
