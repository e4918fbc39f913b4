#!/usr/bin/env bash
# Make .venv and install nanochat into it. Safe to run again: nothing is done while nothing has changed, and a run that
# was cut off goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The Pythons that pyproject.toml allows: from 3.$lowest up to, not including, 3.$beyond.
read -r lowest beyond < <(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' pyproject.toml) ||
    fail 'pyproject.toml has no line requires-python = ">=3.A,<3.B"'
pythons="Python 3.$lowest to 3.$((beyond - 1))"

usage() {
    cat <<HELP
usage: bash runs/setup.sh [EXTRA...]

Makes .venv (python3 -m venv, then pip) and installs torch and nanochat, with the named extras: the names under
[project.optional-dependencies] in pyproject.toml, for example dev. Extras add up over runs. When neither pyproject.toml
nor the extras nor the Python have changed since the last run, it ends at once without using the network.

PYTHON=python3.12           the interpreter for a new .venv ($pythons)
NANOCHAT_TORCH_INDEX=URL    where torch comes from (pip's --index-url), for torch only; PyTorch's page
                            "Get started" shows the one of its CPU builds.
                            Later runs remember it; another one installs torch anew, an empty one means pip's own
NANOCHAT_UV=1               use uv in place of venv and pip
HELP
}

venv_python=.venv/bin/python
stamp=.venv/nanochat-setup           # what was installed; written last
torch_from=.venv/nanochat-torch      # the index that the installed torch came from; empty: pip's own
unfinished=.venv/nanochat-unfinished # who is at work ("PID making" or "PID installing"); stays if it is cut off
log=.venv/nanochat-setup.log         # what the installers said in the last run
uv_mode=${NANOCHAT_UV:-0}

supported() {
    "$1" -c "import sys; sys.exit(not (3, $lowest) <= sys.version_info[:2] < (3, $beyond))" 2>/dev/null
}

minor() { "$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])'; }

known_extras() {
    awk -F ' *=' '
        /^\[/ { inside = $0 == "[project.optional-dependencies]" }
        inside && /^[A-Za-z0-9_-]+ *= *\[/ { print $1 }
    ' pyproject.toml
}

# The interpreter for a new .venv: $PYTHON, else the first supported one.
find_python() {
    local number found=none
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program"
        supported "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1 | head -1); nanochat needs $pythons"
        echo "$PYTHON"
        return
    fi
    for number in 3 $(seq -f '3.%.0f' $((beyond - 1)) -1 "$lowest") ''; do
        if command -v "python$number" >/dev/null && supported "python$number"; then
            echo "python$number"
            return
        fi
    done
    ! command -v python3 >/dev/null || found=$(python3 -V 2>&1 | head -1)
    fail "nanochat needs $pythons, found: $found; install one (Debian, Ubuntu: apt install python3 python3-venv;" \
        "macOS: brew install python@3.12) or name one with PYTHON=/path/to/python3"
}

# What the stamp must say for `extras` to be installed: if a line differs, something has changed.
wanted_stamp() {
    echo "extras: $1"
    echo "python: $("$venv_python" -c 'import sys; print(sys.version)' | tr '\n' ' ')"
    echo "folder: $PWD"
    cat pyproject.toml
}

# A full disk or a network that is not there, if the installers' words in $log tell of one, and what to do.
known_cause() {
    local network='NewConnectionError|Failed to establish|Max retries exceeded|timed out|Read ?Timeout|ProxyError'
    network+='|name resolution|getaddrinfo|not known|Connection(Reset|Refused)?Error|Connection (refused|reset|aborted)'
    network+='|IncompleteRead|ProtocolError|error sending request|dns error'
    # A full disk may have had no room for the log either.
    if grep -qiE 'no space left|disk quota exceeded' "$log" ||
        ! df -Pk .venv | awk 'NR == 2 && $4 < 64 { exit 1 }'; then
        echo "the disk is full: free some space in $PWD and in ${TMPDIR:-/tmp}, then run bash runs/setup.sh again"
    elif grep -qiE "$network" "$log" && ! grep -qE 'from versions: [^n]' "$log"; then
        echo "a package index cannot be reached: look at the network, at pip's settings of proxy and index, and at" \
            "NANOCHAT_TORCH_INDEX, then run bash runs/setup.sh again"
    else
        return 1
    fi
}

# The last complaint in $log, else the exit status $1.
last_complaint() {
    { grep -E '^ *(ERROR|error): ' "$log" || echo "it ended with exit status $1"; } |
        { grep -v 'ERROR: Exception:$' || tail -n 1 "$log"; } | tail -n 1 | sed -E 's/^ *(ERROR|error): //'
}

# What a cut-off installer leaves: records of packages that lack INSTALLER, which is written last, and what pip had put
# aside to replace a package. With these gone, the packages are installed anew.
half_installed() {
    local path
    for path in .venv/lib/python3*/site-packages/{~*,[!~]*.dist-info}; do
        case "$path" in */site-packages/\~*) ;; *) [ ! -e "$path/INSTALLER" ] || continue ;; esac
        [ ! -e "$path" ] || echo "$path"
    done
}

# Run an installer: on a terminal it shows its progress, its complaints go to $log and come out as one line.
installing() {
    local what=$1 status=0
    shift
    if [ ! -t 1 ]; then
        "$@" >>"$log" 2>&1 || status=$?
    elif [ "$uv_mode" = 1 ]; then
        "$@" || status=$? # uv shows progress and complaints on one stream
    else
        "$@" 2>>"$log" || status=$?
    fi
    [ "$status" -ne 0 ] || return 0
    [ ! -e "$stamp" ] || [ -n "$(half_installed)" ] || rm -f "$unfinished" # what was there before still holds
    local details="(details: $log)"
    [ -s "$log" ] || details="(see above)"
    fail "$what was not installed: $(known_cause || last_complaint "$status") $details"
}

pip_install() {
    local what=$1
    shift
    if [ "$uv_mode" = 1 ]; then
        installing "$what" uv pip install --python "$venv_python" "$@"
    else
        installing "$what" "$venv_python" -m pip install "$@"
    fi
}

pip_runs() { "$venv_python" -m pip --version >/dev/null 2>&1; }

# pip for .venv, without root. Debian and Ubuntu keep ensurepip in a package of its own, so three other ways follow it:
# the pip of the interpreter $1, virtualenv and uv.
get_pip() {
    local code quiet=(--quiet --ignore-installed)
    "$venv_python" -m ensurepip --default-pip && return
    if code=$("$1" -c 'import pip; print(pip.__path__[0])'); then
        "$venv_python" "$code" install "${quiet[@]}" pip && return
    fi
    if command -v virtualenv; then virtualenv --quiet --python "$1" .venv && pip_runs && return; fi
    if command -v uv; then uv pip install --quiet --python "$venv_python" pip && return; fi
} >>"$log" 2>&1

# $1: the interpreter that .venv was or will be made with.
need_pip() {
    local package
    rm -rf .venv/lib/python3*/site-packages/pip{,-[0-9]*} # one that does not run keeps installers from bringing another
    get_pip "$1" || true
    pip_runs && return
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    fail "there is no pip for .venv: $(known_cause || echo "$1 has no ensurepip, and there is no pip, virtualenv" \
        "or uv; install one (Debian, Ubuntu: apt install $package), then run bash runs/setup.sh again") (details: $log)"
}

make_venv() {
    local python=$1
    echo "making .venv with $("$python" -V)"
    if [ "$uv_mode" = 1 ]; then
        installing .venv uv venv --allow-existing --python "$python" .venv
    else
        "$python" -c 'import venv' 2>/dev/null ||
            fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or" \
                "set NANOCHAT_UV=1"
        "$python" -m venv --without-pip .venv >>"$log" 2>&1 ||
            fail ".venv was not made: $(known_cause || tail -n 1 "$log") (details: $log)"
        need_pip "$python"
    fi
}

check_writable() {
    local folder
    for folder in . .venv; do
        [ ! -e "$folder" ] || [ -w "$folder" ] ||
            fail "$PWD cannot be written to, so .venv cannot be made there; use a copy in a folder of your own"
    done
}

# Whether process $1 is another set-up; ids are used again.
is_set_up() {
    [ "$1" != "$$" ] && kill -0 "$1" 2>/dev/null &&
        { cat "/proc/$1/cmdline" 2>/dev/null || ps -p "$1" -o args= 2>/dev/null; } | grep -qa 'setup\.sh'
}

# Write stdin to the file $1, whole or not at all.
note() {
    { cat >"$1.new" && mv "$1.new" "$1"; } 2>/dev/null ||
        fail "$PWD/$1 cannot be written: is the disk full?"
}

hint_at_cpu_builds() {
    [ "$(uname -sm)" = "Linux x86_64" ] && [ -z "$index" ] && [ ! -e "$torch_from" ] || return 0
    ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidiactl ] || return 0
    echo "hint: there is no NVIDIA GPU here, yet torch's usual build for Linux brings several GB of CUDA libraries;" \
        "to do without, set NANOCHAT_TORCH_INDEX to the index of its CPU builds (bash runs/setup.sh --help)"
}

case "${1:-}" in -h | --help) usage && exit 0 ;; esac
for extra in "$@"; do
    known_extras | grep -qx -- "$extra" || fail "$extra: unknown extra; choose from: $(known_extras | tr '\n' ' ')"
done
[ "$uv_mode" != 1 ] || command -v uv >/dev/null ||
    fail "NANOCHAT_UV=1, but there is no uv here; leave it out to use pip"
exec 3>&2 # the trap may run where stderr is $log
trap 'echo "interrupted; what is installed is kept: run bash runs/setup.sh again" >&3; exit 130' INT TERM HUP

if [ -e "$unfinished" ]; then
    read -r other phase <"$unfinished" || true
    [ -z "$other" ] || ! is_set_up "$other" ||
        fail "another set-up (process $other) is at work in .venv; wait for it, or end it and run this again"
    check_writable
    if [ "$phase" = making ]; then
        echo "the making of .venv was cut off: starting afresh"
        rm -rf .venv
    else
        echo "the last set-up did not finish: going on from there"
        half_installed | while read -r path; do rm -rf "$path"; done
    fi
fi
known_index=$(cat "$torch_from" 2>/dev/null || true)
anew="rm -rf .venv, then run this again${known_index:+ with NANOCHAT_TORCH_INDEX=$known_index}"
if [ -e .venv ] && ! supported "$venv_python"; then
    fail ".venv has no working $pythons: $anew"
fi
if [ -e .venv ] && [ -n "${PYTHON:-}" ]; then
    asked=$(find_python)
    asked=$(minor "$asked")
    present=$(minor "$venv_python")
    [ "$asked" = "$present" ] ||
        fail "PYTHON=$PYTHON is $asked, the present .venv has $present: $anew"
fi
extras=$({ [ ! -e "$stamp" ] || sed -n '1s/^extras: //p' "$stamp" | tr ' ' '\n'; printf '%s\n' "$@"; } |
    { grep . || true; } | sort -u | paste -sd ' ' -)
index=${NANOCHAT_TORCH_INDEX-$known_index}
if [ -e "$stamp" ] && [ ! -e "$unfinished" ] && [ "$index" = "$known_index" ] &&
    wanted_stamp "$extras" | cmp -s - "$stamp"; then
    echo ".venv is up to date (extras: ${extras:-none})"
    exit 0
fi

export PIP_RETRIES="${PIP_RETRIES:-1}" PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
[ -n "${HOME:-}" ] || export PIP_NO_CACHE_DIR=1 # or pip may make a folder named ~
check_writable
phase=installing
[ -e .venv ] || phase=making
[ "$phase" = installing ] || python=$(find_python)
mkdir -p .venv 2>/dev/null || true # the next line says why
echo "$$ $phase" | note "$unfinished"
: >"$log"
if [ "$phase" = making ]; then
    make_venv "$python"
    echo "$$ installing" | note "$unfinished"
elif [ "$uv_mode" != 1 ] && ! pip_runs; then
    need_pip "$venv_python"
fi

torch=$(grep -o '"torch[^"]*"' pyproject.toml | head -1 | tr -d '"')
hint_at_cpu_builds
echo "what is missing is downloaded: torch (200 MB as a CPU build, several GB with CUDA), 150 MB of other packages"
echo "installing $torch"
renewed=
[ "$index" = "$known_index" ] || renewed=--force-reinstall
pip_install torch ${index:+--index-url "$index"} ${renewed:+"$renewed"} "$torch"
echo "$index" | note "$torch_from"
echo "installing nanochat (extras: ${extras:-none})"
pip_install nanochat -e ".${extras:+[${extras// /,}]}"
wanted_stamp "$extras" | note "$stamp"
rm -f "$unfinished"
torch_version=$("$venv_python" -c 'from importlib.metadata import version; print(version("torch"))')
echo "done: $("$venv_python" -V), torch $torch_version"
echo "use it with: source .venv/bin/activate"
