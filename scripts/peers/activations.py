"""The mean square of every input of the decoder's linears over calibration rows: the importance matrix of llama.cpp."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from exl2jax.lab.meter import metered
from exl2jax.models import build_decoder, module_specs, open_model
from exl2jax.stream.blocks import Block
from exl2jax.stream.forward import embed
from exl2jax.stream.hessians import collect
from exl2jax.stream.streams import Rows
from scripts.peers.layout import spread


def mean_squares(directory: Path, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Mean square `[columns]` float32 of the inputs of each linear, by its key."""
    model = open_model(directory)
    decoder = build_decoder(model.config)
    rows = Rows.of(np.ones(input_ids.shape), model.config.hidden_size)
    states = rows.place(embed(model, input_ids))
    found: dict[str, np.ndarray] = {}
    for spec in module_specs(model.config):
        (piece,) = Block.of(model, spec).pieces(decoder)
        hessians = collect(piece.module, spec, piece.params, rows, states, states).hessians
        for group, hessian in zip(spec.groups, hessians, strict=True):
            squares = np.asarray(jnp.diagonal(hessian)) / input_ids.shape[1]  # a Hessian is a mean over rows
            found |= {linear.key: squares for linear in group}
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
