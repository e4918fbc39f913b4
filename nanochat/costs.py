"""What a base run will be and cost, as numbers: model, steps, memory, text, hours, money, disk.

Steps, batch and model are those of `planning.base_plan`, which the run itself calls; memory is `forecast`'s; shards are
counted as the download counts them. Hours are FLOPs over what the devices are expected to do: 40 % of a GPU's bf16
peak, which is an assumption (the ancestor got 50 % at depth 24 and 48 % at 26 in bf16 on 8xH100, pretraining spec 11),
or what cores of a CPU were measured to do (`hardware.CORE_FLOPS`).

`cpu` is the machine that asks (`this_cpu`): its free memory, its cores, and the dtype that a run would choose on it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from nanochat import planning, scaling
from nanochat.common import UserError, requested_dtype
from nanochat.forecast import GPU_HOST_BYTES, USABLE, Setup, exact_sizes, in_passes, largest_rows
from nanochat.hardware import (
    CPU,
    EXPECTED_UTILISATION,
    PEAK_SHARES,
    PRICES_AS_OF,
    Devices,
    Hardware,
    core_flops,
    usable_cores,
)
from nanochat.planning import BasePlan, Request

EMULATED_SHARE = 0.1  # of what a CPU does in float32: a guess, products take 12 times as long and more

# What a run is planned for ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Devices of one kind; a CPU with all its cores is one. Bytes and FLOP/s are each device's.

    usable_bytes: what training may hold. dtype: what it computes in. flops: a GPU's peak in it; of a CPU
    what it is expected to do. cores: a CPU's. price: as listed, US dollars per device and hour.
    """

    name: str
    memory_bytes: int
    usable_bytes: int
    dtype: str
    flops: float
    devices: int = 1
    cores: float | None = None
    price: float | None = None

    @property
    def is_cpu(self) -> bool:
        return self.cores is not None

    def expected_flops(self, utilisation: float = EXPECTED_UTILISATION) -> float:
        """Of all devices in training. utilisation: share of a GPU's peak."""
        return self.devices * self.flops * (1 if self.is_cpu else utilisation)


def find_machine(devices: Devices) -> Machine:
    """What --gpus names, computing as `$NANOCHAT_DTYPE` says. Raises UserError for what it cannot be."""
    return this_cpu() if devices.gpu is None else gpu_machine(devices.gpu, devices.count, requested_dtype())


def gpu_machine(gpu: Hardware, devices: int = 1, dtype: str | None = None) -> Machine:
    """dtype: else bfloat16, which every GPU of the table has."""
    from nanochat.precision import dtype_name, find_dtype

    dtype = dtype_name(find_dtype(dtype)) if dtype else "bfloat16"
    if dtype not in PEAK_SHARES:
        raise UserError(f"NANOCHAT_DTYPE={dtype}: no speed of GPUs is known; choose one of {', '.join(PEAK_SHARES)}")
    usable = int(USABLE * gpu.memory_bytes)
    return Machine(gpu.name, gpu.memory_bytes, usable, dtype, PEAK_SHARES[dtype] * gpu.flops, devices, None, gpu.price)


def cpu_machine(
    cores: float, memory_bytes: int, dtype: str, usable_bytes: float | None = None, is_emulated: bool = False
) -> Machine:
    """usable_bytes: else the share that a run takes of a machine on which nothing else lies.

    is_emulated: the dtype; the CPU has no instructions for it and is many times slower.
    """
    from nanochat.train.passes import CPU_USABLE

    usable = CPU_USABLE * memory_bytes if usable_bytes is None else usable_bytes
    each = EMULATED_SHARE * core_flops("float32") if is_emulated else core_flops(dtype)
    return Machine(CPU, memory_bytes, int(usable), dtype, cores * each, cores=cores)


