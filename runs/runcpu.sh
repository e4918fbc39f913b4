#!/usr/bin/env bash
# From raw text to an answer on the command line, on a CPU.
#
#     bash runs/runcpu.sh --smoke     depth 2 in about three minutes: shows that everything works
#     bash runs/runcpu.sh             depth 4, about a quarter of an hour
#
# Text and conversations are read from $NANOCHAT_TEST_DATA (default ../shared/data): its folders pretrain/ and sft/.
# Interrupted and run again, it continues where it was. Results go to $NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $1" >&2; exit 2; }

case "${1:-}" in
    --smoke) name=smoke depth=2 max_chars=4000000 seq_len=256 batch=4096 base_steps=200 sft_steps=80 ;;
    "")      name=cpu depth=4 max_chars=50000000 seq_len=512 batch=4096 base_steps=500 sft_steps=200 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *)       fail "$1: unknown argument; give --smoke or nothing" ;;
esac
[ $# -le 1 ] || fail "$2: unknown argument; give --smoke or nothing"

data="${NANOCHAT_TEST_DATA:-../shared/data}"
for folder in pretrain sft; do
    [ -d "$data/$folder" ] ||
        fail "$data/$folder: no such folder; set NANOCHAT_TEST_DATA to one that has pretrain/ and sft/"
done
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/$name"

started=$SECONDS
stage() { echo; echo "[$((SECONDS - started))s] $1"; }

stage "1/6 set-up"
bash runs/setup.sh
python=.venv/bin/python

stage "2/6 tokenizer"
$python -m scripts.tok_train --data-dir="$data/pretrain" --depth=$depth --max-chars=$max_chars --if-missing

stage "3/6 base model"
$python -m scripts.base_train --data-dir="$data/pretrain" --depth=$depth --head-dim=64 --max-seq-len=$seq_len \
    --total-batch-size=$batch --num-iterations=$base_steps --eval-every=50 --eval-tokens=32768 --save-every=50 \
    --resume=auto

stage "4/6 bits per byte of the base model"
$python -m scripts.base_loss --data-dir="$data/pretrain" --split-tokens=65536

stage "5/6 fine-tuning on conversations"
$python -m scripts.chat_sft --data="$data/sft" --num-iterations=$sft_steps --eval-every=50 --eval-tokens=32768 \
    --save-every=50 --resume=auto

stage "6/6 an answer"
$python -m scripts.chat_cli -p "Hello! Who are you?" --max-tokens=64

echo
echo "done in $((SECONDS - started)) seconds; talk to it with"
echo "    NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR $python -m scripts.chat_cli"
