#!/usr/bin/env bash
# Make the virtual environment that the Makefile works in, or find it ready.
#
#   scripts/setup.sh          .venv         the project with the extras that EXTRAS names; dev,demo if it names none
#   scripts/setup.sh parity   .venv-parity  torch and transformers, to rebuild the reference logits
#   scripts/setup.sh gpu      .venv-gpu     the project with JAX for CUDA (4.4 GB), to compile for a GPU without one
#   scripts/setup.sh peers    .venv-peers   other quantizers (torch, llama.cpp from source), to compare formats
#
# PYTHON names an interpreter to use instead of the ones looked for. Nothing is printed when all is in place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=
case "${1:-main}" in
    main)
        extras=${EXTRAS:-dev,demo}
        venv=.venv
        wanted=3.12 newest=3.99
        candidates=(python3 python3.12 python3.13 python3.14)
        inputs=(pyproject.toml constraints.txt)
        arguments=(-c constraints.txt -e ".[$extras]")
        ;;
    parity)
        venv=.venv-parity
        wanted=3.11 newest=3.11
        candidates=(python3.11 python3)
        inputs=(tests/models/reference/requirements.txt)
        arguments=(-r tests/models/reference/requirements.txt)
        ;;
    gpu)
        venv=.venv-gpu
        wanted=3.12 newest=3.99
        candidates=(python3 python3.12 python3.13 python3.14)
        inputs=(pyproject.toml constraints.txt)
        arguments=(-c constraints.txt -e ".[cuda13]")
        ;;
    peers)
        venv=.venv-peers
        wanted=3.12 newest=3.12
        candidates=(python3.12 python3)
        inputs=(scripts/peers/requirements.txt)
        arguments=(-r scripts/peers/requirements.txt)
        export DISABLE_CUDA=1  # HQQ would build kernels
        # Of llama.cpp, which comes as source, only the quantizer is wanted: it is C, and so is optimized all the same.
        export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG'"
        ;;
    *)
        echo "usage: scripts/setup.sh [parity|gpu|peers]" >&2
        exit 2
        ;;
esac
stamp="$venv/setup-stamp"
log="$venv/setup.log"

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# True when "$1" runs, is of a version in the range, and can make virtual environments.
usable() {
    "$1" - "$wanted" "$newest" >/dev/null 2>&1 <<'PYTHON'
import sys

low, high = (tuple(map(int, text.split("."))) for text in sys.argv[1:])
sys.exit(not low <= sys.version_info[:2] <= high)
PYTHON
}
can_make_venv() {
    usable "$1" && "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

# A checkout that moved needs a new stamp too: the scripts in bin/ name the interpreter by its full path.
fingerprint() {
    pwd -P
    cksum "${inputs[@]}"
}

make_venv() {
    local candidate
    # A version manager's shim may exist and yet not run: each candidate is tried, not only looked up.
    for candidate in ${PYTHON:+"$PYTHON"} "${candidates[@]}" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$wanted".*/bin/python; do
        if can_make_venv "$candidate"; then
            "$candidate" -m venv --clear "$venv"
            return
        fi
    done
    if command -v uv >/dev/null 2>&1; then
        # --seed: pip itself is needed later, to fetch the demo model.
        rm -rf "$venv"
        uv venv --quiet --seed --python "$wanted" "$venv" && return
        fail "uv could not make $venv with Python $wanted; its message is above"
    fi
    fail "no Python $wanted$([ "$newest" = "$wanted" ] || echo ' or later') with the venv module was found" \
        "looked for: ${PYTHON:+$PYTHON, }${candidates[*]}, uv" \
        "install one of them, or name an interpreter: make ... PYTHON=/path/to/python"
}

# The stamp is the fingerprint and, in its last line, the extras that are installed.
installed() {
    [ -f "$stamp" ] && [ "$(sed '$d' "$stamp")" = "$(fingerprint)" ] && "$venv/bin/python" -c '' 2>/dev/null
}
covered() {
    local extra present
    present=",$(tail -n 1 "$stamp"),"
    for extra in ${extras//,/ }; do
        [[ "$present" == *",$extra,"* ]] || return 1
    done
}

if installed && covered; then
    exit 0
fi

rm -f "$stamp"
if ! { usable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    make_venv
fi
echo "setup: installing into $venv with $("$venv/bin/python" --version); the first time this takes a few minutes" >&2
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "pip could not install the dependencies; the whole output is in $log" \
        "check the network and the package index, then run the command again"
fi
{
    fingerprint
    echo "$extras"
} >"$stamp"
