"""Where torch.compile fails, training goes on without it after one warning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_train import PLAN, RT, batches, tiny_training
from torch import Tensor

from nanochat.common import UserError
from nanochat.train.step import train_step


def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    raise OSError("no space left for generated code")


def failing_in_the_backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=failing)(graph, inputs)


@pytest.mark.parametrize("backend", [failing, failing_in_the_backward])
def test_where_compilation_fails_training_goes_on_with_one_warning(
    backend: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (model, optimizer), (plain, exact) = tiny_training(), tiny_training()
    torch._dynamo.reset()
    loss_fn, stream, other = RT.compile(model.loss, "on", backend=backend), batches(4), batches(4)
    for i in range(3):
        ours = train_step(loss_fn, stream, optimizer, PLAN.at(i), RT, 2)
        assert ours == train_step(plain.loss, other, exact, PLAN.at(i), RT, 2)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    for part in ("warning: torch.compile failed", "no space left for generated code", "slower", "--compile=off"):
        assert part in told[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, on import
def test_without_a_cxx_compiler_training_goes_on_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config as inductor

    model, optimizer = tiny_training()
    torch._dynamo.reset()
    loss_fn = RT.compile(model.loss, "on")
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        for i in range(2):
            assert isinstance(train_step(loss_fn, batches(4), optimizer, PLAN.at(i), RT), float)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and "warning: torch.compile failed" in told[0] and "compiler" in told[0].lower()


def test_an_error_of_the_function_itself_is_not_taken_for_the_compilers(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(x: Tensor) -> Tensor:
        return x @ x  # (2, 3) times (2, 3)

    def refusing(x: Tensor) -> Tensor:
        raise UserError("refused")

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|shapes cannot be multiplied"):
        RT.compile(wrong, "on", backend="eager")(torch.ones(2, 3))
    with pytest.raises(UserError, match="refused"):
        RT.compile(refusing, "on", backend="eager")(torch.ones(2, 3))
    assert capsys.readouterr().out == ""
