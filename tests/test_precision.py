"""The compute dtype follows from the machine and from $NANOCHAT_DTYPE, and all ranks agree on it."""

from pathlib import Path

import pytest
import torch
from test_ranks import on_ranks
from torch import Tensor

from nanochat import parallel, precision
from nanochat.common import UserError
from nanochat.parallel import Runtime, find_device, runtime
from nanochat.precision import CPU_FEATURES, DTYPES, choose_dtype, dtype_name, features_in, find_dtype
from scripts import base_train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without any instructions for small types."""
    monkeypatch.setattr(precision, "cpu_features", set)


@pytest.mark.usefixtures("plain_cpu")
def test_a_cpu_without_bfloat16_never_computes_in_it_unless_told() -> None:
    assert choose_dtype(CPU, in_batches=True) == torch.float32


@pytest.mark.parametrize(
    ("features", "chosen"),
    [({"avx2", "avx512_bf16"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16), ({"bf16", "i8mm"}, torch.float32)],
)
def test_a_cpu_with_fast_bfloat16_trains_in_it_and_no_clock_is_asked(
    features: set[str], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: features)
    monkeypatch.setattr(precision, "speedup", lambda *_: pytest.fail("a busy moment must not decide"))
    assert choose_dtype(CPU, in_batches=True) == chosen
    assert choose_dtype(CPU) == torch.float32, "decoding casts all weights for every token"


def test_instruction_sets_are_read_from_what_linux_tells() -> None:
    x86 = "model name\t: A bf16 chip\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\nbugs\t\t: amx_bf16\n"
    arm = "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\n"
    assert features_in(x86) == {"fpu", "avx512f", "avx512_bf16", "amx_tile"}
    assert features_in(arm) & CPU_FEATURES[torch.bfloat16] and features_in(arm) & CPU_FEATURES[torch.float16]
    assert features_in("") == set()


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("wish", ["float16", "bfloat16"])
def test_what_a_cpu_only_emulates_works_with_one_warning_of_what_it_costs(
    wish: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", wish)
    assert choose_dtype(CPU) == precision.DTYPES[wish]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and f"warning: NANOCHAT_DTYPE={wish}" in told[0] and "times as long" in told[0]


@pytest.mark.parametrize("wish", ["float32", "float64"])
def test_what_every_cpu_has_needs_no_warning(
    wish: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", wish)
    assert choose_dtype(CPU) == precision.DTYPES[wish]
    assert capsys.readouterr().out == ""


def test_an_unknown_dtype_is_told_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "half")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE=half: choose one of float32, bfloat16, float16, float64"):
        choose_dtype(CPU)


def test_a_dtype_is_told_by_the_name_that_it_is_asked_for_with() -> None:
    for name, dtype in DTYPES.items():
        assert find_dtype(name) == dtype and dtype_name(dtype) == name
        assert Runtime(CPU, dtype).describe() == f"cpu, {name}"


def test_a_gpu_from_before_bfloat16_computes_in_float32_and_names_float16_as_next_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    gpu = torch.device("cuda", 0)
    assert choose_dtype(gpu) == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    with pytest.raises(UserError, match=r"NANOCHAT_DTYPE=bfloat16: cuda.*next best is float16"):
        choose_dtype(gpu)


def test_a_gpu_that_has_bfloat16_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose_dtype(torch.device("cuda", 0)) == torch.bfloat16


def test_mps_computes_in_float32_and_what_it_cannot_do_names_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    assert choose_dtype(mps) == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "float64")
    with pytest.raises(UserError, match=r"NANOCHAT_DTYPE=float64: mps.*next best is float32"):
        choose_dtype(mps)


def test_a_device_that_is_not_there_is_told_what_is() -> None:
    missing = "xpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(UserError, match=rf"--device-type={missing}: not present here; this machine has .*cpu"):
        find_device(missing, 0)
    assert find_device("cpu", 0) == CPU


@pytest.mark.gpu
def test_a_real_gpu_gets_a_dtype_that_it_computes_in() -> None:
    with runtime("cuda") as rt:
        assert rt.dtype == (torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32)
        ones = torch.ones(16, 16, dtype=rt.dtype, device=rt.device)
        assert (ones @ ones).sum().item() == 16**3


def choices(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """What becomes of ranks that chose differently, and alike."""
    differing = parallel.agreed_dtype(torch.bfloat16 if rt.rank else torch.float32, rt.device)
    alike = [parallel.agreed_dtype(dtype, rt.device) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    return {str(i): torch.zeros((), dtype=dtype) for i, dtype in enumerate([differing, *alike])}


def test_ranks_whose_probes_differ_all_compute_in_float32(tmp_path: Path) -> None:
    for found in on_ranks(2, choices, tmp_path):
        assert [found[i].dtype for i in "0123"] == [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# In a run ---------------------------------------------------------------------------------------------------------

TINY = ["--depth=2", "--max-seq-len=32", "--device-batch-size=4", "--total-batch-size=128", "--aspect-ratio=32"]
TINY += ["--head-dim=32", "--save-every=3"]
STAGE = ["--eval-every=-1", "--logger=none", "--device-type=cpu"]


@pytest.mark.usefixtures("tokenizer")
def test_a_run_that_goes_on_in_another_dtype_says_so(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*TINY, *STAGE, f"--data-dir={text}", "--num-iterations=6"]
    for dtype, flags, is_told in (
        ("float32", ["--num-iterations=3"], False),
        ("float32", ["--resume=3"], False),
        ("float16", ["--resume=3"], True),
    ):
        monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
        base_train.main([*run, *flags])
        assert (
            "note: it was trained in torch.float32 and goes on in torch.float16" in capsys.readouterr().out
        ) is is_told
