"""scripts.doctor runs what it reports on: real faults of real processes are found, and never take it down."""

import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.doctor import device, kernels, sandbox
from nanochat.doctor.checks import CHECKS, Check, find_check
from nanochat.doctor.installed import extra_packages, requirements
from nanochat.doctor.isolation import has_room
from nanochat.doctor.result import Request, Result
from nanochat.kernels.attention_ladder import LADDER
from nanochat.serve.limits import DEFAULT_PORT
from scripts import doctor

if TYPE_CHECKING:
    from hub_server import Server

REPO = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class Visit:
    """A run of the doctor as a process: exit code, what it printed, and the checks by name."""

    def __init__(
        self, *flags: str, limits: Callable[[], None] | None = None, inside: Sequence[str] = (), **environment: str
    ) -> None:
        command = [*inside, sys.executable, "-m", "scripts.doctor", "--json", *flags]
        dropped = ("NANOCHAT_DTYPE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CXX")
        given = {name: value for name, value in os.environ.items() if name not in dropped} | environment
        done = subprocess.run(
            command, cwd=REPO, env=given, capture_output=True, text=True, timeout=300, preexec_fn=limits
        )
        assert done.stdout, done.stderr
        self.code, self.printed, self.errors = done.returncode, done.stdout, done.stderr
        self.record = json.loads(done.stdout.splitlines()[-1])
        self.checks: dict[str, dict[str, Any]] = {check["name"]: check for check in self.record["checks"]}

    def states(self) -> dict[str, str]:
        return {name: check["state"] for name, check in self.checks.items()}


# The whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """All checks on this machine, for a base folder that is not there yet."""
    base = tmp_path_factory.mktemp("doctor") / "not" / "there"
    return Visit("--device-type=cpu", "--offline", NANOCHAT_BASE_DIR=str(base))


def test_every_check_reports_in_the_order_of_the_table(whole: Visit) -> None:
    assert list(whole.checks) == [check.name for check in CHECKS]
    assert whole.code == 0 and whole.record["ok"] is True and whole.errors == ""
    for name, check in whole.checks.items():
        assert check["state"] in doctor.COLOURS and check["seen"] and "\n" not in check["seen"], name
        assert bool(check["advice"]) == (check["state"] != "ok"), name
        assert check["seconds"] > 0


def test_what_training_needs_works_here_and_comes_with_numbers(whole: Visit) -> None:
    assert {whole.states()[check.name] for check in CHECKS if check.needed} <= {"ok", "slow"}
    numbers = {name: check["numbers"] for name, check in whole.checks.items()}
    assert numbers["device"]["flops_per_s"] > 1e9 and 0 < numbers["device"]["error"] < 0.01
    assert numbers["dtype"]["flops_per_s"]["float32"] > 1e9 and numbers["dtype"]["chosen"] in ("float32", "bfloat16")
    assert numbers["packages"]["versions"]["torch"] == torch.__version__
    assert numbers["memory"]["touched_bytes"] > 2**20 and numbers["memory"]["bytes_per_s"] > 0
    assert numbers["disk"]["write_bytes_per_s"] > 0 and numbers["disk"]["read_bytes_per_s"] > 0
    assert 5e9 < numbers["disk"]["checkpoint_bytes"] < 2e10
    assert numbers["text"]["first_chars"].keys() == {"train", "val"}


def test_two_processes_really_add_up(whole: Visit) -> None:
    check = whole.checks["ranks"]
    assert (check["state"], check["numbers"]["ranks"], check["numbers"]["backend"]) == ("ok", 2, "gloo")


def test_the_table_that_people_see_has_a_row_for_every_check(whole: Visit) -> None:
    lines = whole.printed.splitlines()
    assert [line.split()[0] for line in lines[:-3] if line[0] != " "] == [check.name for check in CHECKS]
    assert lines[-3:-1] == ["", "nothing hinders training"]
    assert {line.index(line.split(maxsplit=2)[2]) for line in lines[:-3] if line[0] != " "} == {doctor.MARGIN}


def test_nothing_is_left_behind(whole: Visit) -> None:
    folder = Path(whole.checks["disk"]["numbers"]["folder"])
    assert folder.name == "there" and not folder.parent.exists() and folder.parents[1].is_dir()


@pytest.mark.parametrize("only", ["nothing", "device,nothing", ""])
def test_an_unknown_check_is_refused_with_those_that_are_known(only: str) -> None:
    with pytest.raises(UserError, match=r"no such check: .*choose some of packages, device, "):
        doctor.parse_args([f"--only={only}"])
    with pytest.raises(UserError, match="no such check"):
        find_check("nothing")


def test_what_measures_runs_alone_and_two_others_side_by_side() -> None:
    quiet, loud = (
        Check(name, lambda request: Result("ok", ""), 1, alone=name == "quiet") for name in ("quiet", "loud")
    )
    assert has_room(quiet, []) and has_room(loud, []) and has_room(loud, [loud])
    assert not has_room(quiet, [loud]) and not has_room(loud, [quiet]) and not has_room(loud, [loud, loud])


