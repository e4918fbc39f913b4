"""Who may ask: keeps other web sites away from the server of the person at this computer, and strangers without a key.

A page from anywhere can make that person's browser send requests here. It gets no answer to read, since CORS is closed
but for the origins that the server was told to trust; it cannot send a question, since a body must be declared as JSON,
which a browser does not do for a foreign page without asking us first; and a foreign name that resolves to this machine
is refused by the Host header. The last holds wherever the server listens: that trick needs a name, so any address is
allowed, and of names only this machine's own.

With keys, every path needs one but those of `OPEN`: the page, which asks for it, and what a health check reads. A path
that does not exist is no exception, so a new route is closed until it is listed. Keys are compared as hashes, all of
them and in constant time, so that the time of a refusal tells nothing of them.

Our own page is held to a policy: scripts and styles from our files only, none inline, nothing from elsewhere, and no
HTML made from strings (trusted types), so that no text can ever become active.
"""

import hashlib
import hmac
from typing import TYPE_CHECKING

from nanochat.serve.access import Access, is_address, own_names
from nanochat.serve.replies import error_object

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/health", "/ui/")  # paths without a key; one that ends in a slash stands for all below it
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Wraps an application: refuses whom `Access` does not allow, adds the security headers to every reply."""

    def __init__(self, app: "ASGIApp", access: Access = Access()) -> None:  # noqa: B008 (frozen)
        self.app = app
        self.names = own_names().union(name.lower() for name in access.names if name and not is_address(name))
        self.origins = frozenset(access.origins)
        self._keys = [hashed(key) for key in access.keys]

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin", "")

        async def send_guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                caching = "no-cache" if scope["path"].startswith("/ui") or scope["path"] == "/" else "no-store"
                added = {**SECURITY_HEADERS, "Cache-Control": caching}
                if origin in self.origins:
                    added |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
                    added["Cross-Origin-Resource-Policy"] = "cross-origin"
                encoded = [(name.lower().encode(), value.encode()) for name, value in added.items()]
                message["headers"] = [*message["headers"], *encoded]
            await send(message)

        await self._answerer(scope, headers)(scope, receive, send_guarded)

    def _answerer(self, scope: "Scope", headers: dict[bytes, str]) -> "ASGIApp":
        """Who answers this request: the application, or a reply that stands already."""
        from starlette.responses import JSONResponse, Response

        name = host_name(headers.get(b"host", ""))
        if not is_address(name) and name not in self.names:
            known = ", ".join(sorted(self.names))
            told = f"the Host header names another server than this one, which is known by its address and as {known}"
            return JSONResponse(error_object(f"{told}; to use another name, listen on it (--host)"), 421)
        asks_first = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if asks_first and headers.get(b"origin") in self.origins:
            wanted = headers.get(b"access-control-request-headers", "")
            allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": wanted}
            return Response(status_code=204, headers={**allowed, "Access-Control-Max-Age": "600"})
        if self._keys and not is_open(scope["path"]) and not self._has_key(headers):
            told = "this server asks for a key: Authorization: Bearer KEY"
            content = error_object(told, kind="authentication_error", code="invalid_api_key")
            return JSONResponse(content, 401, {"WWW-Authenticate": "Bearer"})
        return self.app

    def _has_key(self, headers: dict[bytes, str]) -> bool:
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        given = hashed(key.strip())
        return scheme.lower() == "bearer" and sum(hmac.compare_digest(given, known) for known in self._keys) > 0


def is_open(path: str) -> bool:
    """Whether a path may be asked for without a key."""
    return any(path == known or (known != "/" and known.endswith("/") and path.startswith(known)) for known in OPEN)


def hashed(key: str) -> bytes:
    """Of one length whatever the key's, as constant time needs it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def host_name(host: str) -> str:
    """A Host header's name, without the port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() else host.lower()
