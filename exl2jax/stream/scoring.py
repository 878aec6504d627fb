"""Scores of a model's predictions on token rows: likelihood, divergence from a reference, agreement."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder
from exl2jax.stream.chunks import token_spans
from exl2jax.stream.devices import on_all_devices
from exl2jax.stream.streams import Stream, fold, read, whole


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

    `reference` is `(head params, states)` of the model to compare with. Tokens go in chunks, one at a time, so that
    few logits are held whatever the rows' length and the vocabulary.
    """
    vocab, width = params["lm_head"]["kernel"].shape[1], states.shape[-1]
    tokens, following = states.reshape(-1, width), np.roll(input_ids, -1, axis=1).reshape(-1)
    spans = token_spans(len(tokens), vocab)
    program, arrays = partial(_nll, decoder, on_all_devices(jax.device_put(params))), [tokens, following]
    if reference is not None:
        program = partial(_compare, decoder, program.args[1], on_all_devices(jax.device_put(reference[0])))
        arrays.append(reference[1].reshape(-1, width))
    columns = [Stream.empty(spans, (), resident=True) for _ in range(1 if reference is None else 3)]
    fold(program, None, [Stream.of(array, spans, resident=False) for array in arrays], columns)
    found = [whole(spans, parts) for parts in read([column.parts() for column in columns])]
    scores = np.stack(found).reshape(-1, *input_ids.shape)[:, :, :-1]
    return Scores(scores[0], *(scores[1:] if reference is not None else (None, None)))


def perplexity(nll: np.ndarray, mask: np.ndarray | None = None) -> float:
    """`exp` of the mean negative log likelihood `[R, T - 1]`; `mask [R, T]` leaves padding out."""
    weight = np.ones(nll.shape) if mask is None else mask[:, 1:].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return float(np.exp(np.sum(nll * weight, dtype=np.float64) / np.sum(weight)))


@partial(jax.jit, static_argnames="decoder")
def log_probabilities(decoder: Decoder, params: Any, h: jax.Array) -> jax.Array:
    """Of the next token after each of final states `[N, D]`: `[N, vocab]`."""
    return jax.nn.log_softmax(decoder.logits(params, h[None])[0], axis=-1)


def divergence(log_ref: jax.Array, log_p: jax.Array) -> jax.Array:
    """KL(ref || p) `[N]` in nats, from log probabilities `[N, vocab]`."""
    return jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)


def _picked(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p, ids[:, None], axis=-1)[:, 0]


@partial(jax.jit, static_argnames="decoder")
def _nll(decoder: Decoder, params: Any, total: None, h: jax.Array, ids: jax.Array) -> tuple[None, tuple[jax.Array]]:
    return total, (_picked(log_probabilities(decoder, params, h), ids),)


@partial(jax.jit, static_argnames="decoder")
def _compare(
    decoder: Decoder, params: Any, ref_params: Any, total: None, h: jax.Array, ids: jax.Array, ref_h: jax.Array
) -> tuple[None, tuple[jax.Array, jax.Array, jax.Array]]:
    log_p = log_probabilities(decoder, params, h)
    log_ref = log_probabilities(decoder, ref_params, ref_h)
    kl = divergence(log_ref, log_p)
    agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_ref, axis=-1)
    return total, (_picked(log_p, ids), kl, agree.astype(jnp.float32))
