"""A pass over all rows that accumulates the Hessian of every group of linears of a module."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Module, ModuleSpec
from exl2jax.ops import accumulate_hessian
from exl2jax.stream.chunks import Chunk
from exl2jax.stream.devices import on_all_devices, on_one_device
from exl2jax.stream.forward import START, Tally
from exl2jax.stream.streams import Rows, Stream, fold
from exl2jax.stream.token_classes import token_factors


class Sums(NamedTuple):
    """Sums over the rows so far: `X^T X` and the number of tokens, for each group, and the tally of the outputs."""

    hessians: list[jax.Array]
    tokens: list[jax.Array]
    tally: Tally


class Collected(NamedTuple):
    """Hessians `X^T X / R` of all groups of linears, the tokens that went into each, and the tally of the outputs."""

    hessians: list[jax.Array]
    tokens: list[jax.Array]
    tally: Tally


def collect(
    module: Module,
    spec: ModuleSpec,
    params: Any,
    rows: Rows,
    states: Stream,
    into: Stream,
    *,
    routed_only: bool = True,
    tables: np.ndarray | None = None,
) -> Collected:
    """Run a module over all rows, the outputs `into` a stream, accumulating the Hessians of its groups of linears.

    Padding leaves no trace in the Hessians. Those of an expert come from the tokens routed to it, or from all unless
    `routed_only`; an expert that no token reached gets the identity. `tables [groups, CLASSES]` weigh the tokens of the
    Hessians (`exl2jax.stream.token_classes`).
    """
    params, tables = on_all_devices((params, tables))
    sums = on_all_devices(_zeros(tuple(group[0].rows for group in spec.groups)))

    def program(sums: Sums, h: jax.Array, mask: jax.Array) -> tuple[Sums, tuple[jax.Array]]:
        hidden, *traced = _trace_chunk(module, routed_only, params, tables, Chunk(h, mask))
        return _add_chunk(sums, hidden, *traced), (hidden,)

    sums = on_one_device(fold(program, sums, (states, rows.mask), (into,)))
    return Collected(_means(sums.hessians, sums.tokens, np.float32(rows.mask.count)), sums.tokens, sums.tally)


def or_identity(hessian: jax.Array, tokens: jax.Array) -> jax.Array:
    """The Hessian, or the identity where no token went into it."""
    return jnp.where(tokens > 0, hessian, jnp.eye(hessian.shape[0], dtype=hessian.dtype))


def group_weights(routed: jax.Array | None, groups: int, mask: jax.Array) -> list[jax.Array]:
    """The weight of each token for each group, `[B, T]`: groups are experts in order, once per stage."""
    if routed is None:
        return [mask] * groups
    experts = routed.shape[-1]
    return [mask * routed[..., g % experts] for g in range(groups)]


@partial(jax.jit, static_argnames="sizes")
def _zeros(sizes: tuple[int, ...]) -> Sums:
    zeros = [jnp.zeros((k, k), jnp.float32) for k in sizes]
    return Sums(zeros, [jnp.zeros((), jnp.float32) for _ in sizes], jax.tree.map(jnp.asarray, START))


@partial(jax.jit, donate_argnames="hessians")
def _means(hessians: list[jax.Array], tokens: list[jax.Array], rows: jax.Array) -> list[jax.Array]:
    """Hessians from sums; `rows` is data, since a division by a constant would be another one."""
    return [or_identity(h / rows, n) for h, n in zip(hessians, tokens, strict=True)]


@partial(jax.jit, static_argnames=("module", "routed_only"))
def _trace_chunk(
    module: Module, routed_only: bool, params: Any, tables: jax.Array | None, chunk: Chunk
) -> tuple[jax.Array, list[jax.Array], list[jax.Array], list[jax.Array]]:
    """A chunk's new hidden states, the input of each group of linears, which tokens reach it and their factors."""
    trace = module.forward(params, chunk.states)
    inputs = [x for stage in trace.inputs for x in stage]
    routed = module.routed(params, chunk.states) if routed_only else None
    weights = group_weights(routed, len(inputs), chunk.mask)
    return trace.hidden, inputs, weights, token_factors(weights, tables, chunk.states, chunk.mask)


@partial(jax.jit, donate_argnames="sums")
def _add_chunk(
    sums: Sums, hidden: jax.Array, inputs: list[jax.Array], weights: list[jax.Array], factors: list[jax.Array]
) -> Sums:
    """The sums with a chunk's added; compiled apart from the forward pass, since XLA would repeat parts of it here."""
    hessians = [
        accumulate_hessian(total, x * factor[:, :, None])
        for total, x, factor in zip(sums.hessians, inputs, factors, strict=True)
    ]
    tokens = [total + jnp.sum(weight) for total, weight in zip(sums.tokens, weights, strict=True)]
    return Sums(hessians, tokens, sums.tally.with_states(hidden))
