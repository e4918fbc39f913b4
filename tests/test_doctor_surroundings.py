"""The doctor's checks of what surrounds a run: memory, disk, network, ports, the base folder, locks."""

import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from visiting import Visit

from nanochat.doctor import sandbox
from nanochat.doctor.result import Request
from nanochat.serve.limits import DEFAULT_PORT

if TYPE_CHECKING:
    from hub_server import Server

# Memory and disk -------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_had_is_told() -> None:
    limit = 2**28  # enough for Python, not for a quarter of this machine
    visit = Visit("--only=memory", limits=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert visit.code == 1 and visit.checks["memory"]["state"] == "failed"
    assert "could not be had" in visit.checks["memory"]["seen"] and "ulimit -v" in visit.checks["memory"]["advice"]


def test_a_base_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    visit = Visit("--only=disk", NANOCHAT_BASE_DIR=str(tmp_path / "file" / "base"))
    assert visit.code == 1 and visit.checks["disk"]["state"] == "failed"
    assert "choose another folder with NANOCHAT_BASE_DIR" in visit.checks["disk"]["seen"]


def test_a_limit_on_file_sizes_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # noqa: E731
    visit = Visit("--only=disk", limits=limits, NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert visit.code == 1 and visit.checks["disk"]["state"] == "failed"
    assert "File too large" in visit.checks["disk"]["seen"] and list(tmp_path.iterdir()) == []


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, where we may mount one."""
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("options", "told"), [("size=1m", "No space left on device); free some space"), ("ro", "Read-only file system")]
)
def test_a_disk_that_takes_nothing_is_told(tmp_path: Path, options: str, told: str) -> None:
    with small_disk(tmp_path / "disk", options) as base:
        visit = Visit("--only=disk", NANOCHAT_BASE_DIR=str(base))
        assert visit.code == 1 and visit.checks["disk"]["state"] == "failed" and told in visit.checks["disk"]["seen"]
        assert list(base.iterdir()) == []


def test_a_disk_too_small_for_checkpoints_is_told_but_hinders_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=200m") as base:
        visit = Visit("--only=disk", NANOCHAT_BASE_DIR=str(base))
    assert visit.code == 0 and visit.checks["disk"]["state"] == "slow"
    assert visit.checks["disk"]["numbers"]["free_bytes"] < 2.1e8 and "free some space" in visit.checks["disk"]["advice"]


# Network and ports -----------------------------------------------------------------------------------------------


def test_a_hub_that_answers_is_told(server: "Server") -> None:
    visit = Visit("--only=network", HF_ENDPOINT=server.url)
    assert visit.states() == {"network": "ok"}
    assert f"{server.url} has karpathy/climbmix-400b-shuffle at {server.commit[:12]}" in visit.checks["network"]["seen"]


@pytest.mark.parametrize(("fault", "told"), [(503, "the hub answers 503"), (404, "the hub does not have it (404)")])
def test_a_hub_that_refuses_is_told(server: "Server", fault: int, told: str) -> None:
    server.fail("info", [fault] * 10)
    visit = Visit("--only=network", HF_ENDPOINT=server.url)
    assert visit.code == 0 and visit.states() == {"network": "missing"} and told in visit.checks["network"]["seen"]


def test_without_a_network_the_doctor_says_so_and_leaves_with_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
    visit = Visit("--only=network", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert visit.code == 0 and visit.states() == {"network": "missing"}
    assert f"offline: http://127.0.0.1:{port} does not answer" in visit.checks["network"]["seen"]


def test_a_hub_that_never_answers_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        visit = Visit("--only=network", HF_ENDPOINT=f"http://127.0.0.1:{mute.getsockname()[1]}")
    assert visit.states() == {"network": "missing"} and "offline: " in visit.checks["network"]["seen"]


def test_offline_nothing_is_asked(server: "Server") -> None:
    visit = Visit("--only=network", "--offline", HF_ENDPOINT=server.url)
    assert visit.states() == {"network": "missing"} and server.requests == []
    assert visit.checks["network"]["seen"] == "not asked, as --offline wants it"


def take(port: int) -> socket.socket:
    """A socket that listens there, if nobody else does, which would be as good."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return socket.socket()


def test_a_port_that_is_taken_is_told_with_the_next_free_one() -> None:
    with take(DEFAULT_PORT), take(DEFAULT_PORT + 1):
        visit = Visit("--only=port")
    check = visit.checks["port"]
    assert visit.code == 0 and check["state"] == "missing" and "Address already in use" in check["seen"]
    free = check["numbers"]["free"]
    assert DEFAULT_PORT + 1 < free < DEFAULT_PORT + 100 and f"--port={free}" in check["advice"]
    socket.create_server(("127.0.0.1", free)).close()


# What stands in the base folder ----------------------------------------------------------------------------------


def test_what_stands_in_the_base_folder_is_read(base_dir: Path, tokenizer: None) -> None:
    shards = base_dir / "base_data_climbmix"
    shards.mkdir()
    (shards / "text.jsonl").write_text('{"text": "one"}\n{"text": "tw', encoding="utf-8")
    (base_dir / "checkpoints" / "base" / "d4" / "step_000010").mkdir(parents=True)
    visit = Visit("--only=tokenizer,text,models")
    assert visit.states() == {"tokenizer": "ok", "text": "failed", "models": "failed"}
    assert visit.checks["tokenizer"]["numbers"] == {"vocab_size": 400}
    assert str(shards) in visit.checks["text"]["seen"]
    assert "damaged: base/d4" in visit.checks["models"]["seen"] and visit.code == 1


def test_a_damaged_tokenizer_is_told(base_dir: Path, tokenizer: None) -> None:
    (path,) = (base_dir / "tokenizer").glob("tokenizer.json")
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    visit = Visit("--only=tokenizer")
    assert visit.states() == {"tokenizer": "failed"} and str(path) in visit.checks["tokenizer"]["seen"]


# The sandbox -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="locks of Linux")
def test_a_level_counts_only_if_a_program_in_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    if sandbox.fault("namespaces"):
        pytest.skip("this kernel has no namespaces for us")
    for level in sandbox.TRIALS:
        monkeypatch.setitem(sandbox.TRIALS, level, "raise AssertionError('it got out')")
    result = sandbox.sandbox(Request())
    assert (result.state, result.numbers["level"], result.numbers["namespaces"]) == ("missing", "none", False)
    assert "it got out" in result.seen and "in a container" in result.advice


@pytest.mark.skipif(sys.platform != "linux", reason="locks of Linux")
def test_where_namespaces_are_forbidden_the_level_falls(tmp_path: Path) -> None:
    inside = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this kernel has no namespaces for us to forbid")
    assert Visit("--only=sandbox").checks["sandbox"]["numbers"]["level"] == "namespaces"
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    visit = Visit("--only=sandbox", inside=["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh"])
    numbers = visit.checks["sandbox"]["numbers"]
    assert numbers["namespaces"] is False and numbers["limits"] is True
    assert numbers["level"] == ("landlock" if numbers["landlock"] else "limits")
    assert numbers["landlock"] == (numbers["landlock_version"] > 0)
