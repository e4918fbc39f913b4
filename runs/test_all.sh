#!/usr/bin/env bash
# runs/test.sh, then the tests that take minutes. Those that need a GPU: pytest -m gpu on a machine that has one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in -h | --help)
    cat <<'HELP'
usage: bash runs/test_all.sh [EXTRA...]

Runs runs/test.sh (same arguments), installs what the browser tests need (runs/install_browser.sh), then `make slow`:
the tests marked slow that need no GPU.
HELP
    exit 0
    ;;
esac
bash runs/test.sh "$@"
bash runs/install_browser.sh
make --no-print-directory slow
