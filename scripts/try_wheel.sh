#!/usr/bin/env bash
# Build the wheel and try it in a fresh environment, with nothing of the checkout on its path: the version, a tiny
# conversion by the built-in calibration texts, and its verification. `make wheel` runs this.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
python=$root/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

# setuptools would pack what an earlier build left in build/lib.
rm -rf build/lib build/wheel
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
wheel=$(echo build/wheel/exl2jax-*.whl)

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt "$wheel"
cd "$work"
PATH=$work/venv/bin:$PATH

version=$(exl2jax --version)
echo "$version, from $wheel"
case "$wheel" in
    *"exl2jax-${version##* }-"*) ;;
    *) echo "try_wheel: the command says '$version', which is not the version of $wheel" >&2 && exit 1 ;;
esac
python -P - <<'PYTHON'
from pathlib import Path

import exl2jax
from exl2jax.testing.tiny_model import write_tiny_llama

assert "site-packages" in exl2jax.__file__, exl2jax.__file__
write_tiny_llama(Path("tiny"))
PYTHON
exl2jax convert -i tiny -o work -cf exl2 -b 4 -r 4 -mr 2 -l 32 -c standard --preset fast
exl2jax verify exl2
