"""What a base run will be and cost, as numbers: model, steps, memory, text, hours, money, disk.

Steps, batch and model are those of `planning.base_plan`, which the run itself calls; memory is `forecast`'s; shards are
counted as the download counts them. Hours are FLOPs over what the devices are expected to do: 40 % of a GPU's bf16
peak, which is an assumption (the ancestor got 50 % at depth 24 and 48 % at 26 in bf16 on 8xH100, pretraining spec 11),
or what two cores of a CPU were measured to do (`hardware.MEASURED_CORE_FLOPS`).
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from nanochat import planning, scaling
from nanochat.common import UserError, requested_dtype
from nanochat.config import ModelConfig
from nanochat.forecast import GPU_HOST_BYTES, ITEM_BYTES, USABLE, Setup, exact_sizes, forecast, largest_rows
from nanochat.hardware import (
    EXPECTED_UTILISATION,
    PRICES_AS_OF,
    Hardware,
    expected_flops,
    find_hardware,
    parse_machine,
)
from nanochat.planning import BasePlan


def plan_run(args: Namespace, cpu_cores: int, cpu_memory_gib: float) -> dict[str, Any]:
    """Everything that is told, as numbers. cpu_cores, cpu_memory_gib: of the machine that `cpu` stands for."""
    from nanochat.model.gpt import flops_per_token, predict_parameters, scaling_parameters

    ranks, name = parse_machine(args.gpus)
    device = find_hardware(name, cpu_cores, cpu_memory_gib)
    vocab_size = args.vocab_size or scaling.vocab_size_for(args.depth, args.laws)
    expected = ranks * expected_flops(None if device.is_cpu else device.flops)
    base = planning.base_plan(args, vocab_size, ranks, expected)
    config, training = base.config, base.training
    parameters = predict_parameters(config)
    tokens = training.num_steps * training.total_batch_tokens
    per_token = flops_per_token(config)
    run: dict[str, Any] = {
        "machine": {"devices": ranks, "device": device.name, "memory_bytes": device.memory_bytes, "cores": None},
        "depth": args.depth,
        "model": config.to_dict(),
        "parameters": {**parameters, "total": sum(parameters.values()), "scaling": scaling_parameters(config)},
        "training": {
            "tokens": tokens,
            "steps": training.num_steps,
            "batch_tokens": training.total_batch_tokens,
            "flops_per_token": per_token,
            "flops": per_token * tokens,
        },
    }
    if device.is_cpu:
        run["machine"]["cores"] = cpu_cores
    run["memory"] = memory_of(args, base, device, ranks)
    run["text"] = text_of(tokens)
    run["time"] = time_of(args, run, device, ranks)
    run["money"] = money_of(args, device, ranks, run["time"]["hours"])
    run["disk"] = disk_of(args, run)
    run["host_memory_bytes"] = host_memory_of(run, device, ranks)
    return run


def memory_of(args: Namespace, base: BasePlan, device: Hardware, ranks: int) -> dict[str, Any]:
    """Of each device, at the rows per pass that the run takes."""
    dtype = requested_dtype() or ("float32" if device.is_cpu else "bfloat16")
    if dtype not in ITEM_BYTES:
        raise UserError(f"NANOCHAT_DTYPE={dtype}: choose one of {', '.join(ITEM_BYTES)}")
    is_compiled = args.compile == "on" or (args.compile == "auto" and not device.is_cpu)
    setup = Setup(
        base.config,
        1,
        ranks=ranks,
        dtype=dtype,
        is_gpu=not device.is_cpu,
        is_compiled=is_compiled,
        has_fp8=args.fp8,
    )
    # A CPU's ranks share the machine's memory
    usable = USABLE * device.memory_bytes / (ranks if device.is_cpu else 1)
    most = largest_rows(setup, usable, base.rows_per_step)
    rows = args.device_batch_size or planning.derived_rows(setup, base.rows_per_step, usable)
    passes = base.rows_per_step // rows
    expected = forecast(replace(setup, rows=rows, passes=passes))
    return {
        "rows": rows,
        "passes": passes,
        "rows_per_step": base.rows_per_step,
        "largest_rows": most,
        "fits": rows <= most,
        "dtype": dtype,
        "compiled": is_compiled,
        "peak_at": expected.moment,
        "parts_bytes": expected.live | expected.overhead,
        "total_bytes": expected.total_bytes,
        "usable_bytes": int(usable),
    }


def text_of(tokens: int) -> dict[str, Any]:
    """Shards of the default data set, as `python -m nanochat.dataset --tokens` counts them."""
    from nanochat.download import CHARS_PER_BYTE, CHARS_PER_SHARD, CHARS_PER_TOKEN, shards_for

    train = shards_for(tokens * CHARS_PER_TOKEN, CHARS_PER_SHARD)
    return {"train_shards": train, "bytes": int((train + 1) * CHARS_PER_SHARD / CHARS_PER_BYTE)}


def time_of(args: Namespace, run: dict[str, Any], device: Hardware, ranks: int) -> dict[str, Any]:
    """Hours of steps and of evaluations, which compute a third of what a step does per token."""
    share = 1.0 if device.is_cpu else args.utilisation or EXPECTED_UTILISATION
    speed = ranks * share * device.flops
    steps, per_token = run["training"]["steps"], run["training"]["flops_per_token"]
    evaluations = 0 if args.eval_every < 1 else 1 + -(-steps // args.eval_every)
    train_s = args.time_budget or run["training"]["flops"] / speed
    eval_s = evaluations * args.eval_tokens * per_token / 3 / speed
    return {
        "flops_per_s": speed,
        "utilisation": None if device.is_cpu else share,
        "tokens_per_s": speed / per_token,
        "training_hours": train_s / 3600,
        "evaluations": evaluations,
        "evaluation_hours": eval_s / 3600,
        "hours": (train_s + eval_s) / 3600,
    }


def money_of(args: Namespace, device: Hardware, ranks: int, hours: float) -> dict[str, Any]:
    price = device.price if args.price is None else args.price
    return {
        "price_per_device_hour": price,
        "price_is": "given" if args.price is not None else None if price is None else f"listed, {PRICES_AS_OF}",
        "dollars": None if price is None else price * ranks * hours,
    }


def disk_of(args: Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints: weights and the whole optimizer state, as many as are kept, and one that is being written."""
    sizes, steps = exact_sizes(ModelConfig.from_dict(run["model"])), run["training"]["steps"]
    every = args.save_every
    saved = [*(range(every, steps, every) if every > 0 else ()), steps]
    kept = {*saved[-args.keep_last :], *(step for step in saved if args.keep_every > 0 and step % args.keep_every == 0)}
    best = 1 if args.eval_every > 0 and len(saved) > len(kept) else 0
    each, at_once = sizes.weights + sizes.state, min(len(kept) + best + 1, len(saved))
    return {
        "weights_bytes": sizes.weights,
        "optimizer_bytes": sizes.state,
        "checkpoint_bytes": each,
        "checkpoints_kept": len(kept) + best,
        "most_at_once": at_once,
        "bytes": at_once * each,
    }


def host_memory_of(run: dict[str, Any], device: Hardware, ranks: int) -> int:
    """Of the machine: on a CPU the training itself; beside GPUs a process each, and a checkpoint on its way to disk."""
    if device.is_cpu:
        return int(ranks * run["memory"]["total_bytes"])
    return int(ranks * GPU_HOST_BYTES + run["disk"]["checkpoint_bytes"])
