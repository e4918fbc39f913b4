#!/usr/bin/env bash
# runs/test.sh, then the tests that take minutes. Those that need a GPU: pytest -m gpu on a machine that has one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in -h | --help)
    cat <<'HELP'
usage: bash runs/test_all.sh [EXTRA...]

Runs runs/test.sh (same arguments), installs the dashboards and what the browser tests need (runs/install_browser.sh),
then `make slow`: the tests marked slow that need no GPU. The browser tests skip only where there is no Chromium and we
are not root, so that none can be installed; anywhere else a missing browser is a failure (NANOCHAT_REQUIRE_BROWSER=1).
HELP
    exit 0
    ;;
esac
bash runs/test.sh "$@"
bash runs/setup.sh dev lm-eval tensorboard trackio wandb "$@"
bash runs/install_browser.sh
if [ "$(id -u)" -eq 0 ] || command -v chromium chromium-browser google-chrome >/dev/null; then
    export NANOCHAT_REQUIRE_BROWSER=1
fi
make --no-print-directory slow
