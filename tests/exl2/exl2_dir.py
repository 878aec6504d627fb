"""A tiny valid EXL2 directory, and the means to damage it.

The linears hold random codes and scales, packed by the oracle: nothing of the package takes part in what it must judge.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from exl2jax.testing.tiny_model import write_tiny_llama
from tests.oracles.packing import pack_codes, pack_scales

HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 128, 256, 64, 300, 2
PADDED_VOCABULARY = 320

Layout = tuple[tuple[int, int], ...]
"""Groups of a linear as `(bits, rows)`."""

_ATTENTION: Layout = ((4, 32), (3, 32), (3, 32), (3, 32))
_WIDE: Layout = ((5, 64), (4, 64))

LINEARS: dict[str, tuple[int, int, Layout]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN, _ATTENTION),
    "self_attn.k_proj": (HIDDEN, KEYS, _ATTENTION),
    "self_attn.v_proj": (HIDDEN, KEYS, _ATTENTION),
    "self_attn.o_proj": (HIDDEN, HIDDEN, _ATTENTION),
    "mlp.gate_proj": (HIDDEN, INNER, _WIDE),
    "mlp.up_proj": (HIDDEN, INNER, _WIDE),
    "mlp.down_proj": (INNER, HIDDEN, ((8, 32), (4, 128), (4, 96))),
}
"""Rows, columns and groups of each linear of a layer; a full, a short and a 96-row last group are among them."""

HEAD_LAYOUT: Layout = ((6, 32), (4, 32), (4, 32), (4, 32))

QUANTIZATION_CONFIG = {
    "quant_method": "exl2",
    "version": "0.3.2",
    "bits": 4.6,
    "head_bits": 4,
    "calibration": {"rows": 115, "length": 2048, "dataset": "(default)"},
}

SHARDS = ("output-00001-of-00002.safetensors", "output-00002-of-00002.safetensors")


def write_tiny_exl2(path: Path, seed: int = 0) -> Path:
    """Write the directory: two layers, biases on q, k, v, o, a padded head, every linear spread over two files."""
    write_tiny_llama(
        path,
        seed=seed,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        attention_bias=True,
        extra_config={"quantization_config": QUANTIZATION_CONFIG},
    )
    source = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    rng = np.random.default_rng(seed)
    tensors = {name: tensor for name, tensor in source.items() if "_proj.weight" not in name}
    for layer in range(LAYERS):
        for name, (rows, columns, layout) in LINEARS.items():
            tensors |= random_linear(rng, f"model.layers.{layer}.{name}", rows, columns, layout)
    tensors |= random_linear(rng, "lm_head", HIDDEN, VOCABULARY, HEAD_LAYOUT)
    names = list(tensors)
    for i, shard in enumerate(SHARDS):
        save_file({name: tensors[name] for name in names[i :: len(SHARDS)]}, path / shard, metadata={"format": "pt"})
    return path


def random_linear(rng: np.random.Generator, key: str, rows: int, columns: int, layout: Layout) -> dict[str, np.ndarray]:
    """The five tensors of a linear with random codes, scales and permutation, columns padded as the format wants."""
    padded = -(-columns // 32) * 32
    words, table = [], []
    for bits, size in layout:
        codes = np.full((size, padded), 2 ** (bits - 1))
        codes[:, :columns] = rng.integers(0, 2**bits, (size, columns))
        table += [bits, sum(len(part) for part in words)]
        words.append(pack_codes(codes, bits))
    scales = np.ones((len(layout), padded), np.int64)
    scales[:, :columns] = rng.integers(1, 17, (len(layout), columns))
    return {
        f"{key}.q_weight": np.concatenate(words),
        f"{key}.q_scale": pack_scales(scales),
        f"{key}.q_scale_max": rng.uniform(0.2, 0.8, len(layout)).astype(np.float16),
        f"{key}.q_groups": np.asarray(table, np.int16),
        f"{key}.q_invperm": rng.permutation(rows).astype(np.int32),
    }


def shard_of(directory: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return next(directory / shard for shard in SHARDS if name in load_file(directory / shard))


def edit_tensors(directory: Path, changes: Mapping[str, Callable[[np.ndarray], np.ndarray] | None]) -> None:
    """Replace tensors by what the functions make of copies of them; None takes a tensor out."""
    for name, change in changes.items():
        path = shard_of(directory, name)
        tensors = load_file(path)
        old = tensors.pop(name).copy()
        if change is not None:
            tensors[name] = np.ascontiguousarray(change(old))
        save_file(tensors, path, metadata={"format": "pt"})


def add_tensors(directory: Path, file: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Add tensors to a file of the directory, which is made where there is none."""
    path = directory / file
    known = load_file(path) if path.exists() else {}
    save_file({**known, **tensors}, path, metadata={"format": "pt"})


def edit_config(directory: Path, changes: Mapping[str, Any]) -> None:
    """Lay values over `config.json`; keys with a dot reach into objects, `...` takes an entry out."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        record = config
        for parent in parents:
            record = record[parent]
        if value is ...:
            del record[last]
        else:
            record[last] = value
    path.write_text(json.dumps(config))
