"""Linear layers in FP8: their three matrix products on eight-bit numbers, twice as fast as bfloat16 where in hardware.

Eight bits hold little range, so an operand is first divided by what makes its largest number the largest there is:

    scale = format's maximum / max |x|       q = round(clamp(x * scale))       x is about q / scale

There are two formats: e4m3, more digits, for inputs and weights; e5m2, more range, for gradients of outputs. A layer
y = x W^T has three products, and both operands of each are quantised:

    y = x W^T                 dL/dx = g W                 dL/dW = g^T x

tensorwise: one scale per operand, so what the forward quantised serves the backward too, and is all that it keeps.
rowwise: one scale per row of the first operand and per column of the second. An outlier spoils its own row only, but
each product needs quantisation of its own, since rows of W are columns elsewhere.

`emulated_product` is the definition: eight-bit numbers, multiplied and summed in fp32. `scaled_product` has hardware do
it. Both take the same operands, and a `Recipe` says which is used. Quantisation is plain torch around one opaque
operator, so that a compiler fuses it with its neighbours.

Weights are quantised in every pass, not once per step: by count of bytes and operations a fiftieth of the time of a
pass of 2^15 tokens on a Hopper chip. A cache would have to know of every way in which weights change.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError

# Format of inputs and weights, that of gradients: the usual pair; one where rows of e5m2 cannot be scaled; the MI300's,
# the same bits with other exponents. The first that works is taken.
FORMATS = (
    (torch.float8_e4m3fn, torch.float8_e5m2),
    (torch.float8_e4m3fn, torch.float8_e4m3fn),
    (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
TINY = 1e-12  # an operand of zeros still has a scale
MULTIPLE = 16  # of what a hardware product sums over, and of its columns
SMALLEST_DIM = 128  # below it quantising costs more than the product gains


@dataclass(frozen=True)
class Recipe:
    """How a layer computes in FP8."""

    is_rowwise: bool = False
    is_emulated: bool = False
    value_format: torch.dtype = FORMATS[0][0]
    gradient_format: torch.dtype = FORMATS[0][1]


def find_recipe(name: str, device: torch.device, emulate: bool = False) -> Recipe:
    """The recipe `tensorwise` or `rowwise` on this device, found out by running it once.

    Raises UserError where the hardware has no FP8, unless it is to be emulated.
    """
    assert name in ("tensorwise", "rowwise")
    if emulate:
        return Recipe(name == "rowwise", is_emulated=True)
    for formats in FORMATS if device.type == "cuda" else ():
        recipe = Recipe(name == "rowwise", False, *formats)
        if runs(recipe, device):
            return recipe
    raise UserError(
        f"--fp8: {device.type} here has no FP8 products (NVIDIA's Ada, Hopper and later chips and AMD's MI300 have); "
        "leave it off, which computes in bfloat16 or float32; or add --fp8-emulate: the same numbers, slowly"
    )


def runs(recipe: Recipe, device: torch.device) -> bool:
    """Whether the hardware does a layer's products, with the right result."""
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16)
    try:
        first, second = (
            quantize(ones, recipe.gradient_format, 1, recipe),
            quantize(ones, recipe.value_format, 0, recipe),
        )
        return scaled_product(first, second, ones.dtype, recipe).eq(MULTIPLE).all().item() is True
    except (RuntimeError, ValueError):  # no such kernel, no such format
        return False


def is_eligible(weight: Tensor) -> bool:
    """Whether a layer with this weight (out, in) gains by FP8."""
    return all(dim % MULTIPLE == 0 and dim >= SMALLEST_DIM for dim in weight.shape)


# Operands ------------------------------------------------------------------------------------------------------------

Operand = tuple[Tensor, Tensor]  # eight-bit numbers, and what to multiply them by: 1 / scale


