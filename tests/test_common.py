"""What every room uses: whole files or old files, paths from the environment, ranks, device peaks."""

import errno
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat.common import (
    UserError,
    atomic_write,
    base_dir,
    check_writable,
    launch_ranks,
    open_bytes,
    prepare_matplotlib,
    print0,
    printable,
    reading,
    record_path,
    record_stage,
    requested_dtype,
    show_progress,
    write_record,
)
from nanochat.memory import MemoryWatch, peak_rss_bytes, tree_rss_bytes

ROOT = Path(__file__).resolve().parents[1]


def test_a_written_file_appears_whole_in_a_new_folder_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("new")
        raise KeyError("bug")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from nanochat.common import UserError, atomic_write

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with atomic_write(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(b"n" * 10_000)
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_a_disk_that_refuses_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{path}: could not be written (File too large); choose another folder with NANOCHAT")
    assert len(done.stdout.splitlines()) == 1
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(UserError, match="could not be written"),
        atomic_write(tmp_path / "file" / "below") as temporary,
    ):
        temporary.write_text("never")


def test_a_full_disk_asks_for_space_and_no_other_folder(tmp_path):
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\); free some space$"):  # noqa: SIM117
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_can_be_written_is_told_from_one_that_cannot_and_nothing_is_left(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "file")
    check_writable(tmp_path / "file")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*taken is no folder\); choose another folder"):
        check_writable(tmp_path / "taken" / "below" / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "content", [b"", b"ab", b"abcdef", b"\xef\xbb", b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbfab"]
)
def test_bytes_are_unpacked_and_read_after_one_byte_order_mark(tmp_path, pack, content):
    path = tmp_path / ("a.txt" if pack is bytes else "a.txt.GZ")
    path.write_bytes(pack(content))
    with open_bytes(path) as file:
        assert file.read() == content.removeprefix(b"\xef\xbb\xbf")


def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_what_to_do(tmp_path):
    for name, told in (
        ("gone", r"No such file or directory\); check the path"),
        ("bad.gz", r"\); it may be truncated"),
    ):
        (tmp_path / "bad.gz").write_bytes(b"no gzip")
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(.*{told}"), open_bytes(tmp_path / name) as file:
            file.read()
    with (
        pytest.raises(UserError, match=r"a, row 3: cannot be read \(odd\); it may"),
        reading(Path("a"), ", row 3", RuntimeError),
    ):
        raise RuntimeError("odd")


def test_text_is_shown_on_one_line_and_moves_no_cursor():
    assert printable("a\n\033[31m\tzażółć 👩\u202e") == "a\\n\\x1b[31m\\tzażółć 👩\\u202e"


def test_two_threads_may_write_the_same_file(tmp_path):
    path = tmp_path / "file.txt"
    both_inside = threading.Barrier(2)
    failures = []

    def write(text: str) -> None:
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(text)
                both_inside.wait(timeout=10)
        except UserError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(text * 1000,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [path]


def test_the_base_folder_comes_from_the_environment_or_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/runs")
    assert base_dir() == tmp_path / "runs"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    assert base_dir() == tmp_path / ".cache" / "nanochat"


def test_an_empty_dtype_counts_as_none(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "")
    assert requested_dtype() is None
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    assert requested_dtype() == "bfloat16"


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5"}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, (5, 8, 0)),
        ({"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}, (13, 16, 5)),
        ({"RANK": "x"}, "RANK=x: must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: must be"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, "LOCAL_RANK=: must be"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: ranks are numbered from 0"),
    ],
)
def test_ranks_are_what_the_launcher_says(monkeypatch, environment, ranks):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(ranks, str):
        with pytest.raises(UserError, match=f"^{ranks}"):
            launch_ranks()
    else:
        assert launch_ranks() == ranks


def test_only_rank_0_prints(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        print0("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"


# Records of stages -------------------------------------------------------------------------------------------------


def saved(name: str) -> dict:
    return json.loads(record_path(name).read_text())


def test_a_stage_records_its_figures_its_time_and_its_memory(base_dir):
    began = time.perf_counter()
    with record_stage("one", began - 5) as record:
        record.update(steps=3, loss=float("nan"), losses=[1.0, float("inf")], earlier_s=50.0)
    record = saved("one")
    assert 55 <= record.pop("wall_clock_s") <= 55 + time.perf_counter() - began
    assert record.pop("peak_rss_bytes") >= peak_rss_bytes() - 2**20
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\d\+00:00", record.pop("ended"))
    assert record == {"steps": 3, "loss": None, "losses": [1.0, None]}  # JSON has neither NaN nor infinity


def test_a_stage_that_did_nothing_or_failed_leaves_the_old_record(base_dir):
    write_record("one", {"steps": 3})
    with record_stage("one"):
        pass
    with pytest.raises(KeyError), record_stage("one") as record:
        record["steps"] = 4
        raise KeyError("bug")
    assert saved("one") == {"steps": 3}


def test_the_clock_of_a_stage_starts_with_the_process(base_dir):
    code = "import time\nfrom nanochat.common import record_stage\ntime.sleep(0.5)\n"
    code += "with record_stage('one') as record:\n    record['steps'] = 1"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert 0.5 <= saved("one")["wall_clock_s"] <= time.perf_counter() - began


@pytest.mark.parametrize(("earlier_s", "is_kept"), [(1.0, True), (0.0, False)])
def test_a_stage_that_goes_on_keeps_the_larger_peak(base_dir, earlier_s, is_kept):
    write_record("one", {"peak_rss_bytes": 2**50})
    with record_stage("one") as record:
        record["earlier_s"] = earlier_s
    assert (saved("one")["peak_rss_bytes"] == 2**50) == is_kept
    record_path("one").write_text('{"peak_rss')
    with record_stage("one") as record:
        record["earlier_s"] = earlier_s
    assert 0 < saved("one")["peak_rss_bytes"] < 2**50


def test_only_rank_0_records(base_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with record_stage("one") as record:
        record["steps"] = 1
    assert not base_dir.exists()


HOLDS = 200 * 2**20
HOLD_MEMORY = f"x = b'x' * {HOLDS}; print('ready', flush=True); input()"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_memory_of_grandchildren_counts_while_they_live():
    command = ["sh", "-c", f'"{sys.executable}" -c "{HOLD_MEMORY}"; true']
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    before = tree_rss_bytes(os.getpid())
    with MemoryWatch(os.getpid(), interval_s=0.01) as memory:
        with subprocess.Popen(command, **pipes) as child:
            child.stdout.readline()
            during = tree_rss_bytes(os.getpid())
            time.sleep(0.3)
            child.communicate(b"\n")
        after = tree_rss_bytes(os.getpid())
    assert min(during, memory.peak_bytes()) >= before + HOLDS
    assert after < before + HOLDS / 2
    assert peak_rss_bytes(of_children=True) >= HOLDS


def test_progress_is_one_line_for_terminals_that_the_end_clears(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for done in (5, 10):
        show_progress("asked", done, 10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    for done in (5, 1234):
        show_progress("asked", done, 1234)
    assert sys.stderr.getvalue() == "\rasked 5/1,234\rasked 1,234/1,234\r                 \r"


def test_matplotlib_gets_a_folder_below_the_base_unless_one_is_given(monkeypatch, base_dir):
    monkeypatch.setenv("MPLCONFIGDIR", "given")
    prepare_matplotlib()
    assert os.environ["MPLCONFIGDIR"] == "given"
    monkeypatch.delenv("MPLCONFIGDIR")
    prepare_matplotlib()
    assert os.environ["MPLCONFIGDIR"] == str(base_dir / "matplotlib")
    monkeypatch.delenv("MPLCONFIGDIR")
