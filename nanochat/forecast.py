"""What training holds in memory, part by part, foretold before anything is built.

A step has four moments at which memory can peak, and the largest counts:

    loss      all activations that the backward will want, and the logits with what is made of them
    backward  the same activations, without logits, and what the last block's backward makes on its way
    end       all gradients, and what the embeddings' backward makes
    update    all gradients, and what the optimizer makes on its way

Weights and optimizer state are there at all of them. They are exact: model and optimizer themselves are built on
torch's meta device, where tensors have shapes and no memory (`exact_sizes`). Activations are counted tensor by tensor
as the model's forward saves them (`saved_elements`): the counts stand beside what they count, in numbers per position.
`scripts.bench --only=memory` compares all this with what a step on a CPU really holds.

For GPUs it is an estimate. What torch.compile leaves there (`COMPILED_...`) is fitted to the ancestor's figures, the
only ones so far: 34 GB at depth 12 and 32 rows of 2,048; on cards of 80 GB 32 rows up to depth 18, 16 from 20 and 8
from 28; 9 GB less in fp8 at depth 26 (pretraining spec 8.2, 11.2). Contexts and caches are rounded guesses.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from nanochat.config import ModelConfig

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
BATCH_BYTES = 8 + 8 + 4  # of a position: input, target, document
AHEAD = 4  # batches that are drawn ahead, besides those of a step

# Through torch.compile.
COMPILED_LAYER = 19  # C numbers per position and layer, about as many as operator by operator
COMPILED_LOGITS = 2  # numbers of a position and vocabulary entry: the logit and its gradient, as the model computes

# Resident memory of a process that has imported torch and trained something tiny.
CPU_PROCESS_BYTES = 340_000_000
# What a whole run has besides: text, tokenizer, loader and evaluation. 128 to 240 MB in seven runs of depths 2 and 4.
CPU_RUN_BYTES = 170_000_000
# What malloc holds besides, as a share of the tensors that live. Training keeps what it frees (keep_freed_memory in
# memory.py): tensors of all sizes lie in one heap, and places between them that fit nothing new stay. Measured in 18
# shapes of 0.15 to 1.9 GB: 0.4 to 0.6 in most, and at worst a process 14 % smaller or 19 % larger than foretold.
HEAP_HOLES = 0.5
GPU_PROCESS_BYTES = 1_000_000_000  # on the card: context, libraries, workspaces
GPU_RANKS_BYTES = 1_000_000_000  # NCCL's buffers
GPU_HOST_BYTES = 3_500_000_000  # in the machine's memory, a rank
USABLE = 0.9  # of a GPU's memory: the allocator's fragments, and what is not foretold


@dataclass(frozen=True)
class Setup:
    """A training step. rows: of a pass; passes: of a step. ranks: devices that share the optimizer's state.

    is_compiled: through torch.compile. logit_positions: how many positions' logits exist at a time; None: as
    kernels/cross_entropy.py cuts them. fp8_recipe: by which linear layers compute in 8 bits.
    is_run: with text, tokenizer and evaluation; else the process does nothing but steps.
    """

    config: ModelConfig
    rows: int
    passes: int = 1
    ranks: int = 1
    dtype: str = "float32"
    is_gpu: bool = False
    is_compiled: bool = False
    logit_positions: int | None = None
    fp8_recipe: str | None = None
    is_run: bool = True

    @property
    def positions(self) -> int:
        return self.rows * self.config.sequence_len

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def is_cast(self) -> bool:
        """Whether layers compute in a copy of their weights."""
        return self.item_bytes < 4


@dataclass(frozen=True)
class Forecast:
    """Bytes by part at the moment when a step holds most. live: tensors; overhead: what the process has besides."""

    moment: str
    live: dict[str, int]
    overhead: dict[str, int]

    @property
    def live_bytes(self) -> int:
        return sum(self.live.values())

    @property
    def total_bytes(self) -> int:
        return self.live_bytes + sum(self.overhead.values())


def forecast(setup: Setup) -> Forecast:
    """The peak of a step, on the device with the largest share of the optimizer's state."""
    sizes = exact_sizes(setup.config, setup.ranks)
    always = {"weights": sizes.weights, "optimizer state": sizes.state, "batches": batch_bytes(setup)}
    at = {"loss": at_loss, "backward": at_backward, "end": at_end, "update": at_update}
    moments = {name: always | of_moment(setup, sizes) for name, of_moment in at.items()}
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {part: size for part, size in moments[peak].items() if size}
    if setup.is_gpu:
        return Forecast(peak, parts, {"framework": GPU_PROCESS_BYTES + (GPU_RANKS_BYTES if setup.ranks > 1 else 0)})
    holes = int(HEAP_HOLES * sum(parts.values()))
    run = {"text and evaluation": CPU_RUN_BYTES} if setup.is_run else {}
    return Forecast(peak, parts, {"framework": CPU_PROCESS_BYTES, **run, "holes in the heap": holes})


