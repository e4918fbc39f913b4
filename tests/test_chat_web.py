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
from serving import CHAT, JSON, LONG, ROOT, SUM, asking, connect, fetch, running_server, trained

from nanochat.checkpoint import run_folder, write_checkpoint
from nanochat.common import UserError
from nanochat.serve.access import Access, is_loopback, read_keys
from nanochat.serve.conversations import ConversationLog
from nanochat.serve.guard import is_open
from nanochat.serve.routes import House, routes_of
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
    with running_server(access=Access(names=["My.Machine"])) as url:
        assert fetch(url, "/health", headers={"Host": "my.machine:8000"}).status == 200
        assert fetch(url, "/health", headers={"Host": "evil.example"}).status == 421
    with running_server(access=Access(names=["0.0.0.0"])) as url:
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


FRIEND = "https://friend.example"


def test_a_page_that_was_named_may_read_answers_and_no_other() -> None:
    with running_server(access=Access(origins=[FRIEND], keys=[KEY])) as url:
        for origin in (FRIEND, "https://evil.example", "null", f"{FRIEND}:8080", f"{FRIEND}.evil.example"):
            ask_first = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            preflight = fetch(url, CHAT, headers={"Origin": origin, **ask_first}, method="OPTIONS")
            reply = fetch(url, CHAT, asking("hi"), headers={**JSON, "Origin": origin, "Authorization": f"Bearer {KEY}"})
            assert reply.status == 200
            for told in (preflight, reply):
                assert told.headers["Access-Control-Allow-Origin"] == (origin if origin == FRIEND else None)
                assert "Access-Control-Allow-Credentials" not in told.headers
            assert preflight.status == (204 if origin == FRIEND else 401)
            assert preflight.headers["Access-Control-Allow-Headers"] == ("authorization" if origin == FRIEND else None)


# Keys -------------------------------------------------------------------------------------------------------------

KEY = "sixteen-characters-or-more"
PATHS = ["/stats", "/metrics", "/v1/models", "/v1/models/nanochat", "/tokenizer_info", "/nothing", "//health", "/uix"]
PATHS += ["/health/", "/docs", "/ui"]


def test_with_keys_every_path_needs_one_but_the_page_and_the_health_check() -> None:
    with running_server(access=Access(keys=["another-key-of-some-length", KEY])) as url:
        for path in ("/", "/ui/main.js", "/health"):
            assert fetch(url, path).status == 200
        for path in PATHS:
            refused = fetch(url, path)
            assert refused.status == 401 and refused.json["error"]["code"] == "invalid_api_key", path
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        for path in (CHAT, "/v1/completions", "/chat/completions", "/tokenize", "/detokenize", "/highlight"):
            assert fetch(url, path, asking("hi")).status == 401, path
        assert fetch(url, "/stats", headers={"Authorization": f"bearer {KEY}"}).json["tokens"] == 0
        wrong = ["", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer", "Bearer \xe9"]
        for given in wrong:
            assert fetch(url, "/stats", headers={"Authorization": given.encode("latin-1")}).status == 401, given


def test_every_route_that_the_server_has_is_closed_or_listed(server: str) -> None:
    closed = {"/stats", "/metrics", "/v1/models", "/v1/models/{name:path}", CHAT, "/v1/completions", "/highlight"}
    closed |= {"/tokenizer_info", "/tokenize", "/detokenize", "/chat/completions"}
    house = House([])
    paths = {getattr(route, "path", "") for route in routes_of(house)}
    assert {path for path in paths if not is_open(path if path != "/ui" else "/ui/")} == closed
    assert paths - closed == {"/", "/health", "/ui"}


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "holds no key"), ("# only a remark\n\n", "holds no key"), ("short\n", "line 1: a key has at least 16"),
     (f"{KEY}\nwith a blank inside it\n", "line 2"), (f"{KEY}ü", "visible ASCII")],
)  # fmt: skip
def test_a_file_of_keys_that_is_none_is_told(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        read_keys(file)
    file.write_text(f"# mine\n{KEY}\n\n  {KEY}2  \n", encoding="utf-8")
    assert read_keys(file) == [KEY, f"{KEY}2"]
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "missing")


# Conversations ------------------------------------------------------------------------------------------------------


def test_conversations_are_written_down_only_where_asked_for_and_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = ConversationLog(path)
    with running_server(log=log) as url:
        fetch(url, CHAT, asking("What is 37*24?"))
        assert fetch(url, CHAT, asking("Who are you?", stream=True, max_tokens=3)).text.endswith("[DONE]\n\n")
        fetch(url, "/v1/completions", {"prompt": "line\nbreak", "max_tokens": 2})
        fetch(url, CHAT, asking("hi", temperature=9))
    log.close()
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [entry["model"] for entry in entries] == ["nanochat"] * 3
    assert entries[0]["asked"] == asking("What is 37*24?")["messages"]
    assert entries[0]["answers"] == [{"parts": SUM, "finish_reason": "stop"}]
    assert entries[1]["answers"][0]["finish_reason"] == "length" and entries[2]["asked"] == ["line\nbreak"]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="--log-conversations="):
        ConversationLog(tmp_path / "no" / "folder")


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
    command += ["--drain=0.2", "--model-tag=d2,d2@3"]
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
            assert "sft-d2: step 3" in "".join(printed) and "warning" not in "".join(printed)
            assert [model["id"] for model in fetch(url, "/v1/models").json["data"]] == ["sft-d2", "sft-d2@3"]
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


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--cors-origin=*"], r"--cors-origin=\*: must be scheme and host"),
        (["--cors-origin=https://a.example/path"], "without a path"),
        (["--model-tag=d4,d4"], "--model-tag=d4,d4: the same model twice"),
        (["--model-tag=d4,"], "a name is missing"),
        (["--model-tag=d4@x"], "--model-tag=d4@x"),
        (["--model-tag=d4@5", "--step=6"], "--step: give it behind each tag"),
        (["--context=forget"], "--context=forget"),
        (["--max-rows=0", "--max-waiting=-1"], "--max-rows=0.*\n--max-waiting=-1"),
    ],
)
def test_flags_that_cannot_be_meant_are_told(flags: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        chat_web.parse_args(flags)


def test_who_can_reach_a_server_that_listens_elsewhere_is_said(saved_model: Path) -> None:
    keys = saved_model / "keys"
    keys.write_text(KEY)
    for flags, told in (([], "for there are no keys"), ([f"--api-key-file={keys}"], "who have a key")):
        command = [sys.executable, "-m", "scripts.chat_web", "--port=0", "--host=0.0.0.0", "--device-type=cpu", *flags]
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(saved_model)}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                lines = []
                while "http://" not in (line := process.stdout.readline()):
                    assert line
                    lines.append(line)
                assert told in "".join(lines)
            finally:
                process.kill()


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://localhost:")])
def test_the_address_can_be_typed_into_a_browser(host: str, shown: str) -> None:
    with chat_web.listen(host, 0) as listener:
        assert chat_web.address(host, listener) == f"{shown}{listener.getsockname()[1]}/"
