#!/usr/bin/env bash
# Check a conversion on a machine with one CUDA GPU and no network, in under ten minutes.
#
#   scripts/gpu_check.sh              on the machine: all steps
#   scripts/gpu_check.sh --stock      there: only the kernels' tests and, in detail, the comparison with stock ExLlamaV2
#   scripts/gpu_check.sh --rehearse   on any machine: the same steps at tiny sizes on the CPU, without stock
#
# It needs the folder .gpu, which `python -m scripts.gpu.prepare .gpu --wheels .whl` makes, and for the comparison with
# stock ExLlamaV2 the wheel in .whl. Variables: PYTHON, the interpreter; CARRIED and WHEELS, the folders in place of .gpu
# and .whl; OUT, the folder for results (build/gpu); LAYERS, how many layers of the model are converted (all); TOTAL, the
# seconds that all steps may take together (540; ten times that in a rehearsal). Every step has its own time limit,
# leaves its result as soon as it has one, and does not stop the others when it fails. Steps that come first matter
# most. Exit code 0: every step passed; 1: some did not; 2: something is missing; 3: there is no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=${1:-check}
case "$mode" in
    check | --stock | --rehearse) ;;
    *) echo "usage: scripts/gpu_check.sh [--stock | --rehearse]" >&2 && exit 2 ;;
esac
OUT=${OUT:-build/gpu}
CARRIED=${CARRIED:-.gpu}
WHEELS=${WHEELS:-.whl}
TOTAL=${TOTAL:-540}
slack=1
begun=$SECONDS
scratch=$(mktemp -d)
building=
finish() {
    [ -z "$building" ] || kill -- "-$building" 2>/dev/null
    rm -rf "$scratch"
}
trap finish EXIT
mkdir -p "$OUT"
log="$OUT/log.txt"
: >"$log"
failed=0

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi

say() { printf '%4d s  %s\n' $((SECONDS - begun)) "$*" | tee -a "$log"; }

# step NAME LIMIT COMMAND...: run a command for LIMIT seconds at most, less where less is left of all.
step() {
    local name=$1 limit=$(($2 * slack)) left=$((slack * TOTAL - SECONDS + begun)) from=$SECONDS code=0
    shift 2
    [ "$left" -ge "$limit" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        say "$name: left out, no time is left"
        failed=1
        return 1
    fi
    echo "--- $name: $*" >>"$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1 || code=$?
    case $code in
        0) say "$name: passed in $((SECONDS - from)) s" ;;
        124 | 137) say "$name: STOPPED after $limit s" ;;
        *) say "$name: FAILED ($code) in $((SECONDS - from)) s" ;;
    esac
    [ $code = 0 ] || failed=1
    return $code
}

export JAX_COMPILATION_CACHE_DIR="$scratch/cache"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ "$mode" = --rehearse ]; then
    export JAX_PLATFORMS=cpu
    slack=10 # a CPU takes its time, and others may be using it
    rows=(--rows 2 --measurement-rows 1 --length 128)
    shape=(--width 64 --inner 160 --heads 4 --vocabulary 320 --rows "2,2;3,2" --length 32)
    tests=(tests/pallas -k "pallas_interpret and scale")
    table=(--device cpu --sizes 64x32)
else
    rows=()
    shape=()
    # The compiled kernels and what stands on them; interpreted ones are tested wherever tests run.
    tests=(tests/pallas tests/ops -k "not interpret" -m "not slow")
    table=(--device gpu --kernels pallas --sizes 4096x4096,4096x11008,11008x4096)
fi

if [ ! -d "$CARRIED/model" ]; then
    say "$CARRIED/model is not there; make it with: python -m scripts.gpu.prepare .gpu --wheels .whl"
    exit 2
fi
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    step "install wheels" 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$scratch/site" "$WHEELS"/*.whl && export PYTHONPATH="$scratch/site:$PYTHONPATH"
fi
step "versions" 60 "$PYTHON" -c 'import jax, jaxlib, numpy, exl2jax; print(jax.__version__, jaxlib.__version__, numpy.__version__)'
step "dequantize" 90 "$PYTHON" -m exl2jax dequantize "$CARRIED/model" "$scratch/source"

