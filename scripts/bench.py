"""Measure one part of the project; the last line of the output is one JSON object.

    python -m scripts.bench --only=train --depth=4 --max-seq-len=512 --device-batch-size=8
    python -m scripts.bench --only=loader --data-dir=FOLDER
    python -m scripts.bench --only=tokenizer --data-dir=stdlib --vocab-size=4096
    python -m scripts.bench --only=decode --depth=6
    python -m scripts.bench --only=time-to-bpb --data-dir=FOLDER --budget=300 --json
    python -m scripts.bench --only=memory
    python -m scripts.bench --only=sandbox --repeats=50 --json
    python -m scripts.bench --only=serve --depth=4

train        optimizer steps on random tokens: tokens/s, FLOP/s, share of the machine's matmul peak
loader       packed batches from text, whole windows: tokens/s, share of places with real tokens, share of tokens kept,
             share of an optimizer step that waits for its batch, drawn by the step or prefetched
tokenizer    training and encoding in MB/s, decoding in tokens/s, bytes per token of the validation text
decode       different prompts side by side, random weights: tokens/s, time to the first token of a long prompt; in
             turns with int8 weights, and with transformers where it is installed (the extra `compare`): ratios
time-to-bpb  scripts.base_train for --budget seconds, start-up and compilation included, in a fresh base folder, once
             per seed: bits per byte over time, and of the end in three ways (nanochat/evals/time_to_bpb.py)
memory       one step on the CPU of several shapes, each in a process of its own: bytes of tensors and resident bytes,
             foretold (nanochat/forecast.py) and measured
sandbox      a small program as a plain process and in the sandbox, in turns: seconds of both, median of the differences
serve        a server with random weights: time to the first token, to a free row after a client has left, to a 429

core is not there yet. Rates are the median, the smallest and the largest of --repeats. The peak is measured before and
after, in float32 and in the dtype that training computes in: where before and after differ, other programs had the
processor too, and only ratios within one run compare.
"""

import shlex
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from nanochat import cli, scaling
from nanochat.common import UserError, prepare_process, print0, to_json
from nanochat.memory import peak_rss_bytes

if TYPE_CHECKING:
    from nanochat.config import ModelConfig
    from nanochat.parallel import Runtime

MODES = ("train", "loader", "tokenizer", "decode", "time-to-bpb", "memory", "sandbox", "serve")
DIALLED = MODES[:5]  # by --depth; memory has shapes of its own, sandbox none
DECODE_BATCHES = (1, 4, 16)
ENCODE_THREADS = (1, 2)


def mode(text: str) -> str:
    """A part that can be measured."""
    if text not in MODES:
        raise ValueError(f"choose one of {', '.join(MODES)}")
    return text


mode.__name__ = "|".join(MODES)


def words(text: str) -> list[str]:
    """A text as a shell splits it."""
    return shlex.split(text)


words.__name__ = "text"


@dataclass(frozen=True)
class Flag:
    """A flag that only some modes read; given to another, it is refused and not ignored."""

    kind: Callable[[str], Any]
    default: Any
    help: str
    modes: tuple[str, ...]


