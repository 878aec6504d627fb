"""Write the states and weights that this package finds in an EXL2 directory, for a process without JAX.

    python -m scripts.gpu.ours RESULT.npz EXL2 ROWS.safetensors

`states [modules + 1, T, D]` are the hidden states of the first row after the embedding and after every module, and
`modules` are their names. `linears` are the names of all linears, `columns` their columns, `digests` the digests of
their weights.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from exl2jax.evaluation.logits import walk
from exl2jax.models import head_spec, load_exl2, module_specs
from exl2jax.stream.forward import embed
from scripts.gpu.stock import digest


def found_in(directory: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that the file holds; `ids [1, T]`."""
    model = load_exl2(directory)
    linears = [*(x for spec in module_specs(model.config) for x in spec.linears), head_spec(model.config)]
    names, states = ["embedding"], [embed(model, ids)[0]]
    for spec, after in walk(model, ids):
        names.append(spec.key)
        states.append(after[0].copy())  # the next module overwrites it
    return {
        "modules": np.array(names),
        "states": np.stack(states),
        "linears": np.array([x.key for x in linears]),
        "columns": np.array([x.columns for x in linears]),
        "digests": np.array([digest(model.kernel(x), x.key) for x in linears]),
    }


def main(arguments: Sequence[str]) -> int:
    """Write the file."""
    result, directory, rows = map(Path, arguments)
    np.savez(result, allow_pickle=False, **found_in(directory, load_file(rows)["input_ids"][:1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
