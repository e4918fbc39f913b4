#!/usr/bin/env bash
# runs/speedrun.sh at depth 32 and 20 tokens per scaling parameter. Named after its price in dollars: the ancestor's
# run of that size took 31 hours on 8 H100.
#
#     bash runs/run1000.sh        what may be set: bash runs/speedrun.sh --help
set -euo pipefail
export DEPTH="${DEPTH:-32}" RATIO="${RATIO:-20}" SCRIPT="$0"
exec bash "$(dirname "${BASH_SOURCE[0]}")/speedrun.sh" "$@"
