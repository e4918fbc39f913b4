"""Rows of a pass where no flag says so: as many as memory allows, by the forecast and what the process may hold."""

import mmap
import re
import sys

import pytest
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.forecast import USABLE
from nanochat.parallel import Compiled, Runtime
from nanochat.train import passes as passes_module
from nanochat.train.passes import CPU_USABLE, choose_rows, usable_bytes

RT = Runtime(torch.device("cpu"), torch.float32)


def untouched(*batch: Tensor) -> Tensor:
    pytest.fail("rows are foretold, not tried")


def rows_with(
    free_bytes: float | None, monkeypatch: pytest.MonkeyPatch, rows_per_step: int = 96, device: str = "cpu"
) -> int:
    monkeypatch.setattr(passes_module, "usable_bytes", lambda rt: free_bytes)
    rt = Runtime(torch.device(device), torch.float32)
    return choose_rows(ModelConfig(512, 4096, 4, 2, 2, 256), rows_per_step, rt, untouched)


def test_without_a_flag_a_cpu_takes_32_rows_or_fewer_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [rows_with(free, monkeypatch) for free in (None, 1e12, 2e9, 1e9, 1e6)] == [32, 32, 16, 3, 1]
    assert rows_with(1e12, monkeypatch, rows_per_step=7) == 7


def test_a_gpu_takes_all_rows_of_a_step_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [rows_with(free, monkeypatch, device="cuda") for free in (None, 1e12, 1e6)] == [32, 96, 1]
    assert 32 <= rows_with(5e9, monkeypatch, device="cuda") < 96


def test_a_compiled_model_is_foretold_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "usable_bytes", lambda rt: 4e9)
    gpu, config = Runtime(torch.device("cuda"), torch.float32), ModelConfig(512, 4096, 4, 2, 2, 256)
    plain, compiled = (choose_rows(config, 96, gpu, fn) for fn in (untouched, Compiled(untouched, untouched)))
    assert plain < compiled


def test_a_given_number_of_rows_is_taken_and_one_that_cannot_fit_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passes_module, "usable_bytes", lambda rt: 2e9)
    config = ModelConfig(512, 4096, 4, 2, 2, 256)
    assert [choose_rows(config, 96, RT, untouched, given=rows) for rows in (8, 96)] == [8, 96]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and re.match(
        r"warning: --device-batch-size=96 needs about \d\.\d GB, and 2\.0 GB may", told[0]
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_memory_decides_the_rows_one_line_says_so(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for enough in (None, 1e12):
        rows_with(enough, monkeypatch, device=device)
    assert capsys.readouterr().out == ""
    rows = rows_with(2e9, monkeypatch, device=device)
    told = re.fullmatch(
        r"memory decides the rows of a pass: (\d+), which need about ([\d.]+) GB, where 2.00 GB may be used; "
        r"(\d+) would need ([\d.]+) GB \(--device-batch-size decides otherwise\)\n",
        capsys.readouterr().out,
    )
    assert told is not None
    assert (int(told[1]), int(told[3])) == (rows, 32 if device == "cpu" else 96)
    assert float(told[2]) <= 2 < float(told[4])


def test_what_a_gpu_holds_for_this_process_is_usable_and_no_weight_counts_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rt, card = Runtime(torch.device("cuda", 0), torch.float32), 80_000_000_000
    for held in (0, 30_000_000_000):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, held=held: (card - held, card))
        monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device, held=held: held)
        assert usable_bytes(rt) == pytest.approx(USABLE * card)


@pytest.mark.gpu
def test_a_real_gpu_has_as_much_for_a_process_whatever_it_holds_already() -> None:
    rt = Runtime(torch.device("cuda", 0), torch.float32)
    before = usable_bytes(rt)
    weights = torch.ones(2**28, device=rt.device)
    assert before is not None and usable_bytes(rt) == pytest.approx(before, abs=weights.nbytes / 4)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds now")
def test_what_a_process_holds_on_a_cpu_is_usable_besides_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "free_memory_bytes", lambda: 10_000_000_000)
    before = usable_bytes(RT)
    with mmap.mmap(-1, 2**28) as held:  # new memory for sure: what the allocator gives may be some that it has kept
        for start in range(0, len(held), mmap.PAGESIZE):
            held[start] = 1
        after = usable_bytes(RT)
    assert before is not None and after is not None and before > CPU_USABLE * 10_000_000_000
    assert after - before == pytest.approx(2**28, rel=0.1)
