"""Bits per byte of a base model on the train and validation text.

    python -m scripts.base_loss --data-dir=FOLDER
    python -m scripts.base_loss --model-tag=d12 --step=2520 --split-tokens=1000000

    python -m scripts.base_loss --compare-compressors        # the validation text alone, beside xz -9 and zstd -19
    python -m scripts.base_loss --reference-rows             # the validation text in the ancestor's rows

The tokens are the first of each split, every one scored once; beside compressors, documents stay whole; rows as the
ancestor makes them are for comparison with its figures. The last line of the output is JSON, and every way leaves a
record for the report: base_loss, compression or reference_rows.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from nanochat import cli
from nanochat.common import launch_ranks, prepare_process, print0, record_stage, show_progress, to_json


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_choice_flags(parser, default="base")
    cli.add_data_flags(parser)
    parser.flag("--device-batch-size", cli.positive_int, cli.DEVICE_BATCH_SIZE, "rows per forward pass")
    parser.flag("--split-tokens", cli.positive_int, 40 * 2**19, "tokens of each split")
    parser.switch(
        "--compare-compressors", "score whole validation documents, with overlapping windows, beside xz and zstd"
    )
    parser.flag("--num-documents", cli.positive_int, None, "documents to compare, instead of --split-tokens")
    parser.switch("--reference-rows", "score the validation text in rows made by the ancestor's rule")
    cli.add_device_flags(parser)
    parser.check(_conflict)
    return parser.parse(argv)


def _conflict(args: Namespace) -> str | None:
    """The rule that a way of scoring has its own flags, and one process where the ranks cannot share the work."""
    ways = {"--compare-compressors": args.compare_compressors, "--reference-rows": args.reference_rows}
    chosen = [name for name, is_chosen in ways.items() if is_chosen]
    if len(chosen) > 1:
        return f"{', '.join(chosen)}: give one of them"
    if args.num_documents and not args.compare_compressors:
        return "--num-documents: only --compare-compressors keeps documents whole; leave it out"
    if chosen and launch_ranks()[1] > 1:
        return f"{chosen[0]}: the work of one process; start it without torchrun"
    return None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    from nanochat.checkpoint import find_checkpoint
    from nanochat.dataset import open_corpus
    from nanochat.evals.bpb import evaluate_bpb
    from nanochat.evals.compression import compare_compressors
    from nanochat.evals.reference_rows import reference_batches
    from nanochat.loader import validation_batches
    from nanochat.parallel import runtime

    corpus = open_corpus(cli.data_folder(args))
    checkpoint = find_checkpoint(args.source, args.model_tag, args.step)
    tokenizer = checkpoint.tokenizer()
    stage = "compression" if args.compare_compressors else "reference_rows" if args.reference_rows else "base_loss"
    with runtime(args.device_type, in_batches=True) as rt, record_stage(stage) as record:
        model = checkpoint.build_model(rt.device, rt.dtype)
        result: dict[str, Any] = {"model": str(checkpoint.folder), "step": checkpoint.step}
        if args.compare_compressors:
            documents, limit = corpus.val.documents(), args.split_tokens
            if args.num_documents:
                documents, limit = islice(documents, args.num_documents), math.inf
            on_progress = partial(show_progress, "windows scored")
            result |= compare_compressors(model, tokenizer, documents, limit, args.device_batch_size, on_progress)
            print0(f"val bpb {result['val_bpb']:.4f} on {result['bytes']:,} bytes; {result['compressors']}")
        elif args.reference_rows:
            rows = reference_batches(corpus.val, tokenizer, checkpoint.config.sequence_len, args.split_tokens)
            result["val_bpb"] = evaluate_bpb(model, rows, tokenizer.token_bytes, rt)
            print0(f"val bpb {result['val_bpb']:.4f} on {args.split_tokens:,} tokens in the ancestor's rows")
        else:
            for name, split in (("train", corpus.train), ("val", corpus.val)):
                batches = validation_batches(
                    split,
                    tokenizer,
                    args.device_batch_size,
                    checkpoint.config.sequence_len,
                    args.split_tokens,
                    rt.rank,
                    rt.world_size,
                )
                result[f"{name}_bpb"] = bpb = evaluate_bpb(model, batches, tokenizer.token_bytes, rt)
                print0(f"{name} bpb {bpb:.4f}")
        record.update(result, flags=vars(args))
        print0(to_json(result))


if __name__ == "__main__":
    cli.run(main)
