"""runs/runcpu.sh: every command line that it would run is one that its recipe takes."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The script in a folder where set-up does nothing and python notes its arguments, a JSON list a line."""
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "runcpu.sh", tmp_path / "runs")
    (tmp_path / "runs" / "setup.sh").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    note = f"import json, sys; open({str(tmp_path / 'commands')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{note}" "$@"\n')
    python.chmod(0o755)
    for folder in ("pretrain", "sft"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    return tmp_path


def run(project: Path, *words: str, base: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "NANOCHAT_BASE_DIR": base, "HOME": str(project), "NANOCHAT_TEST_DATA": str(project / "data")}
    command = ["bash", str(project / "runs" / "runcpu.sh"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [[], ["--smoke"], ["--english"]])
def test_every_stage_is_called_with_flags_that_it_knows(project: Path, words: list[str]) -> None:
    result = run(project, *words, base=str(project / "base"))
    assert result.returncode == 0 and result.stderr == "", result
    stages = []
    for line in (project / "commands").read_text().splitlines():
        flag, module, *flags = json.loads(line)
        assert flag == "-m"
        importlib.import_module(module).parse_args(flags)
        stages.append(module.removeprefix("scripts."))
    trained = ["nanochat.report", "tok_train", "base_train", "base_loss", "chat_sft"]
    judged = ["chat_eval", "nanochat.report", "chat_cli", "chat_cli"]
    assert stages == trained + (judged[1:3] if words == ["--english"] else judged)
    assert set(report.STAGES) >= set(stages) - {"nanochat.report", "chat_cli"}
    assert result.stdout.count("/8 ") == 8 and "about 1 min left] 8/8 an answer" in result.stdout


def test_results_go_where_python_looks_for_them(project: Path) -> None:
    assert run(project, "--smoke", base="~/elsewhere").returncode == 0
    assert (project / "elsewhere" / "smoke").is_dir() and not (project / "~").exists()


def test_a_stage_that_fails_is_followed_by_how_to_go_on(project: Path) -> None:
    (project / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho error: no >&2; exit 2\n")
    result = run(project, base=str(project / "base"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: no\n") and "run it again to go on" in result.stderr
