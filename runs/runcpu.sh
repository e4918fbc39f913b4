#!/usr/bin/env bash
# From raw text to a chat that learned something, on a CPU, without internet.
#
#     bash runs/runcpu.sh             the main job: a quarter of an hour on two cores. Text: the library of the
#                                     Python that runs it; conversations: made by our own code
#     bash runs/runcpu.sh --smoke     the same at depth 2 in about two minutes: shows that everything works
#     bash runs/runcpu.sh --english   the same at depth 4 on the text and the conversations in the folders pretrain/ and
#                                     sft/ of $NANOCHAT_TEST_DATA (default ../shared/data)
#
# Interrupted and run again, it continues where it was. Results go to $NANOCHAT_BASE_DIR (default ~/.cache/nanochat):
# the main job's there, the others' in its folders smoke/ and english/; models bear the tag "main". To start anew,
# remove tokenizer/ and checkpoints/ from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -n "${NANOCHAT_BASE_DIR:-}${HOME:-}" ] || { echo "error: neither HOME nor NANOCHAT_BASE_DIR is set" >&2; exit 2; }
base="${NANOCHAT_BASE_DIR:-${HOME:-}/.cache/nanochat}"
[[ $base != "~/"* ]] || base="${HOME:-}/${base#"~/"}"
text=stdlib conversations=abilities
tok=(--vocab-size=2048 --max-chars=50000000)
main=(--depth=4 --aspect-ratio=32 --head-dim=32 --window-pattern=L --max-seq-len=512 --total-batch-size=4096
    --eval-every=200)
chat=(--total-batch-size=2048 --eval-every=500)
loss=(--compare-compressors) questions=500
seconds=(30 5 150 30 400 15 5 10) # what each stage takes on two cores
[ "$#" -le 1 ] || { echo "error: $2: unknown argument; use --smoke, --english, --help or none" >&2; exit 2; }
case "${1:-}" in
    "")
        tok+=(--doc-cap=1000000 --chat-data=abilities)
        main+=(--time-budget=140)
        chat+=(--num-generated=150000 --num-iterations=2900) # 6 minutes in bfloat16, 10 in float32; more is worse
        ;;
    --english)
        data="${NANOCHAT_TEST_DATA:-../shared/data}"
        base="$base/english" text="$data/pretrain" conversations="$data/sft"
        main+=(--time-budget=440)
        chat+=(--time-budget=280)
        loss+=(--split-tokens=400000)
        seconds=(30 30 455 45 300 0 5 5)
        for folder in "$text" "$conversations"; do
            [ -d "$folder" ] || {
                echo "error: $folder: no such folder; set NANOCHAT_TEST_DATA to one that has pretrain/ and sft/" >&2
                exit 2
            }
        done
        ;;
    --smoke)
        base="$base/smoke"
        main=(--depth=2 --head-dim=64 --max-seq-len=256 --total-batch-size=4096 --num-iterations=120 --eval-every=60)
        chat=(--num-iterations=80 --eval-every=40 --num-generated=5000)
        loss=(--split-tokens=65536) questions=50
        seconds=(30 5 30 5 25 15 5 10)
        ;;
    --help | -h) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: $1: unknown argument; use --smoke, --english, --help or none" >&2; exit 2 ;;
esac
{ mkdir -p "$base" && [ -w "$base" ]; } 2>/dev/null || {
    echo "error: $base: cannot be written to; choose another folder with NANOCHAT_BASE_DIR" >&2
    exit 2
}
export NANOCHAT_BASE_DIR="$base"

number=0
stage() {
    local left=0 one
    for one in "${seconds[@]:number}"; do left=$((left + one)); done
    number=$((number + 1))
    printf '\n[%ds, about %d min left] %d/%d %s\n' "$SECONDS" $(((left + 59) / 60)) "$number" "${#seconds[@]}" "$1"
}

stage "set-up"
bash runs/setup.sh
python=.venv/bin/python
again="not finished: run it again to go on, or remove tokenizer/ and checkpoints/ from $base to start anew"
trap '[ "$?" = 0 ] || printf "\n%s\n" "$again" >&2' EXIT
$python -m nanochat.report setup --setup-seconds="$SECONDS"

stage "tokenizer"
$python -m scripts.tok_train --data-dir="$text" "${tok[@]}" --if-missing

stage "base model"
$python -m scripts.base_train --data-dir="$text" --model-tag=main "${main[@]}" --eval-tokens=32768 --save-every=50 \
    --resume=auto

stage "bits per byte of the base model"
$python -m scripts.base_loss --data-dir="$text" --model-tag=main "${loss[@]}"

stage "fine-tuning on conversations"
$python -m scripts.chat_sft --data="$conversations" --base-tag=main --model-tag=main "${chat[@]}" --eval-tokens=32768 \
    --save-every=100 --resume=auto

stage "held-out questions"
if [ "$conversations" = abilities ]; then
    $python -m scripts.chat_eval --model-tag=main --max-problems="$questions"
else
    echo "none: these conversations have no questions whose answers can be judged"
fi

stage "report"
$python -m nanochat.report generate --command="bash runs/runcpu.sh${1:+ $1}"

stage "an answer"
$python -m scripts.chat_cli --model-tag=main -p "Hello! Who are you?" --max-tokens=64
if [ "$conversations" = abilities ]; then
    $python -m scripts.chat_cli --model-tag=main -p "What is 37*24?" --max-tokens=64
fi

printf '\ndone in %d seconds; talk to it with\n' "$SECONDS"
printf '    NANOCHAT_BASE_DIR=%q %s -m scripts.chat_cli --model-tag=main\n' "$NANOCHAT_BASE_DIR" "$python"
