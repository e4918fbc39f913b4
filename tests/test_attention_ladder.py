"""A kernel that does not work here is never used: by this rank, or by any other; and who is left with less is told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_ranks import on_ranks
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.kernels.attention_ladder import LADDER, AttentionCase, Kernel, Rung, choose_attention, traced, try_rung
from nanochat.kernels.flash_attention import Visibility, attention, attention_reference
from nanochat.model.gpt import attention_case, build_model
from nanochat.parallel import Runtime

CPU = torch.device("cpu")


def raising(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def one_key_short(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    return attention(q, k, v, replace(visibility, window=visibility.window - 1, _made={}))


def without_documents(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    steps = torch.arange(q.size(1))[None]
    return attention(q, k, v, Visibility(steps, steps, visibility.window, is_row=True))


def without_a_number(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    return attention(q, k, v, visibility) * float("nan")


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.05 * gradient


def wrong_gradients(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    return attention(q, WrongBackward.apply(k), v, visibility)


def not_there() -> Kernel:
    raise ImportError("libcudart.so.13: cannot open shared object file")


CASE = AttentionCase(CPU, torch.float32, head_dim=16, groups=2, windows=True, documents=True)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (not_there, "ImportError when it loads: libcudart.so.13: cannot open shared object file"),
        (lambda: raising, "RuntimeError when it runs, full: no kernel image is available for execution on the device"),
        (lambda: one_key_short, "wrong numbers when it runs, windowed: off by 0.1"),
        (lambda: without_documents, "wrong numbers when it runs, full, documents: off by"),
        (lambda: without_a_number, "wrong numbers when it runs, full: off by nan"),
        (lambda: wrong_gradients, "wrong numbers when it runs, full: off by 0.05"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_kernel_is_refused_with_its_reason_and_the_next_one_taken(
    load: Callable[[], Kernel], reason: str, dtype: torch.dtype
) -> None:
    choice = choose_attention(replace(CASE, dtype=dtype), (Rung("broken", load), *LADDER[-2:]))
    assert (choice.name, choice.kernel) == ("SDPA", attention)
    [(name, told)] = choice.refused
    assert name == "broken" and told.startswith(reason)
    assert choice.describe().startswith(f"attention by SDPA (broken: {reason}")


def test_where_all_is_broken_the_textbook_is_left() -> None:
    choice = choose_attention(CASE, (Rung("a", not_there), Rung("b", lambda: raising), LADDER[-1]))
    assert (choice.kernel, [name for name, _ in choice.refused]) == (attention_reference, ["a", "b"])


def test_a_kernel_that_a_compiled_model_cannot_hold_in_one_piece_is_refused() -> None:
    def breaking(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        torch._dynamo.graph_break()
        return attention(q, k, v, visibility)

    assert try_rung(Rung("breaks", lambda: breaking), CASE)[1] == ""
    assert "graph_break" in try_rung(Rung("breaks", lambda: breaking, is_traced=True), CASE)[1]


@pytest.mark.filterwarnings("default")  # of the compiler's own imports
def test_a_check_compiles_as_if_it_was_the_first_however_many_came_before() -> None:
    """torch gives a piece of code up that was compiled eight times, with an error where it must be in one piece."""

    def compiled(size: int) -> int:
        def attend(x: Tensor) -> Tensor:
            return x * size

        return int(traced(attend, backend="eager")(torch.ones(size)).sum())

    assert [compiled(size) for size in range(2, 14)] == [size * size for size in range(2, 14)]


def test_a_rung_that_is_refused_beforehand_is_never_loaded() -> None:
    loaded: list[int] = []
    rung = Rung("far", lambda: loaded.append(1) or attention, obstacle=lambda case: f"not on {case.device}")
    assert choose_attention(CASE, (rung, *LADDER[-2:])).refused == (("far", "not on cpu"),)
    assert not loaded


def test_on_a_cpu_torch_attention_is_used_and_the_others_say_why_not() -> None:
    choice = choose_attention(CASE)
    assert (choice.name, choice.kernel) == ("SDPA", attention)
    reasons = dict(choice.refused)
    assert reasons["FlashAttention 3"] == "made for NVIDIA GPUs, not for cpu"
    assert reasons["FlexAttention"] == "PyTorch has no backward of it on cpu"


# What is told -------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_left_with_what_every_device_has_is_told_once_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu, ladder = replace(CASE, device=torch.device("cuda")), (Rung("Fast", not_there), LADDER[-1])
    for _ in range(2):
        choose_attention(on_gpu, ladder)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith(
        "warning: attention by reference (Fast: ImportError when it loads: libcudart.so.13: cannot"
    )
    assert "python -m scripts.doctor --only=attention" in printed


def test_neither_a_cpu_nor_a_gpu_with_a_kernel_of_its_own_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    choose_attention(CASE, (Rung("Fast", not_there), *LADDER[-2:]))
    fast = Rung("Fast", lambda: attention)
    assert choose_attention(replace(CASE, device=torch.device("cuda")), (fast,)).name == "Fast"
    assert capsys.readouterr().out == ""


# Several ranks ------------------------------------------------------------------------------------------------------


def chosen_on_unequal_ranks(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """Rank 1 cannot do the first rung, nor rank 0 the second; both can do the third."""

    def broken_on(rank: int) -> Callable[[], Kernel]:
        return not_there if rt.rank == rank else lambda: attention

    ladder = (Rung("a", broken_on(1)), Rung("b", broken_on(0)), Rung("c", lambda: attention), LADDER[-1])
    choice = choose_attention(CASE, ladder)
    return {"told": torch.tensor(list(choice.describe().encode()))}


def test_all_ranks_take_the_first_rung_that_all_of_them_can_do(tmp_path: Path) -> None:
    told = {bytes(found["told"].tolist()).decode() for found in on_ranks(2, chosen_on_unequal_ranks, tmp_path)}
    fault = "ImportError when it loads: libcudart.so.13: cannot open shared object file"
    assert told == {f"attention by c (a: on rank 1: {fault}; b: on rank 0: {fault})"}


# In a model ---------------------------------------------------------------------------------------------------------


def test_a_model_is_built_with_the_chosen_kernel_and_computes_through_it() -> None:
    config = ModelConfig(64, 97, 2, 4, 2, 32, doc_mask=True)
    assert attention_case(config, CPU, torch.float32) == replace(CASE, head_dim=8, windows=False)
    windowed = replace(config, sequence_len=2048)
    assert attention_case(windowed, CPU, torch.float32).windows
    assert build_model(config, CPU, torch.float32).attention is attention
    seen: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        seen.append(visibility.window)
        return attention_reference(q, k, v, visibility)

    model = build_model(windowed, CPU, torch.float32, attention=counted)
    model(torch.zeros(1, 10, dtype=torch.long))
    assert seen == [512, 2048]
    model.next_logits(torch.zeros(1, 10, dtype=torch.long), model.new_state(1, 10))
    assert len(seen) == 2  # against a cache it is SDPA with a mask