def largest_rows(setup: Setup, free_bytes: float, rows_per_step: int, at_most: int | None = None) -> int:
    """The most rows of a pass whose forecast is within `free_bytes`, of which whole passes make a step; 0: none.

    free_bytes: what the process may hold in all, its overhead included. at_most: rows. All are tried, from the largest:
    more rows may need less, since a single pass finds no gradients to add to.
    """
    candidates = (rows for rows in divisors(rows_per_step) if rows <= (at_most or rows_per_step))
    return next((rows for rows in candidates if in_passes(setup, rows, rows_per_step).total_bytes <= free_bytes), 0)


def divisors(number: int) -> list[int]:
    """All of them, the largest first.

    >>> divisors(12)
    [12, 6, 4, 3, 2, 1]
    """
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)}, reverse=True)


def in_passes(setup: Setup, rows: int, rows_per_step: int) -> Forecast:
    """The forecast of a step of so many rows, taken `rows` at a time."""
    return forecast(replace(setup, rows=rows, passes=rows_per_step // rows))


# Exact: weights and optimizer state --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Bytes that follow from shapes alone.

    state: of the optimizer, this rank's share. linear: weights that layers multiply by. head: the output layer's.
    table: the largest that AdamW steps, and own_table this rank's rows of it. matrices: all that Muon steps.
    groups: (matrices that this rank owns, rows, columns) of each shape.
    """

    weights: int
    state: int
    linear: int
    head: int
    table: int
    own_table: int
    matrices: int
    groups: tuple[tuple[int, int, int], ...]


def exact_sizes(config: ModelConfig, ranks: int = 1, rank: int = 0) -> Sizes:
    """Of a rank's model and optimizer, as they are built; rank 0 has the largest share."""
    return _sizes_as_built(replace(config, sequence_len=2048), ranks, rank)  # of which no weight depends


@lru_cache(maxsize=256)
def _sizes_as_built(config: ModelConfig, ranks: int, rank: int) -> Sizes:
    import torch

    from nanochat.checkpoint import num_bytes
    from nanochat.model.gpt import GPT
    from nanochat.optim import MuonAdamW
    from nanochat.parallel import Runtime
    from nanochat.scaling import BaseRates

    meta = torch.device("meta")
    with meta:
        model = GPT(config)
    roles, parameters = model.parameter_roles(), dict(model.named_parameters())
    rt = Runtime(meta, torch.float32, rank, ranks)
    optimizer = MuonAdamW(parameters, roles, BaseRates().by_role(), rt)
    tables = [adam.parameter for adam in optimizer.adam.values()]
    matrices = [parameter for name, parameter in parameters.items() if roles[name] == "matrix"]
    head = num_bytes(parameter for name, parameter in parameters.items() if roles[name] == "lm_head")
    shares = [(sum(bucket.num_own for bucket in group.buckets), group.buckets[0]) for group in optimizer.muon]
    return Sizes(
        weights=num_bytes(parameters.values()),
        state=optimizer.own_state_bytes,
        linear=num_bytes(matrices) + head,
        head=head,
        table=max(num_bytes([table]) for table in tables),
        own_table=max(num_bytes([adam.bucket.own_weights()]) for adam in optimizer.adam.values()),
        matrices=num_bytes(matrices),
        groups=tuple((count, bucket.slice_shape[0], bucket.slice_shape[1]) for count, bucket in shares),
    )


# The four moments --------------------------------------------------------------------------------------------------


def at_loss(setup: Setup, sizes: Sizes) -> dict[str, int]:
    """When the logits' gradient is made, and everything is still there."""
    gradients = sizes.weights if setup.passes > 1 else 0
    return _held(setup, sizes) | {"logits and loss": loss_bytes(setup, sizes), "gradients": gradients}


def at_backward(setup: Setup, sizes: Sizes) -> dict[str, int]:
    """In the last block: nothing of the activations is gone yet, the head's gradient is there."""
    gradients = (sizes.weights if setup.passes > 1 else 0) + sizes.head
    # C per position: of the MLP's 4 C three at a time. FP8 quantises them by way of five in fp32, and some of C.
    each = 22 * 4 if setup.fp8_recipe and not setup.is_compiled else 12 * setup.item_bytes
    return _held(setup, sizes) | {"gradients": gradients, "work space": each * setup.config.n_embd * setup.positions}


def at_end(setup: Setup, sizes: Sizes) -> dict[str, int]:
    """When the last gradient, that of an embedding, is made; in a later pass before it is added to what is there."""
    gradients = sizes.weights + (sizes.table if setup.passes > 1 else 0)
    stem = 5 * setup.config.n_embd * setup.positions * setup.item_bytes
    return {"gradients": gradients, "activations": stem}


def at_update(setup: Setup, sizes: Sizes) -> dict[str, int]:
    """All gradients, or of several ranks the new weights that are gathered; stacks of matrices; the law's own work."""
    work = max(sizes.own_table, *(muon_bytes(group, setup.dtype == "bfloat16") for group in sizes.groups))
    if setup.ranks > 1:  # sums of this rank's share, what is sent, and all ranks' new weights
        return {"gradients": sizes.weights, "communication": 2 * sizes.weights // setup.ranks, "work space": work}
    return {"gradients": sizes.weights, "work space": sizes.matrices + work}


def _held(setup: Setup, sizes: Sizes) -> dict[str, int]:
    """What the forward leaves for the backward."""
    return {"activations": activation_bytes(setup), "cast weights": sizes.linear // 4 * cast_bytes(setup)}


def cast_bytes(setup: Setup) -> int:
    """Of each weight's copy that the backward multiplies with; FP8 by rows makes it anew from the weight itself."""
    if setup.is_compiled or setup.fp8_recipe == "rowwise":
        return 0
    if setup.fp8_recipe:
        return 1
    return setup.item_bytes if setup.is_cast else 0


# Activations -------------------------------------------------------------------------------------------------------


def activation_bytes(setup: Setup) -> int:
    """Saved by all blocks and the stem in a pass of `setup.rows` rows."""
    config, positions = setup.config, setup.positions
    if setup.is_compiled:
        numbers = COMPILED_LAYER * config.n_layer * config.n_embd + 5 * config.n_embd
    else:
        numbers = sum(saved_elements(setup, layer) for layer in range(config.n_layer)) + stem_elements(config)
    each = numbers * setup.item_bytes + 4 * small_elements(config) * config.n_layer + upcast_bytes(setup)
    return positions * (each - fp8_spared_bytes(setup)) + mask_bytes(setup)


def saved_elements(setup: Setup, layer: int) -> int:
    """Numbers per position that a layer's forward saves, run operator by operator."""
    config = setup.config
    C, kv = config.n_embd, config.n_kv_head * config.head_dim
    stream = (3 if config.residual == "lambdas" else 2) * C  # what each sum of the residual scheme gives
    norms = 2 * C  # inputs of q, k, v and of c_fc
    q = 2 * C if config.qk_norm else C  # rotated; normalised
    k = 2 * kv if config.qk_norm or config.key_offset else kv  # rotated; normalised, offset or both
    v = 2 * kv if config.has_value_embedding(layer) else kv  # with the looked-up values of its own
    attended = 2 * C if goes_in_blocks(setup, layer) else C  # of each block; of the row
    mlp = 2 * 4 * C  # before and after the activation
    return stream + norms + q + k + v + attended + mlp


def upcast_bytes(setup: Setup) -> int:
    """Per position, beyond the count in the model's dtype: on a CPU a norm of 16-bit numbers saves them in fp32."""
    config = setup.config
    if setup.is_gpu or setup.is_compiled or not setup.is_cast:
        return 0
    heads = config.n_embd + config.n_kv_head * config.head_dim if config.qk_norm else 0  # q and k
    return (4 - setup.item_bytes) * ((2 * config.n_embd + heads) * config.n_layer + 2 * config.n_embd)


def fp8_spared_bytes(setup: Setup) -> int:
    """Per position, what is not saved because FP8 keeps eight-bit copies of the layers' inputs in its place.

    Operator by operator only the tensorwise recipe does so, and q, k and v each have a copy; rowwise keeps the inputs
    themselves (kernels/fp8.py). Compiled, both spare about as much: the compiler keeps one copy for the three, or makes
    copies anew from what is there.
    """
    config, C = setup.config, setup.config.n_embd
    if not setup.fp8_recipe or (setup.fp8_recipe == "rowwise" and not setup.is_compiled):
        return 0
    if setup.is_compiled:  # inputs of q, k, v and of c_fc (C each) and of the MLP's c_proj (4 C)
        return 6 * C * config.n_layer * (setup.item_bytes - 1)
    spared = 0
    for layer in range(config.n_layer):
        mixed = C if goes_in_blocks(setup, layer) else 0  # else attention itself saves what c_proj is given
        gated = 0 if config.has_value_embedding(layer) else C  # the gate wants what q, k and v are given
        spared += (C + 4 * C + gated + mixed) * setup.item_bytes - (3 + 1 + 1 + 4) * C
    return spared


def stem_elements(config: ModelConfig) -> int:
    """Numbers per position that embedding, smear, backout and the last norm save."""
    return (4 + config.smear) * config.n_embd


def small_elements(config: ModelConfig) -> int:
    """fp32 numbers per position and layer: each norm's factor, attention's log-sum, gates."""
    gates = config.n_kv_head if config.value_embeddings else 0  # two numbers in every other layer
    return 2 + 2 * config.n_head + config.n_kv_head + gates


def goes_in_blocks(setup: Setup, layer: int) -> bool:
    """Whether the layer's queries are taken in blocks (kernels/flash_attention.py)."""
    config = setup.config
    return not setup.is_gpu and (config.doc_mask or config.windows[layer] < config.sequence_len - 1)


def mask_bytes(setup: Setup) -> int:
    """What is added to the scores of blocks: a band that all blocks share, or of documents each block's own."""
    from nanochat.kernels.flash_attention import CPU_BLOCK

    config = setup.config
    length, windows = config.sequence_len, {w for i, w in enumerate(config.windows) if goes_in_blocks(setup, i)}
    if not config.doc_mask:
        return sum(CPU_BLOCK * (window + CPU_BLOCK) for window in windows) * setup.item_bytes
    seen = (min(start, window) + CPU_BLOCK for window in windows for start in range(0, length, CPU_BLOCK))
    return setup.rows * CPU_BLOCK * sum(seen) * setup.item_bytes


def loss_bytes(setup: Setup, sizes: Sizes) -> int:
    """Logits and what is made of them; where they are cut, also the finished gradients of head and hidden states."""
    from nanochat.kernels.cross_entropy import CPU, GPU

    config, chunking = setup.config, GPU if setup.is_gpu else CPU
    is_cut = setup.logit_positions is None and chunking.pays(setup.positions, config.vocab_size)
    if not is_cut:  # softcapped logits, their log-softmax, and two gradients of that
        each = COMPILED_LOGITS * setup.item_bytes if setup.is_compiled else 4 * (4 if config.softcap else 3)
        return min(setup.positions, setup.logit_positions or setup.positions) * config.vocab_size * each
    positions = min(setup.positions, chunking.positions(config.vocab_size)[0])
    each = setup.item_bytes * (COMPILED_LOGITS if setup.is_compiled else 1)
    blocks = 0 if setup.is_compiled else 4 * 3 * min(chunking.block, positions * config.vocab_size)
    head = sizes.head * (2 if positions < setup.positions else 1)  # a chunk's, and the sum over those before
    hidden = (setup.positions + positions) * config.n_embd * setup.item_bytes
    return positions * config.padded_vocab_size * each + blocks + head + hidden


def batch_bytes(setup: Setup) -> int:
    """On the device: all batches of the step. On a CPU also those that are drawn ahead."""
    return setup.positions * BATCH_BYTES * (setup.passes if setup.is_gpu else 2 * setup.passes + AHEAD)


# The optimizer's own work ------------------------------------------------------------------------------------------


def muon_bytes(group: tuple[int, int, int], in_bf16: bool) -> int:
    """The most that `optim.MuonGroup.step` holds besides state and gradients.

    The stacked weights and the update all the time; in an iteration x and a * x, and either the four products of r x r
    or the sum's two terms and itself; afterwards what the weights are changed by.
    """
    count, rows, columns = group
    numbers, gram = count * rows * columns, count * min(rows, columns) ** 2
    iteration = max(2 * numbers + 4 * gram, 4 * numbers + gram) * (2 if in_bf16 else 4)
    return max(4 * 2 * numbers + iteration, 21 * numbers)
