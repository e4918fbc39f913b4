"""What writing costs: the bounds of a model on this machine, its prefill, and a sweep of batch sizes.

    python -m scripts.infer_bench                        # the newest fine-tuned model here
    python -m scripts.infer_bench --source=base --batch-sizes=1,8,32,128
    python -m scripts.infer_bench --depth=12             # random weights of that depth

The last line of the output is one JSON object. The prompt is random ids. Bandwidth is measured by reading one large
tensor, so shares of the memory bound are shares of what this machine can do now. `scripts.bench --only=decode` compares
with transformers by the same clocks.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanochat import cli, scaling
from nanochat.common import UserError, prepare_process, print0, to_json
from nanochat.memory import machine_memory_bytes

if TYPE_CHECKING:
    from nanochat.model.gpt import GPT
    from nanochat.parallel import Runtime


def batch_sizes(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 to 4096, separated by commas."""
    sizes = tuple(int(part) for part in text.split(","))
    if not all(1 <= size <= 4096 for size in sizes):
        raise ValueError("must be whole numbers from 1 to 4096, separated by commas")
    return sizes


batch_sizes.__name__ = "N,N,..."


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_choice_flags(parser, default="sft")
    parser.flag("--depth", cli.depth, None, "measure random weights of this depth instead of a trained model")
    parser.flag("--max-seq-len", cli.sequence_length, 2048, "context of random weights")
    parser.flag("--prompt-tokens", cli.positive_int, 2048, "tokens of the prompt, at most what the context leaves")
    parser.flag("--decode-tokens", cli.number_between(2, 10**6, whole=True), 256, "tokens of each answer")
    parser.flag("--batch-sizes", batch_sizes, (1, 8, 32, 128), "rows side by side, one measurement each")
    parser.switch("--int8", "write with weights of one byte: faster on a CPU, and slightly off")
    cli.add_device_flags(parser)
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    import torch

    from nanochat.evals.decode import DecodeShape, static_card, sweep
    from nanochat.machine import describe_machine, git_commit
    from nanochat.parallel import runtime

    with runtime(args.device_type) as rt:
        model, origin = load(args, rt)
        context, most = model.config.sequence_len, max(args.batch_sizes)
        if args.decode_tokens + most >= context:
            raise UserError(
                f"--decode-tokens={args.decode_tokens}: with {most} rows needs a context above "
                f"{args.decode_tokens + most}, and the model's is {context}; give fewer tokens or smaller --batch-sizes"
            )
        prompt_tokens = min(args.prompt_tokens, context - args.decode_tokens - most)
        on_gpu = rt.device.type == "cuda"
        memory = torch.cuda.get_device_properties(rt.device).total_memory if on_gpu else machine_memory_bytes()
        card = static_card(model, rt, memory)
        print0(f"at most {card['ceiling_tokens_per_s']:,.1f} tokens/s at batch 1, by the memory")
        shape = DecodeShape(prompt_tokens, args.decode_tokens, prompt_tokens, args.batch_sizes)
        rows = sweep(model, rt, card, args.batch_sizes, shape, args.seed)
        result = {
            **origin,
            "model_config": model.config.to_dict(),
            "bytes": card,
            "prefill": {"prompt_tokens": prompt_tokens, "first_token_s": min(row["first_token_s"] for row in rows)},
            "sweep": rows,
            "flags": vars(args),
            "device": rt.describe(),
            "machine": describe_machine(),
            "commit": git_commit(),
        }
    print0(to_json(result))


def load(args: Namespace, rt: "Runtime") -> "tuple[GPT, dict[str, Any]]":
    """The model, and where it is from."""
    from nanochat.checkpoint import find_checkpoint
    from nanochat.model.gpt import build_model

    if args.depth:
        config = scaling.model_config(args.depth, sequence_len=args.max_seq_len)
        model, origin = build_model(config, rt.device, rt.dtype, args.seed), {"source": "random weights", "step": None}
    else:
        checkpoint = find_checkpoint(args.source, args.model_tag, args.step)
        model = checkpoint.build_model(rt.device, rt.dtype)
        origin = {"source": str(checkpoint.folder), "step": checkpoint.step}
    return model.for_decoding(args.int8), origin


if __name__ == "__main__":
    cli.run(main)