# Checks that break -----------------------------------------------------------------------------------------------


def fake_package(folder: Path, name: str, source: str) -> dict[str, str]:
    """The environment in which this is the package of that name."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import ctypes; ctypes.string_at(0)", "its process was ended by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, as Linux does when memory runs out"),
        ("import os; os._exit(7)", "it left with code 7"),
        ("raise RuntimeError('the driver is too old')", "RuntimeError: the driver is too old"),
    ],
)
def test_a_torch_that_crashes_is_told_and_the_other_checks_go_on(tmp_path: Path, source: str, told: str) -> None:
    visit = Visit("--only=device,fp8,port", **fake_package(tmp_path, "torch", source))
    assert visit.code == 1 and not visit.record["ok"]
    for name in ("device", "fp8"):
        assert visit.checks[name]["state"] == "failed" and told in visit.checks[name]["seen"]
        assert f"python -m nanochat.doctor {name}" in visit.checks[name]["advice"]
    assert visit.checks["port"]["state"] in ("ok", "missing")
    assert "training will not work: see device" in visit.printed


HANGING = """
import os, pathlib, subprocess, time
grandchild = subprocess.Popen(["sleep", "300"])
pathlib.Path(__file__).with_name("pids").write_text(f"{os.getpid()} {grandchild.pid}")
time.sleep(300)
"""


def is_gone(pid: int) -> bool:
    """Whether a process has ended. An orphan stays a zombie until the system's first process collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_check_that_hangs_is_stopped_with_all_it_started_and_the_others_go_on(tmp_path: Path) -> None:
    began = time.monotonic()
    visit = Visit("--only=device,port", "--time-limit=3", **fake_package(tmp_path, "torch", HANGING))
    assert time.monotonic() - began < 60
    assert visit.checks["device"]["state"] == "failed" and "no answer within 3 s" in visit.checks["device"]["seen"]
    assert visit.checks["port"]["state"] in ("ok", "missing") and visit.code == 1
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and all(map(is_gone, pids))


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_a_doctor_that_is_stopped_leaves_no_check_behind(tmp_path: Path, blow: int) -> None:
    command = [sys.executable, "-m", "scripts.doctor", "--only=device"]
    environment = os.environ | fake_package(tmp_path, "torch", HANGING)
    visit = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    visit.send_signal(blow)
    assert visit.communicate(timeout=30)[1].strip() == b"interrupted" and visit.returncode == 130
    assert all(is_gone(int(word)) for word in (tmp_path / "pids").read_text().split())


def test_a_package_that_does_not_load_is_named(tmp_path: Path) -> None:
    visit = Visit("--only=packages", **fake_package(tmp_path, "tiktoken", "raise ImportError('wrong libc')"))
    assert visit.code == 1 and visit.states() == {"packages": "missing"}
    assert "not tiktoken: wrong libc" in visit.checks["packages"]["seen"]


def test_what_the_project_asks_for_is_read_from_its_own_file() -> None:
    assert requirements().keys() >= {"torch", "numpy", "huggingface_hub"} and ">=" in requirements()["torch"]
    assert extra_packages()["serve"] == ["starlette", "uvicorn"] and "dev" not in extra_packages()


# The device ------------------------------------------------------------------------------------------------------


def test_a_dtype_that_is_none_is_told_and_the_device_is_tried_all_the_same() -> None:
    visit = Visit("--only=device,dtype", "--device-type=cpu", NANOCHAT_DTYPE="bfloat61")
    assert visit.code == 1 and visit.checks["dtype"]["state"] == "failed"
    assert visit.checks["dtype"]["seen"].startswith("NANOCHAT_DTYPE=bfloat61: choose one of float32")
    assert visit.checks["device"]["state"] in ("ok", "slow") and "float32" in visit.checks["device"]["seen"]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has the device")
def test_a_device_that_is_not_there_is_told() -> None:
    visit = Visit("--only=device", "--device-type=mps")
    assert visit.code == 1 and "--device-type=mps: not present here" in visit.checks["device"]["seen"]


def test_wrong_numbers_fail_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (0.1, math.nan):
        monkeypatch.setattr(device, "product_error", lambda where, dtype, error=error: error)
        assert device.device(Request("cpu")).state == "failed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_allowed_error_is_above_what_a_sound_device_does_and_below_a_wrong_digit(dtype: torch.dtype) -> None:
    error, allowed = device.product_error(CPU, dtype), device.largest_error(CPU, dtype)
    assert error < allowed < 0.02
    assert dtype == torch.float64 or error > allowed / 1000


