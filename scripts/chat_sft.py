"""Teach a base model to answer: supervised fine-tuning on conversations, the assistant's words as the only targets.

    python -m scripts.chat_sft --data=conversations.jsonl
    python -m scripts.chat_sft --data=FOLDER --base-tag=d12 --num-epochs=2
    python -m scripts.chat_sft --data=abilities --time-budget=180     # spelling, counting, arithmetic, docs, identity

Batch size and learning rates are the base run's unless given. One conversation in fifty is held out for validation; the
generated abilities have a validation side of their own.
Writes checkpoints to <base>/checkpoints/sft/<model tag>/.
"""

import time
from argparse import Namespace
from collections.abc import Sequence

from nanochat import cli
from nanochat.common import prepare_process, print0, record_stage


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = cli.Parser(__doc__)
    parser.flag("--data", str, "abilities", "jsonl of conversations, a folder of them, or abilities: generated ones")
    parser.flag(
        "--num-generated", cli.positive_int, None, f"how many --data=abilities makes; else {cli.NUM_GENERATED:,}"
    )
    parser.flag("--base-tag", cli.folder_name, "", "base model to start from; empty: the deepest, then the newest")
    parser.flag("--base-step", cli.non_negative_int, None, "its step; else the newest")
    parser.flag("--num-epochs", cli.positive_float, None, "passes over the conversations; else one")
    parser.flag("--time-budget", cli.positive_float, None, "seconds of start-up and training, instead of epochs")
    cli.add_plan_flags(parser, eval_every=200, save_every=200)
    cli.add_run_flags(parser)
    cli.add_precision_flags(parser)
    parser.check(
        lambda args: None if args.data else "--data: not given; name a jsonl file of conversations, a folder, abilities"
    )
    parser.check(lambda args: cli.at_most_one(args, ("num_iterations", "time_budget", "num_epochs")))
    parser.check(
        lambda args: (
            "--num-generated: only for --data=abilities" if args.num_generated and args.data != "abilities" else None
        )
    )
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    args = parse_args(argv)
    prepare_process(args.offline)
    from nanochat.checkpoint import find_checkpoint
    from nanochat.evals.bpb import evaluate_bpb
    from nanochat.kernels.fp8 import find_recipe
    from nanochat.loader import ConversationLoader
    from nanochat.optim import MuonAdamW
    from nanochat.parallel import reduce_dtype, runtime
    from nanochat.scaling import BaseRates, MicroBatch, sft_plan
    from nanochat.train.loop import Loop, Progress
    from nanochat.train.metrics import open_loggers
    from nanochat.train.passes import Passes, choose_rows
    from nanochat.train.run import Run
    from tasks.common import training_conversations

    train_set, val_set = training_conversations(args.data, args.num_generated or cli.NUM_GENERATED)
    base = find_checkpoint("base", args.base_tag, args.base_step, prefix="base")
    config, tokenizer, inherited = base.config, base.tokenizer(), base.meta["plan"]
    with runtime(args.device_type, in_batches=True) as rt, record_stage("chat_sft") as record:
        run = Run.open("sft", cli.run_tag(args, base.folder.parent.name), args, rt)
        micro_batch = MicroBatch(config.sequence_len, rt.world_size, args.device_batch_size or 1)
        begun_batch = run.saved_plan.get("total_batch_tokens")
        batch_tokens = begun_batch or args.total_batch_size or micro_batch.nearest(inherited["total_batch_tokens"])
        micro_batch.check(batch_tokens, is_given=not begun_batch)
        rows_per_step = batch_tokens // (config.sequence_len * rt.world_size)
        shape = (1, config.sequence_len, rt.rank, rt.world_size)  # how many rows fit shows when the model is there
        loader = ConversationLoader(train_set, tokenizer, *shape, args.seed)
        run.check_inputs({"base model": base.fingerprint, "set of conversations": loader.fingerprint})
        if run.is_finished:
            print0(f"{run.folder}: finished at step {run.start}, nothing to do")
            return
        val_loader = ConversationLoader(val_set, tokenizer, *shape)
        num_steps = args.num_iterations or max(
            1, round((args.num_epochs or 1.0) * loader.num_rows / (rows_per_step * rt.world_size))
        )
        plan = sft_plan(num_steps, batch_tokens, config.n_embd, inherited["laws"])
        if args.time_budget is None:
            run.check_horizon(num_steps)
        model = base.build_model(rt.device, rt.dtype)
        fp8_recipe = args.fp8_recipe if args.fp8 else None
        if fp8_recipe:
            model.use_fp8(find_recipe(fp8_recipe, rt.device, args.fp8_emulate))
        loss_fn = rt.compile(model.loss, args.compile)
        rows = choose_rows(config, rows_per_step, rt, loss_fn, fp8_recipe, args.device_batch_size)
        base_rates = BaseRates(**(inherited["base_rates"] | cli.given_rates(args)))
        rates = base_rates.by_role(plan.lr_scale, plan.width_scale)
        optimizer = MuonAdamW(
            dict(model.named_parameters()), model.parameter_roles(), rates, rt, reduce_dtype(args.reduce_dtype)
        )
        progress = Progress(**run.restore(model, optimizer, loader, tokenizer))
        passes = Passes(loader, rt, rows, rows_per_step, config.sequence_len, args.device_batch_size is not None)
        passes.rehearse(loss_fn, optimizer)
        steps = f"{num_steps:,}" if args.time_budget is None else f"as many as {args.time_budget:g} s allow"
        cli.report(
            {
                "base model": (str(base.folder), bool(args.base_tag)),
                "conversations": (f"{len(train_set):,} to learn, {len(val_set):,} held out", True),
                "batch": (f"{batch_tokens:,} tokens", args.total_batch_size is not None),
                "device batch": (passes.describe(), args.device_batch_size is not None),
                "steps": (steps, args.num_iterations is not None),
                "device": (rt.describe(), bool(args.device_type)),
            }
        )

        inheritance = {"total_batch_tokens": batch_tokens, "base_rates": vars(base_rates), "laws": inherited["laws"]}
        loop = Loop(
            num_steps=num_steps,
            start=run.start,
            rt=rt,
            loggers=open_loggers(run, config.to_dict()),
            progress=progress,
            tokens_per_step=batch_tokens,
            flops_per_token=model.flops_per_token(),
            time_budget_s=args.time_budget,
            began=began,
            grace_s=args.grace_period,
        )
        record.update(
            base_model=str(base.folder), earlier_s=progress.elapsed_s, parameters=sum(model.parameter_counts().values())
        )

        def validate() -> float:
            val_loader.resize(passes.rows)
            return evaluate_bpb(model, val_loader.one_pass(args.eval_tokens), tokenizer.token_bytes, rt)

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
        record.update(loop.summary(), flags=vars(args), metrics=run.relative_metrics_path)
        record.update(device_batch_size=passes.rows)
        print0(f"trained {run.folder} to step {step.index}")


if __name__ == "__main__":
    cli.run(main)
