"""Pretrain a base model on text. `--depth` is the dial; everything not given is derived from it.

    python -m scripts.base_train --depth=12 --data-dir=FOLDER
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=24 --run=d24
    python -m scripts.base_train --depth=4 --max-seq-len=512 --time-budget=300

Needs a tokenizer (scripts.tok_train). Writes checkpoints and metrics.jsonl to <base>/checkpoints/base/<model tag>/.
"""

import time
from argparse import Namespace
from collections.abc import Sequence

from nanochat import cli, planning, scaling
from nanochat.common import base_dir, launch_ranks, plural, prepare_process, print0, record_stage


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    planning.add_base_flags(parser)
    parser.check(lambda args: planning.batch_problem(args, launch_ranks()[1]))
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    args = parse_args(argv)
    prepare_process(args.offline)
    from nanochat.dataset import open_corpus
    from nanochat.evals.bpb import evaluate_bpb
    from nanochat.kernels.attention_ladder import choose_attention
    from nanochat.kernels.fp8 import find_recipe
    from nanochat.loader import PretrainLoader, validation_batches
    from nanochat.model.gpt import attention_case, build_model
    from nanochat.optim import MuonAdamW
    from nanochat.parallel import reduce_dtype, runtime
    from nanochat.tokenizer import Tokenizer
    from nanochat.train.loop import Loop, Progress
    from nanochat.train.metrics import open_loggers
    from nanochat.train.pace import timed_flops
    from nanochat.train.passes import Passes, choose_rows
    from nanochat.train.run import Run

    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    corpus = open_corpus(cli.data_folder(args))
    with runtime(args.device_type, in_batches=True) as rt, record_stage("base_train") as record:
        inputs = {"text": corpus.train.fingerprint(), "tokenizer": tokenizer.fingerprint}
        run = Run.open("base", cli.run_tag(args, f"d{args.depth}"), args, rt, inputs)
        if run.is_finished:
            print0(f"{run.folder}: finished at step {run.start}, nothing to do")
            return
        # The dial: a model of this depth, and the plan that its size and horizon ask for
        asked = planning.request_of(args)
        model = build_model(planning.base_config(asked, tokenizer.vocab_size), rt.device, rt.dtype, args.seed)
        fp8_recipe = args.fp8_recipe if args.fp8 else None
        if fp8_recipe:
            model.use_fp8(find_recipe(fp8_recipe, rt.device, args.fp8_emulate))
        loss_fn = rt.compile(model.loss, args.compile)
        begun_batch = run.saved_plan.get("total_batch_tokens")
        guess = timed_flops(model, rt) if args.time_budget and not begun_batch else rt.expected_flops
        flops = run.saved_plan.get("expected_flops", guess)  # the plan of a run that goes on stays as it was
        base = planning.base_plan(asked, tokenizer.vocab_size, rt.world_size, flops, begun_batch)
        config, plan, rows_per_step = base.config, base.training, base.rows_per_step
        rows = choose_rows(config, rows_per_step, rt, loss_fn, fp8_recipe, args.device_batch_size)
        base_rates = scaling.BaseRates(**cli.given_rates(args))
        inheritance = {"total_batch_tokens": plan.total_batch_tokens, "base_rates": vars(base_rates), "laws": args.laws}
        inheritance["expected_flops"] = flops
        if args.time_budget is None:
            run.check_horizon(plan.num_steps)
        rates = base_rates.by_role(plan.lr_scale, plan.width_scale)
        optimizer = MuonAdamW(
            dict(model.named_parameters()), model.parameter_roles(), rates, rt, reduce_dtype(args.reduce_dtype)
        )
        loader = PretrainLoader(corpus.train, tokenizer, rows, config.sequence_len, rt.rank, rt.world_size, args.seed)
        progress = Progress(**run.restore(model, optimizer, loader, tokenizer))
        passes = Passes(loader, rt, rows, rows_per_step, config.sequence_len, args.device_batch_size is not None)
        passes.rehearse(loss_fn, optimizer)
        steps = (
            f"{plan.num_steps:,}" if args.time_budget is None else f"about {plan.num_steps:,} in {args.time_budget:g} s"
        )
        cli.report(
            {
                "depth": (args.depth, True),
                "width": (f"{config.n_embd}, {plural(config.n_head, 'head')} of {config.head_dim}", False),
                "vocabulary": (f"{config.vocab_size:,}, the tokenizer's", False),
                "parameters": (f"{sum(model.parameter_counts().values()):,}", False),
                "FLOPs per token": (f"{model.flops_per_token():.3g}", False),
                "data": (corpus.describe(), bool(args.data_dir)),
                "batch": (f"{plan.total_batch_tokens:,} tokens", args.total_batch_size is not None),
                "device batch": (passes.describe(), args.device_batch_size is not None),
                "steps": (steps, args.num_iterations is not None),
                "tokens": (f"{plan.num_steps * plan.total_batch_tokens:,}", args.num_iterations is not None),
                "learning rates": (
                    f"x {plan.lr_scale:.3g} for the batch, tables and head x {plan.width_scale:.3g} for the width",
                    False,
                ),
                "weight decay": (f"{plan.weight_decay:.4g}", False),
                "device": (f"{rt.describe()}", bool(args.device_type)),
                "attention": (choose_attention(attention_case(config, rt.device, rt.dtype)).name, False),
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
            began=began,
            grace_s=args.grace_period,
        )
        record.update(earlier_s=progress.elapsed_s, parameters=sum(model.parameter_counts().values()))

        def validate() -> float:
            shape = (passes.rows, config.sequence_len, args.eval_tokens, rt.rank, rt.world_size)
            return evaluate_bpb(model, validation_batches(corpus.val, tokenizer, *shape), tokenizer.token_bytes, rt)

        for step in loop:
            if step.save_due(args.save_every):
                with step.paused():
                    run.save(step.index, model, optimizer, passes, tokenizer, progress.to_dict(), inheritance)
            if step.due(args.eval_every, at_start=True) and not step.stopping:
                with step.paused():
                    record["val_bpb"] = passes.fit(validate)
                    step.log(val_bpb=record["val_bpb"])
                    run.note_validation(step.index, record["val_bpb"])
            if step.over:
                break
            now = plan.at(step.index, step.total)
            step.log(loss=passes.train(loss_fn, optimizer, now, step.index), lr=now.lr)
            step.log(epoch=passes.state()["epoch"])
        passes.close()
        loop.check_completed()
        run.finish()
        record.update(loop.summary(), flags=vars(args), model=config.to_dict(), metrics=run.relative_metrics_path)
        record.update(device_batch_size=passes.rows)
        print0(f"trained {run.folder} to step {step.index}")


if __name__ == "__main__":
    cli.run(main)
