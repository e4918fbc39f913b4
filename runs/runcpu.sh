#!/usr/bin/env bash
# From raw text to a chat that learned something, on a CPU, without internet.
#
#     bash runs/runcpu.sh             the main job: a quarter of an hour on two cores. Text: the library of the
#                                     Python that runs it; conversations: made by our own code
#     bash runs/runcpu.sh --smoke     depth 2 in about two minutes: shows that everything works
#     bash runs/runcpu.sh --english   the main job on real English text and conversations
#
# --smoke and --english read the folders pretrain/ and sft/ of $NANOCHAT_TEST_DATA (default ../shared/data).
# Interrupted and run again, it continues where it was. Results go to $NANOCHAT_BASE_DIR (default ~/.cache/nanochat):
# the main job's there, the others' in its folders smoke/ and english/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Freed memory is kept: on a virtual machine page faults were a tenth of the time of training.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000

base="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
data="${NANOCHAT_TEST_DATA:-../shared/data}"
tok=(--depth=4 --doc-cap=1000000 --max-chars=50000000) pretrain="$data/pretrain" sft="$data/sft"
main=(--depth=4 --head-dim=64 --max-seq-len=512 --total-batch-size=4096 --time-budget=450 --eval-every=150)
chat=(--time-budget=290 --eval-every=200)
[ "$#" -le 1 ] || { echo "error: $2: unknown argument; use --smoke, --english, --help or none" >&2; exit 2; }
case "${1:-}" in
    "") pretrain=stdlib sft=abilities ;;
    --english) base="$base/english" ;;
    --smoke)
        base="$base/smoke" tok=(--depth=2 --max-chars=4000000)
        main=(--depth=2 --head-dim=64 --max-seq-len=256 --total-batch-size=4096 --num-iterations=200 --eval-every=50)
        chat=(--num-iterations=80 --eval-every=50)
        ;;
    --help | -h) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: $1: unknown argument; use --smoke, --english, --help or none" >&2; exit 2 ;;
esac
for folder in "$pretrain" "$sft"; do
    case "$folder" in stdlib | abilities) continue ;; esac
    [ -d "$folder" ] || {
        echo "error: $folder: no such folder; set NANOCHAT_TEST_DATA to a folder that has pretrain/ and sft/" >&2
        exit 2
    }
done
export NANOCHAT_BASE_DIR="$base"

stage() { printf '\n[%ds] %s\n' "$SECONDS" "$1"; }

stage "1/8 set-up"
bash runs/setup.sh
setup_seconds=$SECONDS
python=.venv/bin/python

stage "2/8 tokenizer"
$python -m scripts.tok_train --data-dir="$pretrain" "${tok[@]}" --if-missing

stage "3/8 base model"
$python -m scripts.base_train --data-dir="$pretrain" "${main[@]}" --eval-tokens=32768 --save-every=50 --resume=auto

stage "4/8 bits per byte of the base model"
if [ "$pretrain" = stdlib ]; then
    $python -m scripts.base_loss --data-dir="$pretrain" --compare-compressors
else
    $python -m scripts.base_loss --data-dir="$pretrain" --split-tokens=65536
fi

stage "5/8 fine-tuning on conversations"
$python -m scripts.chat_sft --data="$sft" "${chat[@]}" --eval-tokens=32768 --save-every=50 --resume=auto

stage "6/8 held-out questions"
if [ "$sft" = abilities ]; then
    $python -m scripts.chat_eval
else
    echo "none: these conversations have no questions whose answers can be judged"
fi

stage "7/8 report"
$python -m nanochat.report generate --command="bash runs/runcpu.sh${1:+ $1}" --setup-seconds="$setup_seconds"

stage "8/8 an answer"
$python -m scripts.chat_cli -p "Hello! Who are you?" --max-tokens=64
if [ "$sft" = abilities ]; then $python -m scripts.chat_cli -p "What is 37*24?" --max-tokens=64; fi

printf '\ndone in %d seconds; talk to it with\n' "$SECONDS"
echo "    NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR $python -m scripts.chat_cli"
