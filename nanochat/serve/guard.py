"""Keeps other web sites away from the server of the person at this computer.

A page from anywhere can make that person's browser send requests here. It gets no answer to read, since there is no
CORS; it cannot send a question, since a body must be declared as JSON, which a browser does not do for a foreign page
without asking us first; and a foreign name that resolves to this machine is refused by the Host header.

Our own page is held to a policy: scripts and styles from our files only, none inline, nothing from elsewhere, and no
HTML made from strings (trusted types), so that no text can ever become active.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from nanochat.serve.replies import error_object

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Wraps an application: refuses requests for another name, adds the security headers to every reply."""

    def __init__(self, app: "ASGIApp", hosts: Collection[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                caching = "no-cache" if scope["path"].startswith("/ui") or scope["path"] == "/" else "no-store"
                added = {**SECURITY_HEADERS, "Cache-Control": caching}
                encoded = [(name.lower().encode(), value.encode()) for name, value in added.items()]
                message["headers"] = [*message["headers"], *encoded]
            await send(message)

        if self.hosts and host_name(scope) not in self.hosts:
            from starlette.responses import JSONResponse

            known = ", ".join(sorted(self.hosts))
            refusal = error_object(f"the Host header names another server than this one, which is known as {known}")
            await JSONResponse(refusal, 421)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)


def host_name(scope: "Scope") -> str:
    """The Host header's name, without the port."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
