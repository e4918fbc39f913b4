"""Who may ask the server, and the recipe that starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import CHAT, JSON, LONG, ROOT, asking, connect, fetch, running_server, trained

from nanochat.checkpoint import run_folder, write_checkpoint
from nanochat.common import UserError
from nanochat.serve.guard import is_loopback
from scripts import chat_web


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server() as url:
        yield url


# Who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/ui/main.js", "/health", "/nothing", "/v1/chat/completions"])
def test_every_reply_carries_the_security_headers(server: str, path: str) -> None:
    headers = fetch(server, path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "*" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


def test_the_page_has_no_inline_code_and_nothing_from_elsewhere(server: str) -> None:
    page = fetch(server, "/")
    assert page.status == 200 and page.headers.get_content_type() == "text/html"
    assert "style=" not in page.text and "onclick" not in page.text and "<style" not in page.text
    assert page.text.count("<script") == page.text.count('<script type="module" src=')
    for name in (ROOT / "nanochat" / "serve" / "ui").iterdir():
        served = fetch(server, f"/ui/{name.name}")
        assert served.status == 200 and served.text == name.read_text(encoding="utf-8")
        foreign = served.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in foreign and "https://" not in foreign
        for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert unsafe not in foreign


@pytest.mark.parametrize(
    "path",
    ["/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/..%2fapp.py", "/ui//etc/passwd", "/ui/%2fetc/passwd", "/ui/", "/ui",
     "/ui/..\\app.py", "/ui/%00", "/../../etc/passwd"],
)  # fmt: skip
def test_static_files_stay_in_their_folder(server: str, path: str) -> None:
    reply = fetch(server, path)
    assert reply.status in (307, 404) and "import" not in reply.text and "root:" not in reply.text


def test_a_foreign_name_that_leads_here_is_refused(server: str) -> None:
    assert fetch(server, "/health", headers={"Host": "evil.example"}).status == 421
    assert fetch(server, CHAT, asking("hi"), headers={**JSON, "Host": "evil.example:8000"}).status == 421
    for name in ("localhost:1234", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert fetch(server, "/health", headers={"Host": name}).status == 200
    for name in ("192.168.1.7:8000", "[fe80::1]:8000", socket.gethostname()):
        assert fetch(server, "/health", headers={"Host": name}).status == 200
    for name in ("", "evil.example.", "1.2.3.4.evil.example", "[evil]", "localhost.evil.example:80"):
        refused = fetch(server, "/health", headers={"Host": name})
        assert refused.status == 421 and "localhost" in refused.json["error"]["message"]


def test_the_name_that_the_server_was_told_to_listen_on_is_its_own_and_no_other_is() -> None:
    with running_server(names=["My.Machine"]) as url:
        assert fetch(url, "/health", headers={"Host": "my.machine:8000"}).status == 200
        assert fetch(url, "/health", headers={"Host": "evil.example"}).status == 421
    with running_server(names=["0.0.0.0"]) as url:
        assert fetch(url, "/health", headers={"Host": "evil.example"}).status == 421


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("LOCALHOST", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_a_server_that_others_can_reach_is_told_from_one_they_cannot(host: str, is_local: bool) -> None:
    try:
        listener = chat_web.listen(host, 0)
    except UserError as error:
        pytest.skip(str(error))  # a machine without IPv6
    with listener:
        assert is_loopback(listener.getsockname()[0]) == is_local


def test_a_foreign_page_gets_no_permission(server: str) -> None:
    origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = fetch(server, CHAT, headers=origin, method="OPTIONS")
    assert preflight.status == 405 and not [name for name in preflight.headers if name.startswith("Access-Control")]


# The recipe ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved_model(base_dir: Path) -> Path:
    engine, tokenizer = trained(together=False)
    model: Any = engine.model
    meta = {"step": 3, "model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    tensors: Any = {"model": dict(model.named_parameters()), "optimizer": {}}
    write_checkpoint(run_folder("sft", "d2") / "step_000003", tensors, {}, meta, tokenizer)
    return base_dir


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_recipe_serves_and_stops_gracefully(saved_model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "scripts.chat_web", "--port=0", "-t", "0", "--device-type=cpu"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(saved_model)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout and process.stderr
            printed = []
            while "http://" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
                printed.append(line)
            url = line[line.index("http://") :].split("/  ")[0]
            assert "sft-d2, step 3" in "".join(printed)
            assert fetch(url, CHAT, asking("What is 37*24?")).json["choices"][0]["message"]["content"].endswith("888.")
            long = connect(url)
            long.request("POST", CHAT, json.dumps({**LONG, "stream": True}), JSON)
            answer = long.getresponse()
            assert answer.read(100)
            process.send_signal(number)
            assert answer.read().decode().endswith("data: [DONE]\n\n"), "the running answer is ended properly"
            rest, errors = process.communicate(timeout=20)
            long.close()
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert rest.splitlines()[-1] == "stopped" and "Traceback" not in errors
    assert "37*24" not in rest + errors and "888" not in rest + errors, "conversations are not logged"


def test_a_port_in_use_is_told_in_one_line_before_a_model_is_looked_for(base_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            chat_web.main([f"--port={port}"])
    told = str(caught.value)
    assert f"--port={port}: already in use" in told and "--port=0" in told and "\n" not in told


def test_a_bad_host_and_a_missing_model_are_told_in_one_line(base_dir: Path) -> None:
    for host in ("no.such.host.invalid", "203.0.113.7", "x" * 70):
        with pytest.raises(UserError, match="--host=") as caught:
            chat_web.main([f"--host={host}", "--port=0"])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no sft model"):
        chat_web.main(["--port=0"])


def test_a_missing_extra_is_told_with_the_command_that_installs_it(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_web, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs starlette and uvicorn: bash runs/setup.sh serve"):
        chat_web.main(["--port=0"])


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://localhost:")])
def test_the_address_can_be_typed_into_a_browser(host: str, shown: str) -> None:
    with chat_web.listen(host, 0) as listener:
        assert chat_web.address(host, listener) == f"{shown}{listener.getsockname()[1]}/"
