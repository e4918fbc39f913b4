#!/usr/bin/env bash
# What CI runs, and what you run before a change is sent in: set-up, then `make check`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in -h | --help)
    cat <<'HELP'
usage: bash runs/test.sh [EXTRA...]

Sets up .venv with the dev extra (and any other named: see runs/setup.sh --help), then runs `make check`: formatting,
lint, types, and the tests that need neither a GPU nor minutes.
HELP
    exit 0
    ;;
esac
command -v make >/dev/null || { echo "error: make is missing (Debian, Ubuntu: apt install make)" >&2; exit 2; }
bash runs/setup.sh dev "$@"
make --no-print-directory check