def this_cpu() -> Machine:
    """The machine that this runs on, as a run on its CPU would find it now."""
    import torch

    from nanochat.memory import group_limit_bytes, machine_memory_bytes
    from nanochat.parallel import Runtime
    from nanochat.precision import choose_dtype, dtype_name, is_emulated
    from nanochat.train.passes import usable_bytes

    device = torch.device("cpu")
    rt = Runtime(device, choose_dtype(device, in_batches=True))
    dtype = dtype_name(rt.dtype)
    known = [size for size in (machine_memory_bytes(), group_limit_bytes()) if size is not None]
    cores = min(torch.get_num_threads(), usable_cores())
    return cpu_machine(cores, min(known, default=2**34), dtype, usable_bytes(rt), is_emulated(device, rt.dtype))


@dataclass(frozen=True)
class Settings:
    """What besides the plan decides on memory, time and disk: the flags of these names.

    fp8_recipe: None: not in FP8. data_dir: the text; empty: shards of the default data set. utilisation: share of a
    GPU's peak; None: what is expected of all. price: US dollars per device and hour; None: the list price.
    """

    compile: str = "auto"
    fp8_recipe: str | None = None
    eval_every: int = -1
    eval_tokens: int = 0
    save_every: int = -1
    keep_last: int = 1
    keep_every: int = -1
    data_dir: str = ""
    utilisation: float | None = None
    price: float | None = None


# What it comes to ------------------------------------------------------------------------------------------------


def plan_run(asked: Request, machine: Machine, settings: Settings, vocab_size: int | None = None) -> dict[str, Any]:
    """Everything that is told, as numbers. vocab_size: else the one that scripts.tok_train derives."""
    from nanochat.model.gpt import flops_per_token, predict_parameters, scaling_parameters

    vocab_size = vocab_size or scaling.vocab_size_for(asked.depth, asked.laws)
    base = planning.base_plan(asked, vocab_size, machine.devices, machine.expected_flops())
    config, training = base.config, base.training
    if asked.time_budget_s and settings.utilisation:  # the batch is fitted to a guess, steps come as fast as they do
        steps = max(1, round(training.num_steps * settings.utilisation / EXPECTED_UTILISATION))
        training = replace(training, num_steps=steps)
        base = replace(base, training=training)
    parameters = predict_parameters(config)
    tokens = training.num_steps * training.total_batch_tokens
    per_token = flops_per_token(config)
    time = time_of(asked, base, machine, settings, per_token)
    disk = disk_of(base, settings)
    memory = memory_of(asked, base, machine, settings)
    return {
        "machine": {
            "devices": machine.devices,
            "device": machine.name,
            "memory_bytes": machine.memory_bytes,
            "cores": machine.cores,
        },
        "depth": asked.depth,
        "model": config.to_dict(),
        "parameters": {**parameters, "total": sum(parameters.values()), "scaling": scaling_parameters(config)},
        "training": {
            "tokens": tokens,
            "steps": training.num_steps,
            "batch_tokens": training.total_batch_tokens,
            "flops_per_token": per_token,
            "flops": per_token * tokens,
        },
        "memory": memory,
        "text": text_of(tokens, settings.data_dir),
        "time": time,
        "money": money_of(machine, settings, time["hours"]),
        "disk": disk,
        "host_memory_bytes": host_memory_of(machine, memory["total_bytes"], disk["checkpoint_bytes"]),
    }


def memory_of(asked: Request, base: BasePlan, machine: Machine, settings: Settings) -> dict[str, Any]:
    """Of each device, at the rows per pass that the run takes."""
    from nanochat.parallel import is_compiled

    setup = Setup(
        base.config,
        1,
        ranks=machine.devices,
        dtype=machine.dtype,
        is_gpu=not machine.is_cpu,
        is_compiled=is_compiled(settings.compile, is_cpu=machine.is_cpu),
        fp8_recipe=settings.fp8_recipe,
    )
    rows = asked.device_batch_rows or planning.derived_rows(setup, base.rows_per_step, machine.usable_bytes)
    expected = in_passes(setup, rows, base.rows_per_step)
    return {
        "rows": rows,
        "passes": base.rows_per_step // rows,
        "rows_per_step": base.rows_per_step,
        "largest_rows": largest_rows(setup, machine.usable_bytes, base.rows_per_step),
        "fits": expected.total_bytes <= machine.usable_bytes,
        "dtype": machine.dtype,
        "fp8": settings.fp8_recipe,
        "compiled": setup.is_compiled,
        "peak_at": expected.moment,
        "parts_bytes": expected.live | expected.overhead,
        "total_bytes": expected.total_bytes,
        "usable_bytes": machine.usable_bytes,
    }


