#!/usr/bin/env bash
# Everything that only a GPU can tell, in less than ten minutes, on one GPU, without a network and without set-up.
#
#     bash runs/gpu_check.sh                     with .venv if it is there, else python3
#     PYTHON=/opt/torch/bin/python bash runs/gpu_check.sh
#     OUT=FOLDER bash runs/gpu_check.sh          keep the output of every part in FOLDER/gpu_check
#
# First the doctor, then the tests of training (bfloat16 against float32, torch.compile, two hundred steps of depth 12),
# then tokens per second, MFU and peak memory of depth 12 and 20 in bfloat16 and in FP8, then the tests of the kernels
# (attention, FP8, loss in chunks). Each part has a time limit. At the end stand a table for dev/GPU.md and, as the last
# line, one JSON object.
#
# Exit code: 0 all is well; 1 something failed, its last words are shown; 2 no GPU or no packages, nothing was run.
# DEVICE=cpu does the same at a toy's size, to test this script. BUDGET: the seconds that all parts share, else 580.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
case "${1:-}" in
    "") ;;
    --help | -h) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: $1: unknown argument; settings are environment variables, see --help" >&2; exit 2 ;;
esac
device="${DEVICE:-cuda}" budget="${BUDGET:-580}"
case "$device" in
    cuda | cpu) ;;
    *) echo "error: DEVICE=$device: choose cuda or cpu" >&2; exit 2 ;;
esac
python="${PYTHON:-.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
command -v "$python" >/dev/null || { echo "error: $python: no such program; name a Python with PYTHON" >&2; exit 2; }
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ "$device" = cuda ] && "$python" -c 'import torch; raise SystemExit(torch.cuda.is_available())' 2>/dev/null; then
    version=$("$python" -c 'import torch; print(torch.__version__)')
    echo "error: torch $version sees no CUDA device, so nothing was run; python -m scripts.doctor may say why" >&2
    exit 2
fi

missing=$("$python" -c 'from nanochat.doctor.installed import import_fault, requirements
faults = {name: import_fault(name) for name in [*requirements(), "pytest"]}
print(*[f"{name} ({fault})" for name, fault in faults.items() if fault], sep=", ")') || exit 2
if [ -n "$missing" ]; then
    echo "error: $python lacks $missing; install it with bash runs/setup.sh dev, or name another Python with PYTHON" >&2
    exit 2
fi

out="${OUT:-}"
if [ -z "$out" ]; then
    out=$(mktemp -d) made="$out"
    trap 'rm -rf "$made"' EXIT
fi
out="$out/gpu_check" # of our own, so that what is removed is ours
rm -rf "$out" && mkdir -p "$out"
export NANOCHAT_BASE_DIR="$out/base"

part() { # NAME SECONDS COMMAND...: its output, exit code and seconds go to the folder; 124: it ran out of time
    local name="$1" limit="$2" left=$((budget - SECONDS)) began=$SECONDS code
    shift 2
    [ "$limit" -le "$left" ] || limit="$left"
    printf '[%d s] %s\n' "$SECONDS" "$name"
    if [ "$limit" -le 0 ]; then
        echo "the other parts have left no time" >"$out/$name.log"
        code=124
    else
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
        code=$?
    fi
    echo "$code" >"$out/$name.code"
    echo $((SECONDS - began)) >"$out/$name.seconds"
    return "$code"
}

bench() { # NAME DEPTH ROWS FLAGS...: with half the rows as long as memory runs out
    local name="$1" depth="$2" rows="$3" size=(--max-seq-len=2048 --repeats=10)
    shift 3
    [ "$device" = cuda ] || size=(--aspect-ratio=64 --head-dim=64 --vocab-size=300 --max-seq-len=64 --repeats=2)
    until part "$name" 100 env NANOCHAT_DTYPE=bfloat16 "$python" -m scripts.bench --only=train --depth="$depth" \
        --device-batch-size="$rows" --device-type="$device" --offline "${size[@]}" "$@"; do
        if [ "$rows" = 1 ] || ! grep -q "out of memory" "$out/$name.log"; then break; fi
        rows=$((rows / 2))
    done
}

part doctor 120 "$python" -m scripts.doctor --json --offline --device-type="$device" \
    --time-limit=80 --only=packages,device,dtype,threads,memory,attention,fp8
gpu_tests() { # NAME SECONDS FILES...
    local name="$1" limit="$2"
    shift 2
    part "$name" "$limit" "$python" -m pytest -q -m "gpu and not slow" -rs -p no:cacheprovider -W default \
        --junitxml="$out/$name.xml" "$@"  # warnings: drivers and other versions warn as they like
}
gpu_tests training 180 tests/test_gpu.py
if [ "$device" = cuda ]; then
    gigabytes=$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory // 10**9)')
    rows=$((gigabytes >= 70 ? 32 : gigabytes >= 35 ? 16 : gigabytes >= 20 ? 8 : 4))
    bench d12-bf16 12 "$rows"
    bench d12-fp8 12 "$rows" --fp8
    bench d20-bf16 20 $((rows / 2))
    bench d20-fp8 20 $((rows / 2)) --fp8
else
    bench d2-bf16 2 4
    bench d2-fp8 2 4 --fp8 --fp8-emulate
fi
mapfile -t files < <(grep -l "mark\.gpu" tests/test_*.py | grep -v test_gpu)
gpu_tests kernels 200 "${files[@]}" # last: the compiler takes most of its time, and it is the one to end early
"$python" dev/gpu_report.py "$out" --device="$device" --seconds="$SECONDS"
