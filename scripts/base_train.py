"""Pretrain a base model on text. `--depth` is the dial; everything not given is derived from it.

    python -m scripts.base_train --depth=12 --data-dir=FOLDER
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=24 --run=d24
    python -m scripts.base_train --depth=4 --max-seq-len=512 --time-budget=300

Needs a tokenizer (scripts.tok_train). Writes checkpoints and metrics.jsonl to <base>/checkpoints/base/<model tag>/.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from nanochat import cli, scaling
from nanochat.common import base_dir, launch_ranks, prepare_process, print0, record_stage


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    schedule = scaling.Schedule()
    parser.flag("--depth", cli.depth, 20, "layers: the dial")
    parser.flag("--max-seq-len", cli.sequence_length, 2048, "context in tokens")
    horizons = ("num_iterations", "target_flops", "target_param_data_ratio", "time_budget")
    ratio = f"tokens per scaling parameter; {scaling.DEFAULT_RATIO:g} unless another horizon is given"
    parser.flag("--target-param-data-ratio", cli.unless_minus_one(cli.number_between(1e-3, 1e6)), None, ratio)
    parser.flag("--target-flops", cli.unless_minus_one(cli.flops), None, "training FLOPs")
    parser.flag("--time-budget", cli.positive_float, None, "seconds of training time, evaluations not counted")
    cli.add_plan_flags(parser, eval_every=250, save_every=250)
    parser.flag("--weight-decay", cli.non_negative_float, scaling.BASE_WEIGHT_DECAY, "Muon's, before scaling")
    parser.flag("--warmup-steps", cli.non_negative_int, schedule.warmup_steps, "learning-rate warm-up")
    parser.flag("--warmdown-ratio", cli.fraction, schedule.warmdown_frac, "share of the run in which the rate falls")
    parser.flag("--final-lr-frac", cli.fraction, schedule.final_lr_frac, "learning rate at the end")
    parser.flag("--laws", cli.one_of(*scaling.LAWS), "nanochat", "scaling laws; reference: the ancestor's")
    parser.flag("--aspect-ratio", cli.positive_int, scaling.ASPECT_RATIO, "width per layer")
    parser.flag("--head-dim", cli.head_dim, scaling.HEAD_DIM, "width per attention head")
    cli.add_data_flags(parser)
    cli.add_architecture_flags(parser)
    cli.add_run_flags(parser)
    parser.check(lambda args: cli.at_most_one(args, horizons))
    parser.check(lambda args: cli.problem_of(scaling.model_config, args.depth, **model_shape(args)))
    parser.check(check_batch)
    return parser.parse(argv)


def check_batch(args: Namespace) -> str | None:
    """The rule that a given batch is whole passes over the ranks that the launcher has started."""
    micro_batch = scaling.MicroBatch(args.max_seq_len, launch_ranks()[1], args.device_batch_size or 1)
    return cli.problem_of(micro_batch.check, args.total_batch_size) if args.total_batch_size else None


def model_shape(args: Namespace) -> dict[str, Any]:
    """What `scaling.model_config` takes besides depth and vocabulary."""
    given = {"sequence_len": args.max_seq_len, "aspect_ratio": args.aspect_ratio, "head_dim": args.head_dim}
    return given | {"laws": args.laws} | cli.architecture_switches(args)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prepare_process(args.offline)
    from nanochat.dataset import open_corpus
    from nanochat.evals.bpb import evaluate_bpb
    from nanochat.loader import PretrainLoader, validation_batches
    from nanochat.model.gpt import build_model, flops_per_token, scaling_parameters
    from nanochat.optim import MuonAdamW
    from nanochat.parallel import reduce_dtype, runtime
    from nanochat.prefetch import Prefetcher
    from nanochat.tokenizer import Tokenizer
    from nanochat.train.loop import Loop, Progress
    from nanochat.train.metrics import open_loggers
    from nanochat.train.run import Run
    from nanochat.train.step import train_step

    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    corpus = open_corpus(cli.data_folder(args))
    with runtime(args.device_type) as rt, record_stage("base_train") as record:
        rt.check_can_train()
        # The dial: a model of this depth, and the plan that its size and horizon ask for
        shape = model_shape(args)
        config = scaling.model_config(args.depth, tokenizer.vocab_size, **shape)
        reference = scaling.model_config(scaling.REFERENCE_DEPTH, tokenizer.vocab_size, **shape)
        inputs = {"text": corpus.train.fingerprint(), "tokenizer": tokenizer.fingerprint}
        run = Run.open("base", cli.run_tag(args, f"d{args.depth}"), args, rt, inputs)
        if run.is_finished:
            print0(f"{run.folder}: finished at step {run.start}, nothing to do")
            return
        micro_batch = scaling.MicroBatch(config.sequence_len, rt.world_size, args.device_batch_size or 1)
        begun_batch = run.saved_plan.get("total_batch_tokens")
        if begun_batch:
            micro_batch.check(begun_batch, is_given=False)
        expected_flops = args.time_budget * rt.expected_flops if args.time_budget else args.target_flops
        plan = scaling.training_plan(
            scaling_parameters(config),
            scaling_parameters(reference),
            flops_per_token(config),
            config.n_embd,
            scaling.Horizon(args.num_iterations, expected_flops, args.target_param_data_ratio or scaling.DEFAULT_RATIO),
            micro_batch,
            total_batch_tokens=begun_batch or args.total_batch_size,
            weight_decay=args.weight_decay,
            schedule=scaling.Schedule(args.warmup_steps, args.warmdown_ratio, args.final_lr_frac),
            laws=args.laws,
        )
        rows_per_step = plan.total_batch_tokens // (config.sequence_len * rt.world_size)
        rows = args.device_batch_size or scaling.device_batch_rows(rows_per_step, at_most=cli.DEVICE_BATCH_SIZE)
        base_rates = scaling.BaseRates(**cli.given_rates(args))
        inheritance = {"total_batch_tokens": plan.total_batch_tokens, "base_rates": vars(base_rates), "laws": args.laws}
        if args.time_budget is None:
            run.check_horizon(plan.num_steps)
        model = build_model(config, rt.device, rt.dtype, args.seed)
        rates = base_rates.by_role(plan.lr_scale, plan.width_scale)
        optimizer = MuonAdamW(
            dict(model.named_parameters()), model.parameter_roles(), rates, rt, reduce_dtype(args.reduce_dtype)
        )
        loader = PretrainLoader(corpus.train, tokenizer, rows, config.sequence_len, rt.rank, rt.world_size, args.seed)
        progress = Progress(**run.restore(model, optimizer, loader, tokenizer))
        batches = Prefetcher(loader, rt.device, ahead=4 + rows_per_step // rows)
        loss_fn = rt.compile(model.loss, args.compile)
        steps = (
            f"{plan.num_steps:,}" if args.time_budget is None else f"about {plan.num_steps:,} in {args.time_budget:g} s"
        )
        cli.report(
            {
                "depth": (args.depth, True),
                "width": (f"{config.n_embd}, {config.n_head} heads of {config.head_dim}", False),
                "vocabulary": (f"{config.vocab_size:,}, the tokenizer's", False),
                "parameters": (f"{sum(model.parameter_counts().values()):,}", False),
                "FLOPs per token": (f"{model.flops_per_token():.3g}", False),
                "data": (corpus.describe(), bool(args.data_dir)),
                "batch": (f"{plan.total_batch_tokens:,} tokens", args.total_batch_size is not None),
                "device batch": (f"{rows} rows, passes: {rows_per_step // rows}", args.device_batch_size is not None),
                "steps": (steps, args.num_iterations is not None),
                "tokens": (f"{plan.num_steps * plan.total_batch_tokens:,}", args.num_iterations is not None),
                "learning rates": (
                    f"x {plan.lr_scale:.3g} for the batch, tables and head x {plan.width_scale:.3g} for the width",
                    False,
                ),
                "weight decay": (f"{plan.weight_decay:.4g}", False),
                "device": (f"{rt.describe()}", bool(args.device_type)),
            }
        )

        loop = Loop(
            num_steps=plan.num_steps,
            start=run.start,
            rt=rt,
            loggers=open_loggers(run, config.to_dict()),
            progress=progress,
            tokens_per_step=plan.total_batch_tokens,
            flops_per_token=model.flops_per_token(),
            time_budget_s=args.time_budget,
            grace_s=args.grace_period,
        )
        record.update(earlier_s=progress.elapsed_s, parameters=sum(model.parameter_counts().values()))
        for step in loop:
            if step.save_due(args.save_every):
                with step.paused():
                    run.save(step.index, model, optimizer, batches, tokenizer, progress.to_dict(), inheritance)
            if step.due(args.eval_every, at_start=True) and not step.stopping:
                with step.paused():
                    val_batches = validation_batches(
                        corpus.val, tokenizer, rows, config.sequence_len, args.eval_tokens, rt.rank, rt.world_size
                    )
                    record["val_bpb"] = evaluate_bpb(model, val_batches, tokenizer.token_bytes, rt)
                    step.log(val_bpb=record["val_bpb"])
                    run.note_validation(step.index, record["val_bpb"])
            if step.over:
                break
            now = plan.at(step.index, step.total)
            step.log(loss=train_step(loss_fn, batches, optimizer, now, rt, rows_per_step // rows), lr=now.lr)
            step.log(epoch=batches.state()["epoch"])
        batches.close()
        loop.check_completed()
        run.finish()
        record.update(loop.summary(), flags=vars(args), model=config.to_dict(), metrics=run.relative_metrics_path)
        print0(f"trained {run.folder} to step {step.index}")


if __name__ == "__main__":
    cli.run(main)