def text_of(tokens: int, data_dir: str) -> dict[str, Any]:
    """Characters that hold each token once, and the shards of the default data set that
    `python -m nanochat.dataset --tokens` fetches for them; none where the text lies in `data_dir`."""
    from nanochat.download import CHARS_PER_BYTE, CHARS_PER_SHARD, CHARS_PER_TOKEN, shards_for

    characters = tokens * CHARS_PER_TOKEN
    train = 0 if data_dir else shards_for(characters, CHARS_PER_SHARD)
    fetched = (train + 1) * CHARS_PER_SHARD / CHARS_PER_BYTE if train else 0
    return {"data_dir": data_dir, "characters": int(characters), "train_shards": train, "bytes": int(fetched)}


def time_of(
    asked: Request, base: BasePlan, machine: Machine, settings: Settings, flops_per_token: int
) -> dict[str, Any]:
    """Hours of steps and of evaluations, which compute a third of what a step does per token."""
    utilisation = settings.utilisation or EXPECTED_UTILISATION
    speed, steps = machine.expected_flops(utilisation), base.training.num_steps
    evaluations = 0 if settings.eval_every < 1 else 1 + -(-steps // settings.eval_every)
    train_s = asked.time_budget_s or steps * base.training.total_batch_tokens * flops_per_token / speed
    eval_s = evaluations * settings.eval_tokens * flops_per_token / 3 / speed
    return {
        "flops_per_s": speed,
        "utilisation": None if machine.is_cpu else utilisation,
        "tokens_per_s": speed / flops_per_token,
        "training_hours": train_s / 3600,
        "evaluations": evaluations,
        "evaluation_tokens": settings.eval_tokens,
        "evaluation_hours": eval_s / 3600,
        "hours": (train_s + eval_s) / 3600,
    }


def money_of(machine: Machine, settings: Settings, hours: float) -> dict[str, Any]:
    price = machine.price if settings.price is None else settings.price
    source = None if price is None else f"listed, {PRICES_AS_OF}" if settings.price is None else "given"
    dollars = None if price is None else price * machine.devices * hours
    return {"price_per_device_hour": price, "price_is": source, "dollars": dollars}


def disk_of(base: BasePlan, settings: Settings) -> dict[str, Any]:
    """Checkpoints: weights and the whole optimizer state, as many as are kept, and one that is being written."""
    sizes, steps, every = exact_sizes(base.config), base.training.num_steps, settings.save_every
    saved = 1 + ((steps - 1) // every if every > 0 else 0)  # the last step's, whatever its number
    earlier = max(0, saved - settings.keep_last)
    kept = saved - earlier
    if every > 0 and settings.keep_every > 0:
        kept += earlier * every // math.lcm(every, settings.keep_every)
    best = 1 if settings.eval_every > 0 and saved > kept else 0
    each, at_once = sizes.weights + sizes.state, min(kept + best + 1, saved)
    return {
        "weights_bytes": sizes.weights,
        "optimizer_bytes": sizes.state,
        "checkpoint_bytes": each,
        "checkpoints_kept": kept + best,
        "most_at_once": at_once,
        "bytes": at_once * each,
    }


def host_memory_of(machine: Machine, training_bytes: int, checkpoint_bytes: int) -> int:
    """Of the whole computer: on a CPU the training; beside GPUs a process each, and a checkpoint on its way to disk."""
    return training_bytes if machine.is_cpu else machine.devices * GPU_HOST_BYTES + checkpoint_bytes