if [ -n "${LAYERS:-}" ]; then
    step "cut to $LAYERS layers" 60 "$PYTHON" -c 'import sys
from pathlib import Path
from scripts.gpu.prepare import cut_model
source, out, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
cut_model(source, out, layers=layers, vocabulary=None)' "$scratch/source" "$scratch/cut" "$LAYERS" &&
        rm -rf "$scratch/source" && mv "$scratch/cut" "$scratch/source"
fi

if [ "$mode" != --rehearse ]; then
    if ! timeout 60 "$PYTHON" -c 'import jax; raise SystemExit(jax.default_backend() != "gpu")' >>"$log" 2>&1; then
        say "JAX finds no GPU: the steps from here on need one; --rehearse runs them on the CPU"
        exit 3
    fi
    nvidia-smi -L 2>/dev/null | tee -a "$log"
    if command -v nvcc >/dev/null && compgen -G "$WHEELS/exllamav2-*.whl" >/dev/null; then
        # Stock compiles its kernels beside the other steps, at the lowest priority, so that their times stay their own.
        TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=12 TORCH_EXTENSIONS_DIR="$scratch/extensions" \
            setsid nice -n 19 timeout "$TOTAL" "$PYTHON" -m scripts.gpu.stock build >"$OUT/build.txt" 2>&1 &
        building=$!
    else
        say "stock: nvcc or the wheel exllamav2 is missing, no comparison"
        failed=1
    fi
fi

run_tests() { step "tests" 90 "$PYTHON" -m pytest -q -p no:cacheprovider "${tests[@]}"; }

compare() { # compare EXL2 [ARGUMENT...]: with stock, when it is built
    step "stock's kernels" 240 bash -c "while kill -0 $building 2>/dev/null; do sleep 1; done"
    TORCH_CUDA_ARCH_LIST=9.0 TORCH_EXTENSIONS_DIR="$scratch/extensions" step "stock ExLlamaV2" 120 "$PYTHON" \
        -m scripts.gpu.stock compare "$OUT/stock.json" "$1" "$CARRIED/heldout.safetensors" "${@:2}"
}

if [ "$mode" = --stock ]; then
    run_tests
    [ -z "$building" ] || compare "$CARRIED/model" --diagnose "$scratch/source"
    "$PYTHON" -m scripts.gpu.summary "$OUT" | tee -a "$log"
    exit $failed
fi

whole() { # whole NAME LIMIT
    step "whole conversion, $1" "$2" "$PYTHON" -m scripts.gpu.whole "$OUT/$1.json" --model "$scratch/source" \
        --work "$scratch/$1" --calibration "$CARRIED/calibration.safetensors" "${rows[@]}"
}
whole first 200
whole second 100
step "same bytes" 10 "$PYTHON" -c 'import json, sys
a, b = (json.load(open(path))["digests"] for path in sys.argv[1:])
print(a, b)
sys.exit(a != b)' "$OUT/first.json" "$OUT/second.json"
rm -rf "$scratch/second"
step "block of 7B" 200 "$PYTHON" -m scripts.gpu.block "$OUT/block.json" "${shape[@]}"
# What is built goes on being built while the next steps run, unless it is done by now.
if [ -n "$building" ] && ! kill -0 "$building" 2>/dev/null; then
    compared=1
    compare "$scratch/first/exl2"
fi
run_tests
step "GPTQ per shape" 90 "$PYTHON" -m scripts.bench.table --only operations --no-plain "${table[@]}" --keep "$OUT/gptq.json"
if [ -n "$building" ] && [ -z "${compared:-}" ]; then
    compare "$scratch/first/exl2"
fi
"$PYTHON" -m scripts.gpu.summary "$OUT" | tee -a "$log"
say "done; results are in $OUT"
exit $failed