def quantize(x: Tensor, dtype: torch.dtype, summed_dim: int, recipe: Recipe) -> Operand:
    """A matrix in eight bits. summed_dim: the one that the product sums over; rowwise it shares a scale.

    Returns (numbers, 1 / scale): the latter (), or with size 1 in `summed_dim`.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    size = exact.abs()
    largest = size.amax(dim=summed_dim, keepdim=True) if recipe.is_rowwise else size.amax()
    limit = torch.finfo(dtype).max
    scale = limit / largest.clamp_min(TINY)
    return (exact * scale).clamp(-limit, limit).to(dtype), scale.reciprocal()


# Products ------------------------------------------------------------------------------------------------------------


def emulated_product(first: Operand, second: Operand, dtype: torch.dtype, recipe: Recipe, fast: bool = False) -> Tensor:
    """(M, K) times (K, N) as defined. Returns (M, N) in `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    (a, a_step), (b, b_step) = first, second
    return ((a.to(exact) @ b.to(exact)) * (a_step * b_step)).to(dtype)


def scaled_product(first: Operand, second: Operand, dtype: torch.dtype, recipe: Recipe, fast: bool = False) -> Tensor:
    """The same in hardware: the one place that calls torch's private operator.

    It wants the second operand column by column, and multiples of 16 to sum over. Rowwise it gives bfloat16 only.
    fast: sum with less care, as is usual for the forward.
    """
    (a, a_step), (b, b_step) = first, second
    if missing := -a.size(1) % MULTIPLE:  # tokens, in the gradient of the weight: zeros add nothing
        a, b = pad(a, (0, missing)), pad(b, (0, 0, 0, missing))
    if recipe.is_rowwise:  # a transposed column still has the strides of a row
        a_step, b_step = a_step.flatten()[:, None], b_step.flatten()[None]
    out = torch._scaled_mm(
        a.contiguous(),
        b.t().contiguous().t(),
        scale_a=a_step.float(),
        scale_b=b_step.float(),
        out_dtype=torch.bfloat16 if recipe.is_rowwise else dtype,
        use_fast_accum=fast,
    )
    return out.to(dtype)


def pad(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """`F.pad` with zeros, for types that it does not know."""
    return F.pad(x.view(torch.uint8), sizes).view(x.dtype)


def product(first: Operand, second: Operand, dtype: torch.dtype, recipe: Recipe, fast: bool = False) -> Tensor:
    return (emulated_product if recipe.is_emulated else scaled_product)(first, second, dtype, recipe, fast)


# The layer -----------------------------------------------------------------------------------------------------------


def fp8_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """`F.linear(x, weight)` in FP8. x: (..., in), weight: (out, in). Returns (..., out) in x's dtype."""
    rows = x.reshape(-1, x.size(-1))
    a, a_step = quantize(rows.detach(), recipe.value_format, 1, recipe)
    b, b_step = quantize(weight.detach(), recipe.value_format, 1, recipe)
    settings = (recipe.is_rowwise, recipe.is_emulated, recipe.value_format, recipe.gradient_format)
    out = quantized_linear(rows, weight, a, a_step, b, b_step, *settings)
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op("nanochat::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    a_step: Tensor,
    b: Tensor,
    b_step: Tensor,
    is_rowwise: bool,
    is_emulated: bool,
    value_format: torch.dtype,
    gradient_format: torch.dtype,
) -> Tensor:
    """The product of the quantised x and weight; x and weight themselves are there to be given gradients."""
    recipe = Recipe(is_rowwise, is_emulated, value_format, gradient_format)
    return product((a, a_step), (b.t(), b_step.t()), x.dtype, recipe, fast=True)


@quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, a, a_step, b, b_step, *settings = inputs
    ctx.recipe, ctx.dtypes = Recipe(*settings), (x.dtype, weight.dtype)
    ctx.save_for_backward(*((x, weight) if ctx.recipe.is_rowwise else (a, a_step, b, b_step)))


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and weight, from that of the output (M, out)."""
    recipe: Recipe = ctx.recipe
    if recipe.is_rowwise:
        x, weight = (quantize(t, recipe.value_format, 0, recipe) for t in ctx.saved_tensors)
    else:
        x, weight = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
    g, g_step = quantize(grad, recipe.gradient_format, 1, recipe)
    grad_x = product((g, g_step), weight, ctx.dtypes[0], recipe)
    if recipe.is_rowwise:
        g, g_step = quantize(grad, recipe.gradient_format, 0, recipe)
    grad_weight = product((g.t(), g_step.t()), x, grad.dtype, recipe).to(ctx.dtypes[1])
    return grad_x, grad_weight, *[None] * 8


quantized_linear.register_autograd(gradients, setup_context=keep_for_backward)
