#!/usr/bin/env bash
# What the browser tests need: Chromium, and the extra `browser` (Playwright drives it, axe-core judges accessibility).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in -h | --help)
    cat <<'HELP'
usage: bash runs/install_browser.sh

Installs the extra `browser` into .venv and, where there is no Chromium and we are root on Debian or Ubuntu, Debian's
package chromium. Elsewhere it says what to do and leaves without an error: the browser tests skip without Chromium,
unless NANOCHAT_REQUIRE_BROWSER=1 makes that a failure, as runs/test_all.sh does where we are root.
HELP
    exit 0
    ;;
esac
bash runs/setup.sh browser
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        echo "the browser tests will use $(command -v "$name")"
        exit 0
    fi
done
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium
else
    echo "no Chromium here, and no way to install it; install one (Debian: sudo apt install chromium)"
fi