SIZED, TEXT = ("train", "loader", "decode", "time-to-bpb"), ("loader", "tokenizer", "time-to-bpb")
REPEATED = (*MODES[:4], "sandbox", "serve")
FLAGS = {
    "depth": Flag(cli.depth, None, "layers; else 4, for time-to-bpb 2", (*DIALLED, "serve")),
    "vocab_size": Flag(cli.vocabulary_size, None, "ids; else derived from --depth, for time-to-bpb 4096", DIALLED),
    "max_seq_len": Flag(cli.sequence_length, 512, "context in tokens", SIZED),
    "aspect_ratio": Flag(cli.positive_int, scaling.ASPECT_RATIO, "width per layer", SIZED),
    "head_dim": Flag(cli.head_dim, scaling.HEAD_DIM, "width per attention head", SIZED),
    "device_batch_size": Flag(cli.positive_int, 8, "rows of a batch", ("train", "loader")),
    "compile": Flag(cli.one_of("auto", "on", "off"), "auto", "torch.compile; auto: on GPUs", ("train", "loader")),
    "repeats": Flag(cli.positive_int, 5, "measurements, after one that does not count", REPEATED),
    "data_dir": Flag(str, "", "parquet, jsonl or txt file, folder of them, or stdlib", TEXT),
    "max_chars": Flag(cli.positive_int, 16_000_000, "characters of each side to work on", ("loader", "tokenizer")),
    "prompt_tokens": Flag(cli.positive_int, 32, "tokens of the prompts that are continued", ("decode",)),
    "new_tokens": Flag(cli.number_between(2, 10**6, whole=True), 64, "tokens to decode per prompt", ("decode",)),
    "long_prompt_tokens": Flag(cli.positive_int, 512, "tokens of the prompt whose first answer is timed", ("decode",)),
    "budget": Flag(cli.positive_float, 300.0, "seconds of start-up and training", ("time-to-bpb",)),
    "at_gflops": Flag(cli.positive_float, None, "float32 matmul peak at which --budget is meant", ("time-to-bpb",)),
    "seeds": Flag(cli.positive_int, 3, "runs, with the seeds --seed, --seed + 1, ...", ("time-to-bpb",)),
    "eval_every": Flag(cli.positive_int, 50, "steps between evaluations", ("time-to-bpb",)),
    "eval_tokens": Flag(cli.positive_int, 2**17, "validation tokens per evaluation", ("time-to-bpb",)),
    "train_flags": Flag(words, [], "more flags of scripts.base_train, as one text", ("time-to-bpb",)),
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The flags that the chosen mode reads, with their defaults."""
    parser = cli.Parser(__doc__)
    parser.flag("--only", mode, None, "what to measure")
    for name, flag in FLAGS.items():
        default = "" if flag.default in (None, "", []) else f"; default {flag.default}"
        readers = "" if flag.modes == DIALLED else f" ({', '.join(flag.modes)}{default})"
        parser.flag(_spelled(name), flag.kind, None, flag.help + (readers or f" ({default[2:]})" * bool(default)))
    parser.flag("--peak-seconds", cli.non_negative_float, 0.3, "time for each shape of the matmul peak")
    cli.add_device_flags(parser)
    cli.add_precision_flags(parser)
    parser.switch("--json", "the last line is one JSON object, as it is without this")
    parser.check(lambda args: "--fp8: only with --only=train" if args.fp8 and args.only != "train" else None)
    parser.check(lambda args: None if args.only else f"--only: needed; choose one of {', '.join(MODES)}")
    for name, flag in FLAGS.items():
        parser.check(lambda args, name=name, flag=flag: _unread(args, name, flag))
    args = parser.parse(argv)
    for name, flag in FLAGS.items():
        if args.only not in flag.modes:
            delattr(args, name)
        elif getattr(args, name) is None:
            setattr(args, name, flag.default)
    if args.only in DIALLED:
        is_timed = args.only == "time-to-bpb"
        args.depth = args.depth or (2 if is_timed else 4)
        args.vocab_size = args.vocab_size or (4096 if is_timed else scaling.vocab_size_for(args.depth))
    return args


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _unread(args: Namespace, name: str, flag: Flag) -> str | None:
    given = getattr(args, name) is not None
    wrong = given and args.only is not None and args.only not in flag.modes
    return f"{_spelled(name)}: --only={args.only} does not use it; leave it out" if wrong else None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    import torch

    from nanochat.machine import cpu_seconds, describe_machine, git_commit, matmul_peak_flops
    from nanochat.parallel import runtime
    from nanochat.precision import dtype_name

    measure = {
        "train": bench_train,
        "loader": bench_loader,
        "tokenizer": bench_tokenizer,
        "decode": bench_decode,
        "time-to-bpb": bench_time_to_bpb,
        "memory": bench_memory,
        "sandbox": bench_sandbox,
        "serve": bench_serve,
    }[args.only]
    with runtime(args.device_type, in_batches=args.only not in ("decode", "serve")) as rt:
        if rt.world_size > 1:
            raise UserError(f"{rt.world_size} ranks: scripts.bench measures one process; start it without torchrun")

        dtype = dtype_name(rt.dtype)

        def peak_gflops(when: str) -> dict[str, float]:
            dtypes = {"float32": torch.float32, dtype: rt.dtype}
            peaks = {name: matmul_peak_flops(rt, kind, args.peak_seconds) / 1e9 for name, kind in dtypes.items()}
            told = ", ".join(f"{peak:,.1f} GFLOP/s in {name}" for name, peak in peaks.items())
            print0(f"matmul peak {when}: {told}, {torch.get_num_threads()} threads")
            return peaks

        peak = {"before": peak_gflops("before")}
        if args.only == "time-to-bpb" and args.at_gflops:
            args.budget *= args.at_gflops / peak["before"]["float32"]
        began, cpu_began = time.perf_counter(), cpu_seconds()
        figures = measure(args, rt)
        clocks = {"wall_s": time.perf_counter() - began, "cpu_s": cpu_seconds() - cpu_began}
        peak["after"] = peak_gflops("after")
        if "flops_per_s" in figures:
            best = 1e9 * max(peaks[dtype] for peaks in peak.values())
            figures["matmul_peak_share"] = {name: rate / best for name, rate in figures["flops_per_s"].items()}
            if rt.peak_flops:  # the data sheet's
                figures["mfu"] = {name: rate / rt.peak_flops for name, rate in figures["flops_per_s"].items()}
        result = {
            "bench": args.only,
            "figures": figures,
            "matmul_peak_gflops": peak,
            "matmul_peak_dtype": dtype,
            "flags": vars(args),
            "threads": torch.get_num_threads(),
            "device": rt.describe(),
            "machine": describe_machine(),
            "commit": git_commit(),
            **clocks,
            # time-to-bpb's runs are processes of their own; everything else happens in this one
            "peak_rss_bytes": max((run["peak_rss_bytes"] for run in figures.get("runs", [])), default=peak_rss_bytes()),
        }
    print0(to_json(result))


# Training ------------------------------------------------------------------------------------------------------


def model_config(args: Namespace, at_least_tokens: int = 0) -> "ModelConfig":
    """The model that the flags ask for, with a context of at least so many tokens."""
    length = max(args.max_seq_len, at_least_tokens)
    return scaling.model_config(args.depth, args.vocab_size, length, args.aspect_ratio, args.head_dim)


def bench_train(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """Whole optimizer steps of one batch."""
    import torch

    from nanochat.evals.speed import optimizer_step
    from nanochat.kernels.fp8 import find_recipe
    from nanochat.loader import Batch
    from nanochat.machine import spread, timed

    model, step = optimizer_step(model_config(args), rt, args.seed, args.compile)
    if args.fp8:
        model.use_fp8(find_recipe(args.fp8_recipe, rt.device, args.fp8_emulate))
    rng = torch.Generator().manual_seed(args.seed)
    shape = (args.device_batch_size, model.config.sequence_len + 1)
    ids = torch.randint(model.config.vocab_size, shape, generator=rng)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, :-1], dtype=torch.int32))
    tokens = batch.num_targets()
    first_s, *seconds = timed("step", lambda: step(repeat(batch)), args.repeats)
    return {
        "tokens_per_s": spread([tokens / s for s in seconds]),
        "flops_per_s": spread([tokens * model.flops_per_token() / s for s in seconds]),
        "flops_per_token": model.flops_per_token(),
        "parameters": sum(model.parameter_counts().values()),
        "tokens_per_step": tokens,
        "step_s": spread(seconds),
        "first_step_s": first_s,
        "peak_device_bytes": torch.cuda.max_memory_allocated(rt.device) if rt.device.type == "cuda" else None,
    }


# Text ----------------------------------------------------------------------------------------------------------


def beginning(documents: Iterable[str], max_chars: int) -> Iterator[str]:
    """Documents until there are `max_chars` characters; the last is shortened."""
    left = max_chars
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return


def bench_loader(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """Batches as training gets them: reading, tokenising on two threads, packing.

    A loader packs a whole window of rows when its first batch is asked for, and the next one while it hands them out.
    So every measurement takes a fresh loader, and its clock starts behind the first batch: from there on as many
    batches as a window has cost what packing a window costs.
    """
    from nanochat.dataset import open_corpus
    from nanochat.evals.speed import first_window, kept_frac, optimizer_step, step_waits
    from nanochat.forecast import AHEAD
    from nanochat.loader import PretrainLoader
    from nanochat.machine import repeated, spread
    from nanochat.prefetch import Prefetcher
    from nanochat.tokenizer import Tokenizer

    corpus = open_corpus(cli.data_folder(args))
    print0(f"data: {corpus.describe()}")
    tokenizer = Tokenizer.train(beginning(corpus.train.documents(), args.max_chars), args.vocab_size)
    rows, length = args.device_batch_size, args.max_seq_len

    def fresh() -> PretrainLoader:
        return PretrainLoader(corpus.train, tokenizer, rows, length, seed=args.seed)

    num_batches, targets, state = first_window(fresh())
    first_s = []

    def draw() -> float:
        began = time.perf_counter()
        loader = fresh()
        next(loader)
        first_s.append(time.perf_counter() - began)
        for _ in range(num_batches):
            next(loader)
        return time.perf_counter() - began - first_s[-1]

    seconds = repeated(f"{num_batches} batches", draw, args.repeats)[1:]
    _, step = optimizer_step(model_config(args), rt, args.seed, args.compile)
    drawn_by_step = step_waits(step, fresh(), args.repeats)
    with Prefetcher(fresh(), rt.device, ahead=AHEAD + 1) as batches:
        prefetched = step_waits(step, batches, args.repeats)
    num_rows = num_batches * rows
    return {
        "tokens_per_s": spread([targets / s for s in seconds]),
        "first_batch_s": spread(first_s[1:]),
        "real_places_frac": (targets + num_rows) / (num_rows * (length + 1)),  # a row's first token is no target
        "tokens_kept_frac": kept_frac(state),
        "step_wait_frac": {"drawn_by_step": spread(drawn_by_step), "prefetched": spread(prefetched)},
        "tokens": targets,
        "batches": num_batches,
    }


def bench_tokenizer(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """Learning the vocabulary from the train side; encoding and decoding the validation side."""
    from nanochat.dataset import open_corpus
    from nanochat.evals.speed import tokenizer_speed
    from nanochat.tokenizer import replace_surrogates

    corpus = open_corpus(cli.data_folder(args))
    print0(f"data: {corpus.describe()}")
    train, val = (
        [replace_surrogates(text) for text in beginning(split.documents(), args.max_chars)]
        for split in (corpus.train, corpus.val)
    )
    return tokenizer_speed(train, val, args.vocab_size, args.repeats, ENCODE_THREADS)


# Decoding ------------------------------------------------------------------------------------------------------


def bench_decode(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """Random weights and no stop token, so that every row has its full length; beside a peer, if it is installed."""
    from nanochat.evals.decode import DecodeShape, decode_speed

    longest = max(args.prompt_tokens + args.new_tokens + max(DECODE_BATCHES), args.long_prompt_tokens + 1)
    shape = DecodeShape(args.prompt_tokens, args.new_tokens, args.long_prompt_tokens, DECODE_BATCHES)
    return decode_speed(model_config(args, at_least_tokens=longest), rt, shape, args.repeats, args.seed)


# Memory ----------------------------------------------------------------------------------------------------------


def bench_memory(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """What a step holds on the CPU, and what the forecast says of it."""
    from nanochat.evals.memory import compare

    return {"shapes": compare()}


# The sandbox -----------------------------------------------------------------------------------------------------


def bench_sandbox(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """In turns, so that what else the machine does falls on both."""
    from nanochat.machine import spread
    from nanochat.sandbox.overhead import overhead

    figures = {}
    for language, seconds in overhead(args.repeats).items():
        added = [sandbox - bare for bare, sandbox in zip(*seconds.values())]
        figures[language] = {kind: spread(each) for kind, each in seconds.items()} | {"added_s": median(added)}
    return figures


# Serving ---------------------------------------------------------------------------------------------------------


def bench_serve(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """The server's own times, in front of a model that never stops by itself."""
    from nanochat.serve.timing import figures

    args.depth = args.depth or 4
    return figures(args.depth, rt, args.seed, args.repeats)


# Time to bits per byte -----------------------------------------------------------------------------------------


def bench_time_to_bpb(args: Namespace, rt: "Runtime") -> dict[str, Any]:
    """In a base folder that is removed again."""
    from nanochat.evals.time_to_bpb import Recipes, time_to_bpb

    data = (f"--data-dir={cli.data_folder(args)}", *(["--offline"] if args.offline else []))
    same = ("depth", "max_seq_len", "aspect_ratio", "head_dim", "eval_every")
    flags = [f"--time-budget={args.budget}", *(f"{_spelled(name)}={getattr(args, name)}" for name in same)]
    seeds = range(args.seed, args.seed + args.seeds)
    with tempfile.TemporaryDirectory(prefix="nanochat_bench_") as base:
        recipes = Recipes(Path(base), data)
        all_flags = [*flags, *args.train_flags]
        return time_to_bpb(recipes, seeds, args.vocab_size, all_flags, args.eval_tokens, args.device_type)


if __name__ == "__main__":
    cli.run(main)
