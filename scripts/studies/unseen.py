#!/usr/bin/env python3
"""Measure what quantized linears cost on rows that their Hessians have not seen, with and without feedback.

    python -m scripts.studies.unseen --layers 8 20

Half of the rows give the Hessians of inputs and the gradients at the outputs; the other half judges. The cost of an
error `E` of a linear's weights is the mean over tokens of `(x^T E g)^2`, with `x` the token's input and `g` the
gradient at its outputs under a sampled label: twice the expected divergence, with no assumption about how the two go
together. Prints the cost under every shrinkage of the correlations over the cost without feedback between columns, on
both halves.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from exl2jax.measure.fisher import head_gradients, pulled
from exl2jax.models import LinearSpec, Model, Module, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.ops import WalkOptions, factorize, gptq_arrays, group_table, search_columns
from exl2jax.ops.columns import column_feedback
from exl2jax.qparams import q
from exl2jax.quantize.outputs import OutputGradients
from exl2jax.stream.forward import embed, forward_chunk
from exl2jax.stream.token_classes import CLASSES, class_weights, ordinary_tokens, token_classes

SETTING = q("3", "1", "64")
SHRINKAGES = (0.2, 0.4, 0.7)


class Tokens(NamedTuple):
    """Inputs `x [R, T, K]`, gradients `g [R, T, N]`, the kernel, class and kind of every token `[R, T]`."""

    x: np.ndarray
    g: np.ndarray
    kernel: np.ndarray
    classes: np.ndarray
    ordinary: np.ndarray


def gather(model: Model, ids: np.ndarray, layers: Sequence[int], seed: int) -> Iterator[tuple[LinearSpec, Tokens]]:
    """The tokens of every linear of some layers, the last layer first."""
    decoder, specs = build_decoder(model.config), module_specs(model.config)
    states, inputs = np.asarray(embed(model, ids, seed)), list[np.ndarray]()
    for spec in specs:
        inputs.append(states)
        module, params = decoder.module(spec), model.module_params(spec)
        states = np.concatenate([np.asarray(forward_chunk(module, params, states[r : r + 1])) for r in range(len(ids))])
    mask = np.ones(ids.shape, np.float32)
    back = head_gradients(decoder, model.head_params(), states, mask, seed=seed)
    for spec, h in zip(specs[::-1], inputs[::-1], strict=True):
        if spec.layer < min(layers):
            return
        module, params = decoder.module(spec), model.module_params(spec)
        columns = tuple((linear.name, linear.columns) for linear in spec.linears)
        rows = [_pulled(params, h[r : r + 1], back[r : r + 1], module, columns) for r in range(len(ids))]
        back = np.concatenate([np.asarray(moved) for moved, _ in rows])
        if spec.layer in layers:
            felt = {name: np.concatenate([np.asarray(found[name]) for _, found in rows]) for name, _ in columns}
            yield from _linears(module, spec, params, felt, h, mask)


_pulled = jax.jit(pulled, static_argnames=("module", "columns"))


@partial(jax.jit, static_argnames="module")
def _inputs(module: Module, params: Any, h: jax.Array) -> list[jax.Array]:
    return [x for stage in module.forward(params, h).inputs for x in stage]


def _linears(
    module: Module, spec: ModuleSpec, params: Any, felt: dict[str, np.ndarray], h: np.ndarray, mask: np.ndarray
) -> Iterator[tuple[LinearSpec, Tokens]]:
    """The tokens of the linears of a module."""
    rows = [_inputs(module, params, h[r : r + 1]) for r in range(len(h))]
    operands = jnp.asarray(h), jnp.asarray(mask)
    kinds = np.asarray(token_classes(*operands)), np.asarray(ordinary_tokens(*operands))
    for i, group in enumerate(spec.groups):
        x = np.concatenate([np.asarray(row[i]) for row in rows])
        for linear in group:
            kernel = np.asarray(params[linear.name]["kernel"], np.float32)
            yield linear, Tokens(x, felt[linear.name], kernel, *kinds)


def costs(tokens: Tokens, shrinkages: Sequence[float | None]) -> list[tuple[float, float]]:
    """The cost under each shrinkage (None: no feedback between columns), on the rows of the Hessians and on others."""
    own = np.arange(len(tokens.x)) % 2 == 0
    x, g, classes = tokens.x[own], tokens.g[own], tokens.classes[own]
    squares = np.stack([np.square(g[classes == c]).sum(axis=0, dtype=np.float64) for c in range(CLASSES)])
    weights = class_weights([squares], np.bincount(classes.reshape(-1), minlength=CLASSES))
    weighed = (x * weights[classes][..., None] ** 0.25).reshape(-1, x.shape[-1]).astype(np.float32)
    factor = factorize(weighed.T @ weighed / len(x))
    kept = OutputGradients.of((g * tokens.ordinary[own][..., None]).reshape(-1, g.shape[-1])).padded
    table = group_table(SETTING.groups(len(tokens.kernel)), len(tokens.kernel))
    found = []
    for shrinkage in shrinkages:
        columns = None if shrinkage is None else column_feedback(*kept, shrinkage)
        done = gptq_arrays(tokens.kernel, factor, table, columns, options=WalkOptions(search_columns))
        error = np.asarray(done.weight, np.float32) - tokens.kernel
        felt = np.asarray(
            [np.mean(np.square(((x @ error) * g).sum(-1))) for x, g in zip(tokens.x, tokens.g, strict=True)]
        )
        found.append((float(felt[own].mean()), float(felt[~own].mean())))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="source model")
    parser.add_argument("--tokens", default="../shared/data/golden/cal_quant_512.safetensors", help="token rows")
    parser.add_argument("--rows", type=int, default=48, help="rows, one half for the Hessians and one to judge by")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 20], help="layers to measure")
    given = parser.parse_args(argv)
    ids = load_file(given.tokens)["input_ids"].astype(np.int32)
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, given.rows).round().astype(int))]
    print(f"| linear | without, own and unseen rows | {' | '.join(f'shrunk by {s}' for s in SHRINKAGES)} |")
    print("|---" * (len(SHRINKAGES) + 2) + "|")
    for linear, tokens in gather(open_model(given.model), ids, given.layers, seed=0):
        (own, unseen), *rest = costs(tokens, (None, *SHRINKAGES))
        ratios = " | ".join(f"{a / own:.2f}, {b / unseen:.2f}" for a, b in rest)
        print(f"| {linear.key} | {own:.2e}, {unseen:.2e} | {ratios} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