def test_a_dtype_that_is_slower_than_float32_is_told() -> None:
    visit = Visit("--only=dtype", "--device-type=cpu", NANOCHAT_DTYPE="float64")
    assert (
        visit.states() == {"dtype": "slow"} and "float64 is taken (NANOCHAT_DTYPE asks" in visit.checks["dtype"]["seen"]
    )
    assert visit.code == 0 and "unset NANOCHAT_DTYPE" in visit.checks["dtype"]["advice"]


@pytest.mark.parametrize(
    ("configured", "gain", "others", "stolen", "told"),
    [
        (2, 1.8, 0.01, 0.0, ""),
        (4, 1.8, 0.01, 0.0, "set OMP_NUM_THREADS=2"),
        (2, 1.8, 0.4, 0.0, "stop what else runs"),
        (2, 1.8, 0.0, 0.2, "stop what else runs"),
        (2, 1.02, 0.0, 0.0, "a second thread does not help"),
    ],
)
def test_what_is_wrong_with_threads_is_told(
    configured: int, gain: float, others: float, stolen: float, told: str
) -> None:
    shares = {"others_frac": others, "stolen_frac": stolen}
    advice = device.thread_advice(configured, 2, {"1": 1.0, "2": gain}, shares)
    assert advice.startswith(told) and bool(advice) == bool(told)


def test_the_second_thread_is_timed_and_neighbours_are_seen() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        check = Visit("--only=threads").checks["threads"]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert check["state"] == "slow" and check["advice"].startswith("stop what else runs")
    assert check["numbers"]["others_frac"] > 0.1 and check["numbers"]["speedup"]["1"] == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_process_that_may_use_one_core_is_told_so() -> None:
    core = min(os.sched_getaffinity(0))
    visit = Visit("--only=threads", limits=lambda: os.sched_setaffinity(0, {core}), OMP_NUM_THREADS="1")
    assert visit.checks["threads"]["numbers"]["cores"] == 1 and "one core only" in visit.checks["threads"]["seen"]


def test_shares_of_the_processor_add_up() -> None:
    before = {"total": 100.0, "idle": 50.0, "stolen": 5.0}
    after = {"total": 120.0, "idle": 54.0, "stolen": 7.0}
    assert device.taken_by_others(before, after, own_s=10) == pytest.approx({"others_frac": 0.2, "stolen_frac": 0.1})
    assert device.taken_by_others({}, {}, 1) == {} == device.taken_by_others(before, before, 1)


# Compiler, attention ---------------------------------------------------------------------------------------------


def test_a_missing_compiler_is_found_by_compiling(tmp_path: Path) -> None:
    visit = Visit("--only=compile,port", "--device-type=cpu", PATH=str(tmp_path))
    assert visit.checks["compile"]["state"] == "missing" and "g++, clang++" in visit.checks["compile"]["seen"]
    assert "--compile=off" in visit.checks["compile"]["advice"] and visit.code == 0


def test_a_compiler_that_fails_is_no_missing_one(tmp_path: Path) -> None:
    for name in ("g++", "clang++", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\necho internal compiler error >&2; exit 1\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    visit = Visit("--only=compile", "--device-type=cpu", PATH=f"{tmp_path}:/bin:/usr/bin")
    assert visit.checks["compile"]["state"] == "failed" and "Error" in visit.checks["compile"]["seen"]


def test_every_attention_kernel_is_tried_and_refused_with_a_reason(whole: Visit) -> None:
    numbers = whole.checks["attention"]["numbers"]
    assert list(numbers["rungs"]) == [rung.name for rung in LADDER]
    assert numbers["rungs"][numbers["taken"]].startswith("works, tried in ")
    assert all(f"{name}: {outcome}" in whole.checks["attention"]["seen"] for name, outcome in numbers["rungs"].items())


def test_fp8_is_emulated_where_it_is_not_in_hardware(whole: Visit) -> None:
    numbers = whole.checks["fp8"]["numbers"]
    assert numbers.keys() == {"tensorwise", "rowwise"}
    for found in numbers.values():
        assert found["emulated"] is True and 0.01 < found["error"] < kernels.WORST_FP8_ERROR


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
    assert visit.checks["network"]["seconds"] < 20


def test_offline_nothing_is_asked(server: "Server") -> None:
    visit = Visit("--only=network", "--offline", HF_ENDPOINT=server.url)
    assert visit.states() == {"network": "missing"} and server.requests == []


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


def test_a_trial_counts_only_if_it_ends_well(capfd: pytest.CaptureFixture[str]) -> None:
    assert threading.active_count() == 1 or sys.version_info < (3, 12)
    assert sandbox.holds(lambda: True) and not sandbox.holds(lambda: False)
    assert not sandbox.holds(lambda: os.kill(os.getpid(), signal.SIGKILL) is None)
    assert not sandbox.holds(lambda: bool(os.open("/no/such/file", os.O_RDONLY)))
    assert capfd.readouterr() == ("", "")


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
