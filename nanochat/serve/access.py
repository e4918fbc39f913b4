"""Who may use a server, as the person who starts it says: names, keys, foreign pages. `serve.guard` sees to it.

Recipes' flags are read with it, so this module never imports torch.
"""

import re
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from nanochat.common import UserError, reading

MIN_KEY_CHARS = 16


@dataclass(frozen=True)
class Access:
    """Who may ask. names: the server's own, beside addresses and this machine's; keys: none, and nobody needs one;
    origins: of foreign pages that may read answers.
    """

    names: Collection[str] = ()
    keys: Collection[str] = ()
    origins: Collection[str] = ()


def read_keys(path: Path) -> list[str]:
    """A key on each line; empty lines and those that begin with # do not count. Raises UserError."""
    with reading(path, "", UnicodeError):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    for number, line in enumerate(lines, start=1):
        if line in keys and not re.fullmatch(rf"[!-~]{{{MIN_KEY_CHARS},}}", line):
            raise UserError(
                f"{path}, line {number}: a key has at least {MIN_KEY_CHARS} visible ASCII characters and no blank; "
                "make one with `python -c 'import secrets; print(secrets.token_urlsafe())'`"
            )
    if not keys:
        raise UserError(f"{path}: holds no key; write one on a line, or leave --api-key-file out")
    return keys


def check_origins(origins: Iterable[str]) -> None:
    """Raise UserError for what no browser sends as a page's origin."""
    for origin in origins:
        if not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin):
            raise UserError(
                f"--cors-origin={origin}: must be scheme and host as a browser sends them, in lower case and without a "
                "path, such as https://chat.example or http://localhost:3000"
            )


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
