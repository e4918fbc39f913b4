#!/usr/bin/env bash
# From the hub's text to a chat, on one node with GPUs: a model of about GPT-2's size at depth 24.
#
#     bash runs/speedrun.sh                        8 GPUs, or as many as there are
#     DEPTH=12 bash runs/speedrun.sh               smaller: the dial
#     RUN=first LOGGER=console,wandb bash runs/speedrun.sh
#
# Interrupted and run again, it continues where it was: downloads, base model and fine-tuning. What may be set:
#
#     DEPTH  24          RATIO  8, tokens per scaling parameter      NPROC  processes, one per GPU; else counted
#     RUN    d<DEPTH>    LOGGER  console (docs/logging.md)           DATA_DIR  text of your own instead of the hub's
#     TOK_FLAGS, BASE_FLAGS, LOSS_FLAGS, SFT_FLAGS, EVAL_FLAGS     more flags of those recipes (docs/cli.md)
#
# How long the base model trains is RATIO's business alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    "") ;;
    --help | -h) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: $1: unknown argument; settings are environment variables, see --help" >&2; exit 2 ;;
esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
depth="${DEPTH:-24}" ratio="${RATIO:-8}" run="${RUN:-d${DEPTH:-24}}" data=()
[ -z "${DATA_DIR:-}" ] || data=(--data-dir="$DATA_DIR")
read -ra tok_flags <<<"${TOK_FLAGS:-}"
read -ra base_flags <<<"${BASE_FLAGS:-}"
read -ra loss_flags <<<"${LOSS_FLAGS:-}"
read -ra sft_flags <<<"${SFT_FLAGS:-}"
read -ra eval_flags <<<"${EVAL_FLAGS:-}"
say() { printf '\n[%d s] %s\n' "$SECONDS" "$1"; }

say "set-up"
bash runs/setup.sh
python=.venv/bin/python
$python -m nanochat.report setup --setup-seconds="$SECONDS"
nproc="${NPROC:-$($python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
launch=($python -m torch.distributed.run --standalone --nproc_per_node="$nproc" -m) dash=(--)
[ "$nproc" != 1 ] || launch=($python -m) dash=()
base=(${data[@]+"${data[@]}"} --depth="$depth" --target-param-data-ratio="$ratio" --run="$run" --resume=auto
    --logger="${LOGGER:-console}" ${base_flags[@]+"${base_flags[@]}"})
sft=(--base-tag="$run" --model-tag="$run" --resume=auto --logger="${LOGGER:-console}"
    ${sft_flags[@]+"${sft_flags[@]}"})
check='import sys; from nanochat.cli import run; from scripts import RECIPE as r
run(lambda: r.parse_args(sys.argv[1:]))'
$python -c "${check//RECIPE/base_train}" "${base[@]}" # a slip is told now, not after the download
$python -c "${check//RECIPE/chat_sft}" "${sft[@]}"

download=
if [ -z "${DATA_DIR:-}" ]; then
    say "text for the tokenizer; the rest comes while it is trained"
    $python -m nanochat.dataset -n 8
    $python -m nanochat.dataset --depth="$depth" --target-param-data-ratio="$ratio" >/dev/null &
    download=$!
    trap 'kill "$download" 2>/dev/null || true' EXIT
fi

say "tokenizer"
$python -m scripts.tok_train ${data[@]+"${data[@]}"} --depth="$depth" --if-missing ${tok_flags[@]+"${tok_flags[@]}"}
$python -m scripts.tok_eval ${data[@]+"${data[@]}"}

if [ -n "$download" ]; then
    say "the rest of the text"
    wait "$download"
    trap - EXIT
fi

say "base model, processes: $nproc"
"${launch[@]}" scripts.base_train ${dash[@]+"${dash[@]}"} "${base[@]}"
$python -m scripts.base_loss ${data[@]+"${data[@]}"} --model-tag="$run" ${loss_flags[@]+"${loss_flags[@]}"}

say "fine-tuning on conversations"
"${launch[@]}" scripts.chat_sft ${dash[@]+"${dash[@]}"} "${sft[@]}"
$python -m scripts.chat_eval --model-tag="$run" ${eval_flags[@]+"${eval_flags[@]}"}

say "report"
$python -m nanochat.report generate --command="bash runs/$(basename "${SCRIPT:-$0}")"
printf '\ndone in %d seconds; talk to it with\n' "$SECONDS"
printf '    %s%s -m scripts.chat_cli --model-tag=%s\n' \
    "${NANOCHAT_BASE_DIR:+NANOCHAT_BASE_DIR=$(printf %q "$NANOCHAT_BASE_DIR") }" "$python" "$run"
