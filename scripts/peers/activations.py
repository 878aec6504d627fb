"""The mean square of every input of the decoder's linears over calibration rows: the importance matrix of llama.cpp."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from exl2jax.lab.meter import metered
from exl2jax.models import Module, build_decoder, module_specs, open_model
from exl2jax.stream.blocks import Block
from exl2jax.stream.forward import embed
from scripts.peers.layout import spread

CHUNK = 4
"""Rows that go through a module together."""


@partial(jax.jit, static_argnames="module")
def _squares(module: Module, params: Any, states: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    trace = module.forward(params, states)
    return trace.hidden, [jnp.mean(x * x, axis=(0, 1)) for stage in trace.inputs for x in stage]


def mean_squares(directory: Path, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Mean square `[columns]` float32 of the inputs of each linear, by its key."""
    model = open_model(directory)
    decoder = build_decoder(model.config)
    states = embed(model, input_ids)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(states), CHUNK)]
    found: dict[str, np.ndarray] = {}
    for spec in module_specs(model.config):
        (piece,) = Block.of(model, spec).pieces(decoder)
        totals = [np.zeros(group[0].rows) for group in spec.groups]
        for chunk in chunks:
            hidden, squares = _squares(piece.module, piece.params, states[chunk])
            totals = [t + len(states[chunk]) * np.asarray(s) for t, s in zip(totals, squares, strict=True)]
            states[chunk] = hidden
        for group, total in zip(spec.groups, totals, strict=True):
            found |= {linear.key: (total / len(states)).astype(np.float32) for linear in group}
    return found


def importance_file(model: Path, tokens: Path, rows: int, out: Path) -> float:
    """Write a vector per linear, by the linear's key, unless it is there; returns the CPU seconds that it took."""
    if not out.exists():
        ids = load_file(tokens)["input_ids"].astype(np.int32)
        with metered() as cost:
            found = mean_squares(model, ids[spread(len(ids), rows)])
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, out, {"cpu_seconds": str(cost.cpu_seconds)})
    with safe_open(out, "np") as file:
        return float(file.metadata()["cpu_seconds"])
