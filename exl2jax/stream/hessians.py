"""A pass over all rows that accumulates the Hessian of every group of linears of a module."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, ModuleSpec
from exl2jax.ops import accumulate_hessian
from exl2jax.stream.chunks import full_mask, row_chunks
from exl2jax.stream.devices import on_all_devices, on_one_device
from exl2jax.stream.token_classes import token_factors


class Collected(NamedTuple):
    """Result of a pass over all rows: new states, and for each group of linears its Hessian `X^T X / R` and the number
    of tokens that went into it.
    """  # noqa: D205

    states: np.ndarray
    hessians: list[jax.Array]
    tokens: list[int]


def collect(
    decoder: Decoder,
    spec: ModuleSpec,
    params: Any,
    states: np.ndarray,
    mask: np.ndarray | None,
    *,
    routed_only: bool = True,
    tables: np.ndarray | None = None,
) -> Collected:
    """Run a module over all rows, accumulating the Hessians of all its groups of linears.

    `mask [R, T]` is zero where a token is padding; such tokens leave no trace in the Hessians. Those of an expert come
    from the tokens routed to it, or from all unless `routed_only`; an expert that no token reached gets the identity.
    `tables [groups, CLASSES]` weigh the tokens of the Hessians (`exl2jax.stream.token_classes`).
    """
    mask, (params, tables) = full_mask(states, mask), on_all_devices((params, tables))
    out = np.empty_like(states)
    sums = on_all_devices(_zeros(spec))
    for chunk in row_chunks(states):
        h, m = chunk.take(states), chunk.take(mask)
        hidden, inputs, weights, factors = _trace_chunk(decoder, spec.kind, routed_only, params, tables, h, m)
        sums = _add_chunk(sums, inputs, weights, factors)
        chunk.put(out, hidden)
    sums = on_one_device(sums)
    tokens = [round(float(n)) for n in sums.tokens]
    hessians = [or_identity(h / len(states), n) for h, n in zip(sums.hessians, tokens, strict=True)]
    return Collected(out, hessians, tokens)


class Sums(NamedTuple):
    """Sums over the rows so far: `X^T X` and the number of tokens, for each group."""

    hessians: list[jax.Array]
    tokens: list[jax.Array]


def or_identity(hessian: jax.Array, tokens: int) -> jax.Array:
    """The Hessian, or the identity where no token went into it."""
    return hessian if tokens else jnp.eye(hessian.shape[0], dtype=hessian.dtype)


def group_weights(routed: jax.Array | None, groups: int, mask: jax.Array) -> list[jax.Array]:
    """The weight of each token for each group, `[B, T]`: groups are experts in order, once per stage."""
    if routed is None:
        return [mask] * groups
    experts = routed.shape[-1]
    return [mask * routed[..., g % experts] for g in range(groups)]


def _zeros(spec: ModuleSpec) -> Sums:
    sizes = [group[0].rows for group in spec.groups]
    return Sums([jnp.zeros((k, k), jnp.float32) for k in sizes], [jnp.float32(0) for _ in sizes])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _trace_chunk(
    decoder: Decoder,
    kind: str,
    routed_only: bool,
    params: Any,
    tables: jax.Array | None,
    h: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array], list[jax.Array]]:
    """A chunk's new hidden states, what each group of linears read, which tokens reach it and their factors."""
    trace = decoder.forward(kind, params, h)
    inputs = [x for stage in trace.inputs for x in stage]
    weights = group_weights(decoder.routed(kind, params, h) if routed_only else None, len(inputs), mask)
    return trace.hidden, inputs, weights, token_factors(weights, tables, h, mask)


@partial(jax.jit, donate_argnums=0)
def _add_chunk(sums: Sums, inputs: list[jax.Array], weights: list[jax.Array], factors: list[jax.Array]) -> Sums:
    """The sums with a chunk's added; compiled apart from the forward pass, of which XLA would repeat parts here."""
    hessians = [
        accumulate_hessian(total, x * factor[:, :, None])
        for total, x, factor in zip(sums.hessians, inputs, factors, strict=True)
    ]
    return Sums(hessians, [total + jnp.sum(weight) for total, weight in zip(sums.tokens, weights, strict=True)])
