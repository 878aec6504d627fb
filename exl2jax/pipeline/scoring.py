"""Scores of a model's predictions on token rows: likelihood, divergence from a reference, agreement."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder
from exl2jax.pipeline.stream import Chunk


class Scores(NamedTuple):
    """Per token, `[R, T - 1]` float32: negative log likelihood, and where a reference was given, KL(ref || model) in
    nats and whether both agree on the likeliest token.
    """  # noqa: D205

    nll: np.ndarray
    kl: np.ndarray | None
    agree: np.ndarray | None


def score(
    decoder: Decoder,
    params: Any,
    states: np.ndarray,
    input_ids: np.ndarray,
    reference: tuple[Any, np.ndarray] | None = None,
) -> Scores:
    """Score final hidden `states [R, T, D]` against the next token of each position; the first one is not predicted.

    `reference` is `(head params, states)` of the model to compare with. Rows go one by one, so that only a row's
    logits are held.
    """
    rows = [Chunk(i, i + 1, 1) for i in range(len(states))]
    parts = []
    for row in rows:
        ids = row.take(input_ids)
        if reference is None:
            parts.append((_nll(decoder, params, row.take(states), ids),))
        else:
            ref_params, ref_states = reference
            parts.append(_compare(decoder, params, row.take(states), ids, ref_params, row.take(ref_states)))
    columns = [np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(len(parts[0]))]
    return Scores(columns[0], *(columns[1:] if len(columns) > 1 else (None, None)))


def perplexity(nll: np.ndarray, mask: np.ndarray | None = None) -> float:
    """`exp` of the mean negative log likelihood `[R, T - 1]`; `mask [R, T]` leaves padding out."""
    weight = np.ones(nll.shape) if mask is None else mask[:, 1:].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return float(np.exp(np.sum(nll * weight, dtype=np.float64) / np.sum(weight)))


def _log_probabilities(decoder: Decoder, params: Any, h: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(decoder.logits(params, h)[:, :-1], axis=-1)


def _picked(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]


@partial(jax.jit, static_argnums=0)
def _nll(decoder: Decoder, params: Any, h: jax.Array, ids: jax.Array) -> jax.Array:
    return _picked(_log_probabilities(decoder, params, h), ids)


@partial(jax.jit, static_argnums=0)
def _compare(
    decoder: Decoder, params: Any, h: jax.Array, ids: jax.Array, ref_params: Any, ref_h: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    log_p = _log_probabilities(decoder, params, h)
    log_ref = _log_probabilities(decoder, ref_params, ref_h)
    kl = jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)
    agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_ref, axis=-1)
    return _picked(log_p, ids), kl, agree.astype(jnp.float32)
