"""Keeps other web sites away from the server of the person at this computer.

A page from anywhere can make that person's browser send requests here. It gets no answer to read, since there is no
CORS; it cannot send a question, since a body must be declared as JSON, which a browser does not do for a foreign page
without asking us first; and a foreign name that resolves to this machine is refused by the Host header. The last holds
wherever the server listens: that trick needs a name, so any address is allowed, and of names only this machine's own.

Our own page is held to a policy: scripts and styles from our files only, none inline, nothing from elsewhere, and no
HTML made from strings (trusted types), so that no text can ever become active.
"""

import socket
from collections.abc import Collection
from ipaddress import ip_address
from typing import TYPE_CHECKING

from nanochat.serve.replies import error_object

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

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

    def __init__(self, app: "ASGIApp", names: Collection[str] = ()) -> None:
        """names: what clients may call this server, beside any address and the machine's own names."""
        self.app, self.names = app, own_names().union(name.lower() for name in names if name and not is_address(name))

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

        name = host_name(scope)
        if not is_address(name) and name not in self.names:
            from starlette.responses import JSONResponse

            known = ", ".join(sorted(self.names))
            told = f"the Host header names another server than this one, which is known by its address and as {known}"
            refusal = error_object(f"{told}; to use another name, listen on it (--host)")
            await JSONResponse(refusal, 421)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)


def host_name(scope: "Scope") -> str:
    """The Host header's name, without the port."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def own_names() -> frozenset[str]:
    """What this machine calls itself; no name server is asked, for its answers are what the guard must not trust."""
    full = socket.gethostname().lower()
    short = full.partition(".")[0]
    return frozenset({"localhost", full, short, f"{short}.local"} - {"", ".local"})


def is_address(name: str) -> bool:
    """Whether the name of a Host header is an IP address; one of version 6 stands in brackets."""
    try:
        ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this computer can reach a server that listens on this IP address."""
    return ip_address(address).is_loopback
