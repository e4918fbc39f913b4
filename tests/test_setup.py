"""runs/setup.sh, run for real on a tiny project of the same name, with a package index in a folder and no network.

PATH holds nothing but the tools that the script uses, and there is no home folder.
"""

import contextlib
import hashlib
import inspect
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # the one that the tests' own .venv was made with
NOWHERE = "http://127.0.0.1:1/"  # refuses every connection
TOOLS = (
    *("awk", "bash", "cat", "cmp", "df", "dirname", "grep", "head", "mkdir", "mv"),
    *("paste", "rm", "sed", "seq", "sort", "tail", "tr", "uname"),
    *(["ps"] if not Path("/proc/self").exists() else []),
)


def write_wheel(folder, name, version, needs=""):
    """A wheel with one empty module. Its source, copied, is a part of the tiny project's build backend."""
    import zipfile
    from pathlib import Path

    path = Path(folder) / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path.name


def add_page(index: Path, name: str) -> None:
    """Lists the wheels in index/name as a package index does."""
    wheels = sorted((index / name).glob("*.whl"))
    links = [f'<a href="{w.name}#sha256={hashlib.sha256(w.read_bytes()).hexdigest()}">{w.name}</a>' for w in wheels]
    (index / name / "index.html").write_text(f"<!DOCTYPE html><html><body>{' '.join(links)}</body></html>")


def torch_index(index: Path, version: str) -> str:
    (index / "torch").mkdir(parents=True)
    write_wheel(index / "torch", "torch", version)
    add_page(index, "torch")
    return index.as_uri()


class Project:
    """A folder with runs/setup.sh, and the environment to run it in."""

    def __init__(self, folder: Path):
        self.folder, self.env = folder, {"PIP_CONFIG_FILE": os.devnull, "PYTHON": BASE_PYTHON}
        self.env["PIP_INDEX_URL"] = torch_index(folder / "index", "2.9.0")
        (folder / "tools").mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (folder / "tools" / tool).symlink_to(found)
        self.env["PATH"] = str(folder / "tools")
        (folder / "runs").mkdir()
        shutil.copy(ROOT / "runs" / "setup.sh", folder / "runs")
        pythons = re.search("^requires-python = .*$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert pythons
        (folder / "pyproject.toml").write_text(
            f'[project]\nname = "nanochat"\nversion = "0.1.0"\n{pythons[0]}\ndependencies = ["torch>=2.9,<3"]\n'
            '[project.optional-dependencies]\ndev = ["in-no-index"]\n'
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]'  # no newline at the end
        )
        needs = "Requires-Dist: torch\nProvides-Extra: dev\nRequires-Dist: in-no-index; extra == 'dev'\n"
        build = f"def build_editable(folder, *_):\n    return write_wheel(folder, 'nanochat', '0.1.0', {needs!r})\n"
        (folder / "backend.py").write_text(inspect.getsource(write_wheel) + build)

    def command(self, *extras: str) -> list[str]:
        return [str(self.folder / "tools" / "bash"), str(self.folder / "runs" / "setup.sh"), *extras]

    def set_up(self, *extras: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*extras), env=self.env | env, capture_output=True, text=True, timeout=120)

    def complaint(self, *extras: str, **env: str) -> str:
        """What a set-up that fails says on stderr: one line."""
        run = self.set_up(*extras, **env)
        assert run.returncode == 2, run
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
        return run.stderr

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    @property
    def packages(self) -> Path:
        return next((self.venv / "lib").glob("python3*/site-packages"))

    def torch(self) -> list[str]:
        return [path.name for path in self.packages.glob("torch-*")]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, subprocess.CompletedProcess]:
    """A project whose .venv was cut off while it was made, and the set-up that followed."""
    if find_spec("ensurepip") is None:
        pytest.skip("this Python has no ensurepip to make the tiny project's .venv with (Debian: python3-venv)")
    project = Project(tmp_path_factory.mktemp("first"))
    ended = subprocess.Popen(["true"])
    ended.wait()
    (project.venv / "bin").mkdir(parents=True)
    (project.venv / "nanochat-unfinished").write_text(f"{ended.pid} making\n")
    return project, project.set_up()


