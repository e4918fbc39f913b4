"""The doctor's checks of the device: right numbers, dtypes, threads, the compiler."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from visiting import Visit

from nanochat.doctor import device, kernels
from nanochat.doctor.result import Request
from nanochat.kernels import attention_ladder
from nanochat.kernels.attention_ladder import LADDER, Kernel, Rung
from nanochat.kernels.tolerance import tolerance

CPU = torch.device("cpu")


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
    error, allowed = device.product_error(CPU, dtype), tolerance(CPU, dtype)
    assert error < allowed < 0.04
    assert dtype == torch.float64 or error > allowed / 1000


@pytest.mark.parametrize(("rate", "state"), [(7e10, "slow"), (9e10, "ok")])
def test_a_dtype_that_is_slower_than_float32_is_told(rate: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "product_rate", lambda where, dtype: rate if dtype == torch.float64 else 1e11)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float64")
    result = device.dtypes(Request("cpu"))
    assert result.state == state and "float64 is taken (NANOCHAT_DTYPE asks for it)" in result.seen
    assert ("unset NANOCHAT_DTYPE" in result.advice) == (state == "slow")


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


def not_there() -> Kernel:
    raise ImportError("no driver")


@pytest.mark.parametrize(("last", "state"), [(LADDER[-1], "slow"), (Rung("b", not_there), "failed")])
def test_where_attention_kernels_are_broken_it_is_told(last: Rung, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_ladder, "LADDER", (Rung("a", not_there), last))
    result = kernels.attention_kernels(Request("cpu"))
    assert result.state == state and "try another torch or driver" in result.advice
    assert result.numbers["taken"] == last.name and "a: ImportError when it loads: no driver" in result.seen


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
