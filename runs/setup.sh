#!/usr/bin/env bash
# Make .venv and install nanochat into it. Safe to run again: nothing is done while nothing has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'HELP'
usage: bash runs/setup.sh [EXTRA...]

Makes .venv (python3 -m venv, then pip) and installs torch and nanochat, with the named extras: the names under
[project.optional-dependencies] in pyproject.toml, for example dev. Extras add up over runs. When neither pyproject.toml
nor the extras nor the Python have changed since the last run, it ends at once without using the network.

PYTHON=python3.12           the interpreter for a new .venv (3.10 to 3.13)
NANOCHAT_TORCH_INDEX=URL    where torch comes from (pip's --index-url), for torch only: the index of CPU builds, say
NANOCHAT_UV=1               use uv in place of venv and pip
HELP
}

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

venv_python=.venv/bin/python
stamp=.venv/nanochat-setup          # what was installed; written last
unfinished=.venv/nanochat-unfinished # stands while an installer runs: if we find it, that run was cut off
uv_mode=${NANOCHAT_UV:-0}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

minor() { "$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])'; }

known_extras() {
    awk -F ' *=' '
        /^\[/ { inside = $0 == "[project.optional-dependencies]" }
        inside && /^[A-Za-z0-9_-]+ *= *\[/ { print $1 }
    ' pyproject.toml
}

# The interpreter for a new .venv: $PYTHON, else the first supported one.
find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program"
        supported "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1); nanochat needs Python 3.10 to 3.13"
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$name" >/dev/null && supported "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.10 to 3.13 found ($(python3 -V 2>&1 || true)); install one (Debian, Ubuntu: apt install python3" \
        "python3-venv; macOS: brew install python@3.12) or name one with PYTHON=/path/to/python3"
}

# What the stamp must say for `extras` to be installed: if a line differs, something has changed.
wanted_stamp() {
    echo "extras: $1"
    echo "python: $("$venv_python" -c 'import sys; print(sys.version)' | tr '\n' ' ')"
    echo "folder: $PWD"
    cat pyproject.toml
}

# Run an installer so that a later run can tell a refused install (pip leaves the old state) from one cut off midway.
installing() {
    echo $$ >"$unfinished"
    local status=0
    "$@" || status=$?
    rm -f "$unfinished"
    [ "$status" -eq 0 ] || fail "this command failed, see above: $*" "run bash runs/setup.sh again to go on from here"
}

make_venv() {
    local python
    python=$(find_python)
    echo "making .venv with $("$python" -V)"
    mkdir -p .venv
    echo $$ >"$unfinished"
    if [ "$uv_mode" = 1 ]; then
        uv venv --quiet --allow-existing --python "$python" .venv
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null || {
            rm -rf .venv
            fail "$python has no venv module; on Debian and Ubuntu: apt install python3-venv" \
                "(for a Python that is not the system's own: apt install $(basename "$python")-venv), or NANOCHAT_UV=1"
        }
        "$python" -m venv .venv
    fi
    rm -f "$unfinished"
}

pip_install() {
    if [ "$uv_mode" = 1 ]; then
        installing uv pip install --quiet --python "$venv_python" "$@"
    else
        installing "$venv_python" -m pip install --quiet --no-input --disable-pip-version-check "$@"
    fi
}

case "${1:-}" in -h | --help) usage && exit 0 ;; esac
for extra in "$@"; do
    known_extras | grep -qx -- "$extra" || fail "$extra: unknown extra; choose from: $(known_extras | tr '\n' ' ')"
done
[ "$uv_mode" != 1 ] || command -v uv >/dev/null ||
    fail "NANOCHAT_UV=1, but there is no uv here; leave it out to use pip"
trap 'echo "interrupted; run bash runs/setup.sh again" >&2; exit 130' INT TERM HUP

if [ -e "$unfinished" ]; then
    other=$(cat "$unfinished")
    [ -z "$other" ] || ! kill -0 "$other" 2>/dev/null ||
        fail "another set-up (process $other) is at work in .venv; wait for it, or remove .venv if it is not one"
    echo "the last set-up was cut off: starting .venv afresh"
    rm -rf .venv
fi
if [ -e .venv ] && ! supported "$venv_python"; then
    fail ".venv has no working Python 3.10 to 3.13: remove it (rm -rf .venv) and run this again"
fi
if [ -e .venv ] && [ -n "${PYTHON:-}" ]; then
    asked=$(find_python)
    asked=$(minor "$asked")
    present=$(minor "$venv_python")
    [ "$asked" = "$present" ] ||
        fail "PYTHON=$PYTHON is $asked, the present .venv has $present: rm -rf .venv, then run this again"
fi
extras=$({ [ ! -e "$stamp" ] || sed -n '1s/^extras: //p' "$stamp" | tr ' ' '\n'; printf '%s\n' "$@"; } |
    { grep . || true; } | sort -u | paste -sd ' ' -)
if [ -e "$stamp" ] && wanted_stamp "$extras" | cmp -s - "$stamp"; then
    echo ".venv is up to date (extras: ${extras:-none})"
    exit 0
fi

torch=$(grep -o '"torch[^"]*"' pyproject.toml | head -1 | tr -d '"')
cat <<TEXT
Expected downloads into an empty .venv: about 150 MB of packages, and torch: about 200 MB where its CPU build is found
(macOS, Windows, or with NANOCHAT_TORCH_INDEX set to PyTorch's index of CPU builds), several GB on Linux with the
default index, whose build brings NVIDIA's CUDA libraries. This may take minutes; what is there already is kept.
TEXT
[ -e .venv ] || make_venv
echo "installing $torch"
pip_install ${NANOCHAT_TORCH_INDEX:+--index-url "$NANOCHAT_TORCH_INDEX"} "$torch"
echo "installing nanochat (extras: ${extras:-none})"
pip_install -e ".${extras:+[${extras// /,}]}"
wanted_stamp "$extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
torch_version=$("$venv_python" -c 'from importlib.metadata import version; print(version("torch"))')
echo "done: $("$venv_python" -V), torch $torch_version"
echo "use it with: source .venv/bin/activate"