@pytest.fixture
def prepared(project: Project, first) -> Project:
    """A project whose .venv has pip, but was never finished: torch and nanochat are missing."""
    shutil.copytree(first[0].venv, project.venv, symlinks=True)
    for path in (*project.venv.glob("nanochat-*"), *project.packages.glob("torch*"), *project.packages.glob("nano*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return project


def test_a_cut_off_making_starts_afresh_and_a_second_set_up_needs_no_network(first):
    project, run = first
    assert run.returncode == 0 and run.stderr == "", run
    assert "starting afresh" in run.stdout and "torch 2.9.0" in run.stdout
    assert "Collecting" not in run.stdout and "Processing" not in run.stdout
    again = project.set_up(PIP_INDEX_URL=NOWHERE)
    assert (again.returncode, again.stdout) == (0, ".venv is up to date (extras: none)\n")
    assert "unknown extra; choose from: dev" in project.complaint("nix")


def test_an_interrupted_set_up_keeps_what_is_there_and_goes_on(prepared):
    assert prepared.set_up().returncode == 0
    (prepared.packages / "kept.txt").touch()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = prepared.env | {"PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/"}
        with subprocess.Popen(
            prepared.command("dev"), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as run:
            silent.settimeout(30)
            connection, _ = silent.accept()  # pip is waiting for the index
            os.killpg(run.pid, signal.SIGINT)
            output, _ = run.communicate(timeout=60)
            connection.close()
    assert run.returncode == 130 and b"interrupted; what is installed is kept" in output
    half = prepared.packages / "torch-2.9.0.dist-info"  # as if it had been cut off while it was being unpacked
    (half / "INSTALLER").unlink()
    (prepared.packages / "~orch-2.8.0.dist-info").mkdir()  # what pip puts aside while it replaces a package
    (prepared.packages / "~orch-2.8.0.dist-info" / "INSTALLER").touch()
    (prepared.packages / "torch.py").unlink()

    after = prepared.set_up()
    assert after.returncode == 0 and "going on from there" in after.stdout, after
    assert "making .venv" not in after.stdout and (prepared.packages / "kept.txt").exists()
    assert (half / "INSTALLER").exists() and (prepared.packages / "torch.py").exists()
    assert not list(prepared.packages.glob("~*"))


def test_without_a_network_one_line_says_so(prepared):
    complaint = prepared.complaint(PIP_INDEX_URL=NOWHERE)
    assert "torch was not installed: a package index cannot be reached" in complaint
    assert "details: .venv/nanochat-setup.log" in complaint
    assert "Retry" in (prepared.venv / "nanochat-setup.log").read_text()


def test_what_pip_refuses_is_said_in_its_own_last_words_and_what_was_there_still_holds(prepared):
    assert prepared.set_up().returncode == 0
    assert "nanochat was not installed: No matching distribution found for in-no-index" in prepared.complaint("dev")
    assert "up to date" in prepared.set_up(PIP_INDEX_URL=NOWHERE).stdout


def test_a_full_disk_is_named(prepared):
    shutil.rmtree(prepared.packages / "pip")
    (prepared.packages / "pip").mkdir()
    words = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    (prepared.packages / "pip" / "__main__.py").write_text(
        f"import sys\nsys.exit(None if '--version' in sys.argv else {words!r})\n"
    )
    assert "torch was not installed: the disk is full: free some space in" in prepared.complaint()


def test_on_a_terminal_pip_shows_what_it_does(prepared):
    terminal, its_other_end = pty.openpty()
    with subprocess.Popen(prepared.command(), env=prepared.env | {"TERM": "dumb"}, stdout=its_other_end) as run:
        os.close(its_other_end)
        limit = threading.Timer(60, run.kill)
        limit.start()
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(terminal, 4096):
                shown += piece
        limit.cancel()
    os.close(terminal)
    assert run.returncode == 0 and b"Successfully installed torch-2.9.0" in shown, shown


def test_another_torch_index_installs_torch_anew_and_is_remembered(prepared):
    assert prepared.set_up().returncode == 0
    other = torch_index(prepared.folder / "other", "2.9.0+other")
    changed = prepared.set_up(NANOCHAT_TORCH_INDEX=other)
    assert changed.returncode == 0 and prepared.torch() == ["torch-2.9.0+other.dist-info"], changed
    assert "up to date" in prepared.set_up().stdout


def test_two_set_ups_at_once_are_refused_and_a_process_id_used_again_is_none(prepared):
    sleeper = prepared.folder / "setup.sh"
    sleeper.write_text("read -r _\n")
    with subprocess.Popen(["bash", str(sleeper)], stdin=subprocess.PIPE) as other:
        (prepared.venv / "nanochat-unfinished").write_text(f"{other.pid} installing\n")
        assert f"another set-up (process {other.pid}) is at work" in prepared.complaint()
        assert other.stdin
        other.stdin.close()
    (prepared.venv / "nanochat-unfinished").write_text(f"{os.getpid()} installing\n")  # alive, but no set-up
    assert "going on from there" in prepared.set_up().stdout


def test_another_python_than_that_of_the_venv_is_refused_with_the_index_to_use_again(prepared):
    index = torch_index(prepared.folder / "other", "2.9.0+other")
    assert prepared.set_up(NANOCHAT_TORCH_INDEX=index).returncode == 0
    python = prepared.folder / "tools" / "another"
    python.write_text(f'#!{prepared.folder}/tools/bash\ncase "$2" in *print*) echo Python 3.12 ;; esac\n')
    python.chmod(0o755)
    assert f"rm -rf .venv, then run this again with NANOCHAT_TORCH_INDEX={index}" in prepared.complaint(
        PYTHON="another"
    )


def test_what_uv_complains_of_is_said_in_one_line(project):
    uv = project.folder / "tools" / "uv"
    uv.write_text(f"#!{project.folder}/tools/bash\necho 'error: error sending request: dns error' >&2\nexit 2\n")
    uv.chmod(0o755)
    assert ".venv was not installed: a package index cannot be reached" in project.complaint(NANOCHAT_UV="1")


def without_pip(project: Project) -> str:
    """A Python without ensurepip (as on Debian without python3-venv) and without pip."""
    for module, folder in (("ensurepip", "for-all"), ("pip", "for-base")):
        (project.folder / folder / module).mkdir(parents=True)
        (project.folder / folder / module / "__init__.py").write_text("raise ImportError\n")
    project.env["PYTHONPATH"] = str(project.folder / "for-all")
    python = project.folder / "tools" / "python3"
    path = f"{project.folder}/for-base:{project.folder}/for-all"
    python.write_text(f'#!{project.folder}/tools/bash\nPYTHONPATH={path} exec {BASE_PYTHON} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_without_ensurepip_and_pip_one_line_says_what_to_install(project):
    complaint = project.complaint(PYTHON=without_pip(project))
    assert f"apt install python3.{sys.version_info[1]}-venv" in complaint


def test_a_python_too_old_is_named_with_the_version_found(project):
    del project.env["PYTHON"]
    python = project.folder / "tools" / "python3"
    python.write_text(f'#!{project.folder}/tools/bash\n[ "$1" = -V ] && echo Python 3.9.18\n')
    python.chmod(0o755)
    complaint = project.complaint()
    assert "needs Python 3.10 to 3." in complaint and "found: Python 3.9.18" in complaint
    assert not project.venv.exists()


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_a_folder_that_cannot_be_written_to_is_named(is_cut_off):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        project = Project(Path(name))
        if is_cut_off:
            project.venv.mkdir()
            (project.venv / "nanochat-unfinished").write_text(f"{os.getpid()} making\n")
        project.folder.chmod(0o555)
        other_user = 65534 if os.geteuid() == 0 else None  # root may write everywhere
        try:
            run = subprocess.run(project.command(), env=project.env, capture_output=True, text=True, user=other_user)
        finally:
            project.folder.chmod(0o755)
    assert run.returncode == 2 and run.stderr.startswith(f"error: {name} cannot be written to"), run.stderr
    assert run.stderr.count("\n") == 1
