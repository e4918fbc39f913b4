"""runs/gpu_check.sh: refuses at once where it can find nothing out, ends in time, and tells what failed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dev import gpu_report

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "runs" / "gpu_check.sh"


def gpu_check(**settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | settings
    return subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_leaves_with_2() -> None:
    done = gpu_check()
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: torch {torch.__version__} sees no CUDA device, so nothing was run")


def test_missing_packages_are_named_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError('wrong libc')", encoding="utf-8")
    done = gpu_check(PYTHONPATH=str(tmp_path), DEVICE="cpu")
    assert done.returncode == 2 and "lacks pyarrow (wrong libc); install" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("settings", "told"), [({"DEVICE": "tpu"}, "choose cuda or cpu"), ({"PYTHON": "/no"}, "no such")]
)
def test_wrong_settings_are_told(settings: dict[str, str], told: str) -> None:
    done = gpu_check(**settings)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


def test_tests_of_a_gpu_are_collected_and_skipped_by_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert ("4 passed" if torch.cuda.is_available() else "no CUDA device") in done.stdout


def test_a_part_that_hangs_is_ended_and_the_rest_is_told_to_have_had_no_time(tmp_path: Path) -> None:
    python = tmp_path / "python"
    hangs = 'case "$*" in *scripts.doctor*) echo started; sleep 500 ;; esac'
    python.write_text(f'#!/bin/sh\n{hangs}\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    done = gpu_check(DEVICE="cpu", PYTHON=str(python), BUDGET="15", OUT=str(tmp_path / "out"))
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"] is False and "doctor" in found["failed"] and found["seconds"] < 60
    assert found["parts"]["doctor"]["code"] == 124 and "doctor ran out of time:" in done.stdout
    assert found["parts"]["d2-bf16"]["last_words"] == ["the other parts have left no time"]


@pytest.mark.slow
def test_at_a_toys_size_every_part_works_and_the_last_line_has_everything(tmp_path: Path) -> None:
    done = gpu_check(DEVICE="cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"] is True and found["parts"].keys() == {"doctor", "training", "kernels", "d2-bf16", "d2-fp8"}
    assert found["tests"]["failed"] == [] and len(found["tests"]["skipped"]) + found["tests"]["passed"] > 6
    speed, fp8 = found["speed"]
    assert (speed["depth"], speed["rows"], speed["length"], speed["mfu"]) == (2, 4, 64, None)
    assert fp8["precision"] == "fp8" and fp8["parameters"] == speed["parameters"]
    assert f"| 2 | bf16 | 4 x 64 | {speed['tokens_per_s']:,.0f} |" in done.stdout


# The report --------------------------------------------------------------------------------------------------------


def write_part(folder: Path, name: str, code: int, text: str) -> None:
    for kind, content in (("log", text), ("code", str(code)), ("seconds", "7")):
        (folder / f"{name}.{kind}").write_text(content, encoding="utf-8")


def benchmark(gpu: str, **more: Any) -> dict[str, Any]:
    figures = {
        "parameters": 10**8,
        "tokens_per_s": {"median": 5e5},
        "matmul_peak_share": {"median": 0.5},
        "peak_device_bytes": 34 * 10**9,
        "first_step_s": 40.0,
    }
    figures |= more
    flags = {"depth": 12, "device_batch_size": 32, "max_seq_len": 2048}
    machine = {"gpus": [gpu], "torch": "2.11.0", "python": "3.12.3"}
    return {"figures": figures, "flags": flags, "machine": machine, "commit": "0123456789abcdef+changes"}


XML = """<testsuites><testsuite>
<testcase classname="tests.test_gpu" name="test_a"/>
<testcase classname="tests.test_gpu" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.test_fp8" name="test_c"><skipped message="no FP8"/></testcase>
</testsuite></testsuites>"""


def test_the_table_shows_mfu_against_the_data_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_part(
        tmp_path, "d12-fp8", 0, f"progress\n{json.dumps(benchmark('NVIDIA H100 80GB HBM3', mfu={'median': 0.404}))}\n"
    )
    write_part(tmp_path, "training", 0, "1 passed")
    (tmp_path / "tests.xml").write_text(XML.replace('<failure message="no"/>', ""), encoding="utf-8")
    found = gpu_report.report(tmp_path, "cuda", 99)
    gpu_report.show(found)
    printed = capsys.readouterr().out
    assert found["ok"] and found["speed"][0]["mfu"] == 0.404
    assert "| 12 | fp8 | 32 x 2,048 | 500,000 | 40.4% | 50.0% | 34.0 GB | 40 s |" in printed
    assert "### NVIDIA H100 80GB HBM3, " in printed and "Commit 0123456789+changes, torch 2.11.0" in printed
    assert "GPU tests: 2 passed, 0 failed, 1 skipped (no FP8)." in printed


def test_a_part_that_fails_fails_the_whole_and_its_last_words_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_part(tmp_path, "d12-fp8", 1, "a\nerror: the chip is warm\n")
    write_part(tmp_path, "d20-bf16", 0, json.dumps(benchmark("A card nobody knows")))
    write_part(tmp_path, "training", 1, "1 failed")
    (tmp_path / "tests.xml").write_text(XML, encoding="utf-8")
    found = gpu_report.report(tmp_path, "cuda", 99)
    gpu_report.show(found)
    printed = capsys.readouterr().out
    assert not found["ok"] and found["failed"] == ["d12-fp8", "training"]
    assert found["tests"]["failed"] == ["tests.test_gpu::test_b"] and found["tests"]["passed"] == 1
    assert "d12-fp8 left with code 1:" in printed and "error: the chip is warm" in printed
    assert [speed["mfu"] for speed in found["speed"]] == [None]


def test_what_is_warned_behind_the_result_is_passed_over_and_half_a_result_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.dumps(benchmark("NVIDIA H100 80GB HBM3"))
    write_part(tmp_path, "d12-bf16", 0, f"{whole}\nwarning: a driver says good-bye\n")
    write_part(tmp_path, "d12-fp8", 0, "no result\n")
    write_part(tmp_path, "d20-bf16", 124, whole[:100])
    found = gpu_report.report(tmp_path, "cpu", 1)
    assert [speed["precision"] for speed in found["speed"]] == ["bf16"]
    assert found["failed"] == ["d12-fp8", "d20-bf16"] and found["parts"]["d20-bf16"]["last_words"] == [whole[:100]]
    gpu_report.show(found)
    assert "d12-fp8 has found nothing out:" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "ok"), [("cuda", False), ("cpu", True)])
def test_on_a_gpu_tests_that_were_all_skipped_have_found_nothing_out(tmp_path: Path, device: str, ok: bool) -> None:
    write_part(tmp_path, "training", 0, "1 skipped")
    assert gpu_report.report(tmp_path, device, 1)["ok"] is ok
