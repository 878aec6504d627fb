"""The weight of each token: classes of tokens by their place and loudness, with a weight for each.

An error does not change the predictions alike at all tokens. The first token of a row is an attention sink: heads that
look for nothing attend to it, so that the squared gradients of its keys and values are hundreds to thousands of times
those of other tokens. Its state soon grows a hundred times louder than theirs, and small additions to it no longer
matter. Gradients are known for the few rows of the backward pass only, the class of a token is known everywhere. A
Hessian therefore weighs each token by the mean squared gradient of its class (`sum_t w_t x_t x_t^T`).
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models.modules import LinearGroup, LinearSpec

PLACES = (1, 2, 8, 32)
"""Places in a row at which the classes after the first one begin."""

LOUD = 4.0
"""A token is loud where the norm of its state is more than so many times the row's median."""

CLASSES = 2 * (len(PLACES) + 1)
"""Quiet tokens by place, then loud ones."""

LEAST = 1e-6
"""Floor of a weight, as a share of the mean."""

TOKENS = ".token_weights"
"""Suffix of the name of a linear's weights of classes, which are kept beside those of its columns."""


def token_classes(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Class of each token `[B, T]` int32, from a module's full-precision input `[B, T, D]` and `mask [B, T]`."""
    norms = jnp.linalg.norm(states, axis=-1)
    typical = jnp.nanmedian(jnp.where(mask > 0, norms, jnp.nan), axis=-1, keepdims=True)
    place = jnp.searchsorted(jnp.asarray(PLACES), jnp.arange(states.shape[1]), side="right")
    return jnp.where(norms > LOUD * typical, place + len(PLACES) + 1, place)


def ordinary_tokens(states: jax.Array, mask: jax.Array) -> jax.Array:
    """1 for quiet tokens from the eighth place on `[B, T]`, 0 for others and for padding; as `token_classes`."""
    classes = token_classes(states, mask)
    first = PLACES.index(8) + 1
    return jnp.where((classes >= first) & (classes <= len(PLACES)), mask, 0.0)


def squares_by_class(gradients: jax.Array, classes: jax.Array) -> jax.Array:
    """Sum of squares `[CLASSES, N]` of `gradients [B, T, N]` over the tokens of each class."""
    member = jax.nn.one_hot(classes, CLASSES)
    return jnp.einsum("btc,btn->cn", member, jnp.square(gradients), precision=jax.lax.Precision.HIGHEST)


def token_factors(
    weights: Sequence[jax.Array], tables: jax.Array | np.ndarray | None, states: jax.Array, mask: jax.Array
) -> list[jax.Array]:
    """Factors of a token's vectors, `[B, T]` for each group: roots of `tables [groups, CLASSES]`.

    `weights [B, T]`, 0 or 1, say which tokens reach a group; without tables they are the factors.
    """
    if tables is None:
        return list(weights)
    classes = token_classes(states, mask)
    return [weight * root[classes] for weight, root in zip(weights, jnp.sqrt(jnp.asarray(tables)), strict=True)]


def group_tables(groups: Sequence[LinearGroup], tables: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The weights of classes `[groups, CLASSES]` from those by key of a linear; None where there are none."""
    found = [tables.get(group[0].key) for group in groups]
    return np.stack([np.asarray(x, np.float32) for x in found if x is not None]) if found[0] is not None else None


def weights_beside(linears: Iterable[LinearSpec], known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of classes that stand beside columns in `known`, by key of a linear; none where there are none."""
    return {x.key: known[x.key + TOKENS] for x in linears if x.key + TOKENS in known}


def class_weights(squares: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Weights of the classes `[CLASSES]` for linears that share a Hessian, one in the mean over all tokens.

    `squares [CLASSES, N]` are those of `squares_by_class` for each linear, `counts [CLASSES]` the tokens. Each linear
    has the same say; a class without tokens weighs one.
    """
    shares = [s.sum(axis=1) for s in squares if s.any()]
    if not shares:
        return np.ones(CLASSES)
    seen = counts > 0
    means = [np.where(seen, s / np.maximum(counts, 1), 0) / (s.sum() / counts.sum()) for s in shares]
    weights = np.maximum(np.mean(means, axis=0), LEAST)
    return np.where(seen, weights * counts.sum() / (weights @ counts), 1.0)
