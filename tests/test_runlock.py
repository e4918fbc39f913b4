"""A run has one writer, for exactly as long as its process lives."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_models import make, training

from nanochat import runlock
from nanochat.checkpoint import run_folder
from nanochat.common import UserError
from nanochat.runlock import hold, lock_path, writer

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_is_held_by_one_process_at_a_time(base_dir: Path) -> None:
    folder = run_folder("base", "d2")
    assert writer(folder) is None
    with (
        training(folder) as process,
        pytest.raises(UserError, match=f"process {process.pid} .*wait until it ends, or stop it"),
    ):
        hold(folder)
    with hold(folder):
        assert writer(folder) == os.getpid()
        assert writer(run_folder("base", "d22")) is None and writer(run_folder("sft", "d2")) is None
    assert writer(folder) is None


def test_a_lock_is_freed_when_nobody_refers_to_it(base_dir: Path) -> None:
    folder = run_folder("base", "d2")
    lock = hold(folder)
    assert writer(folder) == os.getpid()
    del lock
    assert writer(folder) is None


def test_a_lock_whose_file_was_removed_meanwhile_does_not_count(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder("base", "d2")
    opened = []

    def open_and_lose(path: Path) -> int:
        opened.append(os.open(path, os.O_RDWR | os.O_CREAT))
        if len(opened) == 1:
            path.unlink()  # by a process that deletes the run, between our opening and our locking
        return opened[-1]

    folder.parent.mkdir(parents=True)
    monkeypatch.setattr(runlock, "_open", open_and_lose)
    with hold(folder):
        assert len(opened) == 2 and writer(folder) == os.getpid()


def test_a_discarded_lock_can_be_taken_anew(base_dir: Path) -> None:
    folder = run_folder("base", "d2")
    hold(folder).discard()
    assert not lock_path(folder).exists()
    with hold(folder):
        assert writer(folder) == os.getpid()


def test_looking_who_writes_does_not_keep_a_training_from_starting(base_dir: Path) -> None:
    folder = run_folder("base", "d2")
    hold(folder)
    program = "import sys; from pathlib import Path; from nanochat.runlock import writer\n"
    program += "print('looking', flush=True)\nwhile True: writer(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline()
        for _ in range(100):
            hold(folder).release()
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()


def test_a_link_in_the_locks_place_is_not_followed(base_dir: Path, tmp_path: Path) -> None:
    folder = make("d2", 5)
    (tmp_path / "precious").write_text("text")
    lock_path(folder).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be made"):
        hold(folder)
    assert (tmp_path / "precious").read_text() == "text"
