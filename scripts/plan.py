"""What a base run will be and cost, before it is begun: model, steps, text, memory, hours, money, disk.

    python -m scripts.plan                                       # of depth 20 on 8xH100
    python -m scripts.plan --depth=12 --gpus=RTX4090 --json      # one JSON object as the last line
    python -m scripts.plan --depth=4 --gpus=cpu --max-seq-len=512 --time-budget=600 --eval-tokens=65536
    python -m scripts.plan --table                               # the tables of docs/plan.md

Takes every flag of scripts.base_train, so that one command line serves both; those that change nothing here are read
all the same. Of --gpus, `cpu` is this machine: the cores, the memory and the dtype that a run would find on it now.
docs/plan.md says how to read it, and how far to trust it.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from nanochat import cli, planning
from nanochat.common import plural, prepare_process, print0, to_json
from nanochat.costs import Machine, Settings, cpu_machine, find_machine, gpu_machine, plan_run
from nanochat.hardware import EXPECTED_UTILISATION, Devices, devices

MIB, GIB = 2**20, 2**30
TABLE_DEPTHS = (4, 6, 8, 12, 16, 20, 24, 28, 32)
# (flags, title). `cpu` is then not this machine but a certain one, so that the tables are the same everywhere.
TABLE_MACHINES = (
    (("--gpus=cpu", "--max-seq-len=512", "--eval-tokens=65536"), "Two CPU cores, float32, 16 GiB, context 512"),
    (("--gpus=RTX4090",), "One card of 24 GB, an RTX 4090, context 2,048"),
    (("--gpus=H200",), "One H200, context 2,048"),
    (("--gpus=8xH100",), "8 x H100, context 2,048"),
)
TABLE_CORES, TABLE_MEMORY_BYTES, TABLE_DTYPE = 2, 16 * GIB, "float32"
SMALL_WIDTH = 768  # of depth 12; narrower models do not fill a GPU


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    named = "devices: cpu (this machine), NAME, or 8xNAME; an unknown name lists the known ones"
    parser.flag("--gpus", devices, devices("8xH100"), named)
    parser.flag("--price", cli.non_negative_float, None, "US dollars per device and hour; else a list price")
    share = f"share of the GPUs' bf16 peak that training gets; else {EXPECTED_UTILISATION:g}"
    parser.flag("--utilisation", cli.number_between(0.001, 1), None, share)
    parser.flag("--vocab-size", cli.vocabulary_size, None, "of the tokenizer; else what scripts.tok_train derives")
    parser.switch("--json", "one JSON object as the last line")
    parser.switch("--table", "Markdown tables over depths and machines, instead of one plan")
    planning.add_base_flags(parser)
    parser.check(lambda args: "--table, --json: give one of them" if args.table and args.json else None)
    parser.check(lambda args: planning.batch_problem(args, args.gpus.count))
    parser.check(unfit)
    return parser.parse(argv)


def unfit(args: Namespace) -> str | None:
    """The rule that a machine is asked only for what it has."""
    gpu = args.gpus.gpu
    if gpu is None and args.utilisation:
        return "--utilisation: of a GPU's peak; leave it out with --gpus=cpu"
    if args.fp8 and not args.fp8_emulate and not (gpu is not None and gpu.has_fp8):
        name = "a CPU" if gpu is None else f"{gpu.name}"
        return f"--fp8: {name} has no FP8 products; leave it out, or add --fp8-emulate"
    return None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    if args.table:
        print0("\n".join(tables()))
        return
    plan = plan_run(planning.request_of(args), find_machine(args.gpus), settings_of(args), args.vocab_size)
    print0("\n".join(told(plan)))
    if args.json:
        print0(to_json(plan))


def settings_of(args: Namespace) -> Settings:
    return Settings(
        compile=args.compile,
        fp8_recipe=args.fp8_recipe if args.fp8 else None,
        eval_every=args.eval_every,
        eval_tokens=args.eval_tokens,
        save_every=args.save_every,
        keep_last=args.keep_last,
        keep_every=args.keep_every,
        data_dir=args.data_dir,
        utilisation=args.utilisation,
        price=args.price,
    )


# What is told --------------------------------------------------------------------------------------------------


def told(run: dict[str, Any]) -> list[str]:
    """Lines for people."""
    is_cpu, devices = run["machine"]["cores"] is not None, run["machine"]["devices"]
    sections = {
        "model": model_rows(run),
        "training": training_rows(run),
        f"memory of {'each device' if devices > 1 else 'this machine' if is_cpu else 'the device'}": memory_rows(run),
        "time and money": money_rows(run),
        "disk" if is_cpu else "disk and host": disk_rows(run),
    }
    where = (
        f"{plural(run['machine']['cores'], 'core')} of this machine"
        if is_cpu
        else f"{devices} x {run['machine']['device']}"
    )
    lines = [f"depth {run['depth']} on {where}"]
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:<24} {value}" for name, value in rows)]
    return lines + (["", does_not_fit(run["memory"])] if not run["memory"]["fits"] else [])


def model_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    model = run["model"]
    return [
        ("width", f"{model['n_embd']:,}, {plural(model['n_head'], 'head')} of {model['n_embd'] // model['n_head']}"),
        ("vocabulary", f"{model['vocab_size']:,}"),
        ("context", f"{model['sequence_len']:,} tokens"),
        *parameter_rows(run["parameters"]),
    ]


def parameter_rows(parameters: dict[str, int]) -> list[tuple[str, str]]:
    names = {"matrix": "in blocks", "lm_head": "head", "wte": "embedding", "value_embedding": "value embeddings"}
    shown = {name: parameters.get(role, 0) for role, name in names.items()}
    shown["scalars"] = parameters["total"] - sum(shown.values())
    width = len(f"{parameters['total']:,}")
    rows = [(f"  {name}", f"{count:>{width},}") for name, count in shown.items() if count]
    return [("parameters", f"{parameters['total']:,}"), *rows]


def training_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    training, memory, devices = run["training"], run["memory"], run["machine"]["devices"]
    ratio = training["tokens"] / run["parameters"]["scaling"]
    rows = f"{plural(memory['rows'], 'row')} x {run['model']['sequence_len']:,}"
    split = f"{rows} x {plural(devices, 'device')} x {plural(memory['passes'], 'pass')}"
    return [
        ("tokens", f"{training['tokens']:,}, {ratio:.3g} per parameter of blocks and head"),
        ("steps", f"{training['steps']:,}"),
        ("batch", f"{training['batch_tokens']:,} tokens = {split}"),
        ("FLOPs per token", f"{training['flops_per_token']:.4g}"),
        ("FLOPs", f"{training['flops']:.4g}"),
    ]


def memory_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    memory = run["memory"]
    unit = GIB if memory["total_bytes"] >= GIB else MIB
    parts = [(f"  {part}", binary(size, unit)) for part, size in memory["parts_bytes"].items() if size >= unit / 200]
    fp8 = f", fp8 {memory['fp8']}" if memory["fp8"] else ""
    how = f"{memory['dtype']}{fp8}{', compiled' if memory['compiled'] else ''}, {plural(memory['rows'], 'row')} a pass"
    usable = binary(memory["usable_bytes"], GIB).strip()
    largest = plural(memory["largest_rows"], "row") if memory["largest_rows"] else "none"
    return [
        ("at its peak", f"{binary(memory['total_bytes'], unit)} of {usable} usable  ({how})"),
        *parts,
        ("largest device batch", f"{largest}, of {memory['rows_per_step']:,} a step"),
    ]


def money_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    time, money = run["time"], run["money"]
    price = "not known; give --price" if run["machine"]["cores"] is None else "your own machine, or give --price"
    if money["dollars"] is not None:
        per_hour = f"${money['price_per_device_hour']:,.2f} per device and hour, {money['price_is']}"
        price = f"${money['dollars']:,.2f}  ({per_hour})"
    evaluations = f"{plural(time['evaluations'], 'time')} {time['evaluation_tokens']:,} tokens"
    return [
        ("speed", f"{time['tokens_per_s']:,.0f} tokens/s  ({speed_source(run)})"),
        ("training", hours(time["training_hours"])),
        ("evaluation", f"{hours(time['evaluation_hours'])}  ({evaluations})"),
        ("together", hours(time["hours"])),
        ("price", price),
    ]


def speed_source(run: dict[str, Any]) -> str:
    time, cores = run["time"], run["machine"]["cores"]
    if cores is not None:
        return f"{time['flops_per_s'] / cores / 1e9:.0f} GFLOP/s a core, as measured on one kind of processor"
    bound = "; a small model gets less" if run["model"]["n_embd"] < SMALL_WIDTH else ""
    return f"{time['utilisation']:.0%} of the bf16 peak, assumed{bound}"


def disk_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    text, disk = run["text"], run["disk"]
    host = [("host memory", binary(run["host_memory_bytes"], GIB).strip())] if run["machine"]["cores"] is None else []
    own = f"{decimal(text['characters'], 'characters')} of your own hold each token once"
    fetched = f"{decimal(text['bytes'])}: {plural(text['train_shards'], 'shard')} of ClimbMix and one to validate on"
    return [
        ("text", own if text["data_dir"] else fetched),
        ("a checkpoint", f"{decimal(disk['checkpoint_bytes'])}, {decimal(disk['weights_bytes'])} of them weights"),
        ("checkpoints", f"{decimal(disk['bytes'])}: {disk['most_at_once']:,} at a time at most"),
        *host,
    ]


def does_not_fit(memory: dict[str, Any]) -> str:
    if memory["largest_rows"]:
        return f"does not fit: give --device-batch-size={memory['largest_rows']}"
    return "does not fit: not even one row a pass; fewer layers, a shorter --max-seq-len, or more memory"


def decimal(size: float, unit: str = "B") -> str:
    """
    >>> decimal(1_236_000), decimal(27.38e9), decimal(2.4e8, "characters")
    ('1.2 MB', '27.38 GB', '240.0 million characters')
    """
    words = {"B": ("MB", "GB")}.get(unit, (f"million {unit}", f"billion {unit}"))
    return f"{size / 1e6:,.1f} {words[0]}" if size < 1e9 else f"{size / 1e9:,.2f} {words[1]}"


def binary(size: float, unit: int) -> str:
    """In MiB or GiB, for columns.

    >>> binary(2**29, GIB), binary(2**29, MIB)
    ('   0.50 GiB', ' 512.0 MiB')
    """
    return f"{size / GIB:>7,.2f} GiB" if unit == GIB else f"{size / MIB:>6,.1f} MiB"


def amount(number: float) -> str:
    """
    >>> amount(50_300_000), amount(8.758e9)
    ('50.3 M', '8.76 G')
    """
    return f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:,.2f} G"


def hours(number: float) -> str:
    """
    >>> hours(0.004), hours(0.5), hours(30.25), hours(1000), hours(100_000)
    ('14 s', '30 min', '30.2 h', '41.7 days', '11.4 years')
    """
    if number < 1 / 60:
        return f"{3600 * number:.0f} s"
    if number < 1:
        return f"{60 * number:.0f} min"
    if number < 72:
        return f"{number:,.1f} h"
    return f"{number / 24:,.1f} days" if number < 365 * 24 else f"{number / 24 / 365.25:,.1f} years"


# Tables --------------------------------------------------------------------------------------------------------


def tables() -> list[str]:
    """The tables of docs/plan.md: what follows from the depth, and what it means on each machine."""
    lines: list[str] = []
    for flags, title in TABLE_MACHINES:
        asked = [parse_args([*flags, f"--depth={depth}"]) for depth in TABLE_DEPTHS]
        machine = table_machine(asked[0].gpus)
        runs = [plan_run(planning.request_of(args), machine, settings_of(args)) for args in asked]
        if not lines:
            lines += model_table(runs)
        lines += ["", f"### {title}", "", f"`python -m scripts.plan --depth=N {' '.join(flags)}`", *machine_table(runs)]
    return lines


def table_machine(asked: Devices) -> Machine:
    """What --gpus names, whatever the machine and the environment here."""
    if asked.gpu is None:
        return cpu_machine(TABLE_CORES, TABLE_MEMORY_BYTES, TABLE_DTYPE)
    return gpu_machine(asked.gpu, asked.count)


def model_table(runs: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{run['depth']}",
            f"{run['model']['n_embd']:,}",
            f"{run['model']['vocab_size']:,}",
            amount(run["parameters"]["total"]),
            amount(run["training"]["tokens"]),
            f"{run['text']['train_shards']:,}",
            decimal(run["disk"]["checkpoint_bytes"]),
        ]
        for run in runs
    ]
    header = ["depth", "width", "vocabulary", "parameters", "tokens", "shards", "checkpoint"]
    return ["### By depth", *markdown(header, rows)]


def machine_table(runs: list[dict[str, Any]]) -> list[str]:
    rows = []
    for run in runs:
        memory, dollars = run["memory"], run["money"]["dollars"]
        rows.append(
            [
                f"{run['depth']}",
                f"{run['training']['steps']:,} x {run['training']['batch_tokens']:,}",
                f"{memory['rows']:,} x {memory['passes']:,}" if memory["fits"] else "does not fit",
                f"{memory['total_bytes'] / GIB:.1f}",
                f"{run['time']['tokens_per_s']:,.0f}",
                hours(run["time"]["hours"]),
                "-" if not dollars else f"{dollars:,.2f}",
            ]
        )
    return markdown(["depth", "steps x tokens", "rows x passes", "GiB a device", "tokens/s", "time", "US$"], rows)


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table whose columns are aligned in the text as well, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda cells: f"| {' | '.join(cell.rjust(width) for cell, width in zip(cells, widths))} |"  # noqa: E731
    return ["", line(header), f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|", *map(line, rows)]


if __name__ == "__main__":
    cli.run(main)
