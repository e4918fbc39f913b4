"""A hub of one data set on 127.0.0.1: the part of the protocol that huggingface_hub uses, and scripted faults.

    python tests/hub_server.py --folder SHARDS --port-file PORT [--repo OWNER/NAME] [--licence WORD]

serves the files of a folder as a data set until it is ended; the port is written to the file once it listens, and
HF_ENDPOINT=http://127.0.0.1:PORT selects it. In a test `Server` does the same on a thread, and `faults` says what goes
wrong: a list of faults per place, used up one per request. Places are `info`, `tree`, a file's path (its GET requests)
and `HEAD path`. Faults: a status code, (status code, Retry-After), or one of

    reset       half of the body, then the connection is reset
    short       half of the body, then the connection ends, though more was announced
    truncated   half of the body, announced as all there is
    corrupt     one byte is another
    hang        half of the body, then nothing until the server ends
"""

import argparse
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
Fault = int | tuple[int, int | str] | str


class Server(ThreadingHTTPServer):
    """The hub. Changing `commit` moves the branch main; `wrong_hashes` are paths that the listing lies about."""

    daemon_threads = True

    def __init__(self, folder: Path, repo: str = CLIMBMIX, licence: str = "odc-by", page_size: int = 1000) -> None:
        self.files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        self.repo, self.licence, self.page_size = repo, licence, page_size
        self.hashes = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in self.files.items()}
        self.commit = hashlib.sha1(repr(sorted(self.hashes.items())).encode()).hexdigest()
        self.commits = {self.commit}
        self.wrong_hashes: set[str] = set()
        self.faults: dict[str, Iterator[Fault]] = {}
        self.requests: list[str] = []
        self.ended = threading.Event()
        self._counting = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, place: str, faults: Iterable[Fault]) -> None:
        """What happens to the next requests for this place."""
        self.faults[place] = iter(faults)

    def next_fault(self, place: str) -> Fault | None:
        with self._counting:
            self.requests.append(place)
            return next(self.faults.get(place, iter(())), None)

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients may leave when they like."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repo = re.escape(self.server.repo)
        if re.fullmatch(rf"/api/datasets/{repo}(/revision/[^/]+)?", path):
            self.answer_info(path.partition("/revision/")[2] or "main")
        elif match := re.fullmatch(rf"/api/datasets/{repo}/tree/([^/]+)", path):
            self.answer_tree(match[1])
        elif match := re.fullmatch(rf"/datasets/{repo}/resolve/([^/]+)/(.+)", path):
            self.answer_file(*match.groups())
        else:
            self.refuse(404, "RepoNotFound")

    def answer_info(self, revision: str) -> None:
        if self.fails("info") or not self.knows(revision):
            return
        commit = self.server.commit if revision == "main" else revision
        files = [{"rfilename": path} for path in self.server.files]
        info = {"id": self.server.repo, "sha": commit, "siblings": files}
        self.send_json(info | {"cardData": {"license": self.server.licence}})

    def answer_tree(self, revision: str) -> None:
        if self.fails("tree") or not self.knows(revision):
            return
        query = parse_qs(urlsplit(self.path).query)
        start, size = int(query.get("cursor", ["0"])[0]), self.server.page_size
        paths = list(self.server.files)
        headers = {}
        if start + size < len(paths):
            more = f"{self.server.url}{urlsplit(self.path).path}?recursive=True&cursor={start + size}"
            headers["Link"] = f'<{more}>; rel="next"'
        self.send_json([self.entry(path) for path in paths[start : start + size]], headers)

    def entry(self, path: str) -> dict[str, Any]:
        size, sha256 = self.server.files[path].stat().st_size, self.server.hashes[path]
        listed = sha256[::-1] if path in self.server.wrong_hashes else sha256
        lfs = {"oid": listed, "size": size, "pointerSize": 134}
        return {"type": "file", "path": path, "size": size, "oid": sha256[:40], "lfs": lfs}

    def answer_file(self, revision: str, path: str) -> None:
        if not self.knows(revision):
            return
        if path not in self.server.files:
            self.refuse(404, "EntryNotFound")
            return
        fault = self.server.next_fault(path if self.command == "GET" else f"HEAD {path}")
        if isinstance(fault, (int, tuple)):
            self.refuse_with(fault)
            return
        body = self.server.files[path].read_bytes()
        headers = {
            "ETag": f'"{self.server.hashes[path]}"',
            "X-Linked-Etag": f'"{self.server.hashes[path]}"',
            "X-Linked-Size": str(len(body)),
            "X-Repo-Commit": revision,
            "Accept-Ranges": "bytes",
        }
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, whole = int(match[1]), len(body)
            body, status = body[start:], 206
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        self.send_body(status, body, headers, fault)

    def send_body(self, status: int, body: bytes, headers: dict[str, str], fault: str | None) -> None:
        half = len(body) // 2
        if fault == "truncated":
            body, fault = body[:half], None
        if fault == "corrupt":
            body, fault = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :], None
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if fault is None else body[:half])
        self.wfile.flush()
        if fault == "hang":
            self.server.ended.wait()
        if fault == "reset":  # no farewell: the client's next read fails
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault:
            self.close_connection = True
            if fault == "reset":
                self.wfile.close = lambda: None  # type: ignore[method-assign]
                self.connection.close()

    def fails(self, place: str) -> bool:
        fault = self.server.next_fault(place)
        if isinstance(fault, (int, tuple)):
            self.refuse_with(fault)
        elif fault:
            self.send_body(200, b"<html>not a hub</html>", {}, None)
        return fault is not None

    def knows(self, revision: str) -> bool:
        known = revision == "main" or revision in self.server.commits
        if not known:
            self.refuse(404, "RevisionNotFound")
        return known

    def refuse_with(self, fault: int | tuple[int, int | str]) -> None:
        status, retry_after = fault if isinstance(fault, tuple) else (fault, None)
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self.refuse(status, "EntryNotFound" if status == 404 else "", headers)

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_json({"error": code}, (headers or {}) | ({"X-Error-Code": code} if code else {}), status)

    def send_json(self, value: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_body(status, json.dumps(value).encode(), (headers or {}) | {"Content-Type": "application/json"}, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--repo", default=CLIMBMIX)
    parser.add_argument("--licence", default="odc-by")
    args = parser.parse_args()
    server = Server(args.folder, args.repo, args.licence)
    temporary = args.port_file.with_name(args.port_file.name + ".tmp")
    temporary.write_text(f"{server.server_port}\n", encoding="utf-8")
    temporary.replace(args.port_file)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
