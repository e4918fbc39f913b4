"""Attention, torch.compile and FP8: each runs forward and backward on a small case."""

import shutil
import time
from typing import TYPE_CHECKING

from nanochat.common import UserError
from nanochat.doctor.device import chosen, in_flops
from nanochat.doctor.result import Request, Result

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanochat.kernels.fp8 import Recipe

MODEL_DEPTH = 20  # attention is checked as a model of this depth has it
WORST_FP8_ERROR = 0.05  # of a product of random numbers: eight bits hold one or two digits, and 0.04 was seen


# Attention -------------------------------------------------------------------------------------------------------


def attention_kernels(request: Request) -> Result:
    """Every rung of the ladder on what a model asks for; the first that works is the one that it takes."""
    from nanochat.kernels.attention_ladder import LADDER, try_rung
    from nanochat.model.gpt import attention_case
    from nanochat.precision import dtype_name
    from nanochat.scaling import model_config

    where, dtype = chosen(request)
    case = attention_case(model_config(MODEL_DEPTH), where, dtype)
    outcomes, working = dict[str, str](), []
    for rung in LADDER:
        began = time.perf_counter()
        kernel, fault = try_rung(rung, case)
        outcomes[rung.name] = fault if kernel is None else f"works, tried in {time.perf_counter() - began:.1f} s"
        working += [rung] if kernel is not None else []
    taken = working[0] if working else LADDER[-1]
    told = "; ".join(f"{name}: {outcome}" for name, outcome in outcomes.items())
    seen = f"{taken.name} is taken in {dtype_name(dtype)}, heads of {case.head_dim}. {told}"
    numbers = {"taken": taken.name, "rungs": outcomes, "head_dim": case.head_dim, "windows": case.windows}
    if not working:
        return Result(
            "failed", seen, "no way of computing attention is right here: try another torch or driver", numbers
        )
    if taken == LADDER[-1]:
        return Result("slow", seen, "only the textbook's way works here: try another torch or driver", numbers)
    if taken.is_fallback and where.type in ("cuda", "xpu"):
        return Result("slow", seen, "works, but this GPU could do better: mend what is said of the others", numbers)
    return Result("ok", seen, "", numbers)


# torch.compile ---------------------------------------------------------------------------------------------------


def compiler(request: Request) -> Result:
    """A small function, which never was compiled before, forward and backward."""
    import torch
    from torch._dynamo.exc import TorchDynamoException

    from nanochat.kernels.tolerance import tolerance

    where, _ = chosen(request)
    factor = 1 + time.time_ns() % 10**9 / 10**9  # a number of its own, so that no cache has it
    x, weight = (torch.ones(32, 32, device=where) for _ in range(2))

    def function(weight: "Tensor") -> "Tensor":
        return torch.relu(x @ weight * factor).square().sum()

    began = time.perf_counter()
    try:
        found = gradient(torch.compile(function, dynamic=False), weight)
    except (TorchDynamoException, RuntimeError, OSError) as problem:
        return without_compiler(where.type, problem)
    seconds = time.perf_counter() - began
    error = float((found - gradient(function, weight)).norm() / found.norm())
    seen = f"compiled in {seconds:.1f} s for {where.type}, forward and backward; off by {error:.1g}"
    is_right = error <= tolerance(where, torch.float32)
    advice = "" if is_right else "wrong numbers: train with --compile=off"
    return Result("ok" if is_right else "failed", seen, advice, {"seconds": seconds, "error": error})


def gradient(function: object, weight: "Tensor") -> "Tensor":
    weight = weight.clone().requires_grad_()
    function(weight).backward()  # type: ignore[operator]
    assert weight.grad is not None
    return weight.grad


def without_compiler(kind: str, error: Exception) -> Result:
    """Why nothing was compiled: no compiler is there, or it fails."""
    reason = " ".join(str(error).split())[:200]
    names = ("g++", "clang++") if kind == "cpu" else ("gcc", "cc", "clang")
    is_there = any(map(shutil.which, names))
    advice = "training goes on without it, slower: --compile=off"
    if not is_there:
        seen = f"no C++ compiler ({', '.join(names)}) is in PATH" if kind == "cpu" else "no C compiler is in PATH"
        return Result("missing", seen, f"install one, as g++ of your system; {advice}")
    return Result("failed", f"{type(error).__name__}: {reason}", f"mend the compiler or Python's headers; {advice}")


# FP8 -------------------------------------------------------------------------------------------------------------


def fp8(request: Request) -> Result:
    """A layer's product in each recipe; emulated where the hardware has no eight-bit numbers."""
    from nanochat.kernels.fp8 import find_recipe

    where, _ = chosen(request)
    told, numbers = [], dict[str, dict[str, float]]()
    for name in ("tensorwise", "rowwise"):
        try:
            recipe = find_recipe(name, where)
        except UserError:
            recipe = find_recipe(name, where, emulate=True)
        error, rate = fp8_product(where, recipe)
        numbers[name] = {"error": error, "flops_per_s": rate, "emulated": recipe.is_emulated}
        told.append(f"{name}{' emulated' if recipe.is_emulated else ''} {in_flops(rate)}, off by {error:.1g}")
    seen = "; ".join(told)
    if any(not found["error"] < WORST_FP8_ERROR for found in numbers.values()):
        return Result("failed", f"wrong numbers: {seen}", "train without --fp8", numbers)
    if any(found["emulated"] for found in numbers.values()):
        advice = "nothing to do: training in bfloat16 or float32 does not need it"
        return Result("missing", f"{where.type} here has no FP8 products; {seen}", advice, numbers)
    return Result("ok", seen, "", numbers)


def fp8_product(where: "torch.device", recipe: "Recipe") -> tuple[float, float]:
    """(relative error, FLOP/s) of a linear layer's forward on random numbers."""
    import torch

    from nanochat.kernels.fp8 import fp8_linear
    from nanochat.parallel import Runtime

    size, repeats = (256, 1) if recipe.is_emulated else (4096, 10)
    rt = Runtime(where, torch.bfloat16)
    x, weight = (torch.randn(size, size, device=where, dtype=rt.dtype) for _ in range(2))
    exact = x.float() @ weight.float().t()
    error = float((fp8_linear(x, weight, recipe).float() - exact).norm() / exact.norm())
    rt.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        fp8_linear(x, weight, recipe)
    rt.synchronize()
    return error, repeats * 2 * size**3 / (time.perf_counter() - began)
