"""The package as a library: importing it changes nothing, and nothing reaches for the network."""

import subprocess
import sys

IMPORT = """
import logging, os, random, signal, socket, sys, threading, warnings
import numpy as np
import filelock, flax, jax, ml_dtypes, pyarrow, rich, safetensors, tokenizers, typer

def connect(*args, **kwargs):
    raise AssertionError("an import reaches for the network")

socket.socket.connect = connect

def state():
    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "threads": threading.active_count(),
        "root handlers": list(logging.root.handlers),
        "root level": logging.root.level,
        "our handlers": list(logging.getLogger("exl2jax").handlers),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook),
        "numpy random": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "numpy errors": np.geterr(),
        "recursion": sys.getrecursionlimit(),
        "warnings": list(warnings.filters),
        "jax": {n: jax.config._read(n) for n in ("jax_enable_x64", "jax_compilation_cache_dir",
            "jax_platforms", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_debug_nans")},
        "standard streams": (sys.stdin, sys.stdout, sys.stderr),
        "umask": (os.umask(0o22), os.umask(0o22))[0],
    }

before = state()
import exl2jax, exl2jax.cli, exl2jax.report, exl2jax.calibration, exl2jax.exl2.verify.directory
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
import jax._src.xla_bridge
assert not jax._src.xla_bridge._backends, "an import starts a backend"
"""


def test_an_import_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
