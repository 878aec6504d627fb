"""Orders of the rows other than by descending diagonal."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from exl2jax.qparams import ROW_MULTIPLE
from exl2jax.variants import NoSettings, variant


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """Rows that stay together."""

    rows: int = 32

    def __post_init__(self) -> None:
        """Refuse what does not tile a matrix."""
        if self.rows < ROW_MULTIPLE or self.rows % ROW_MULTIPLE:
            raise ValueError(f"rows must be a multiple of {ROW_MULTIPLE}")


@variant("order", "none")
def none(diagonal: jax.Array, settings: NoSettings) -> jax.Array:
    """Rows as they are (GPTQ, arXiv:2210.17323, section 3.3, "arbitrary order").

    Measured: 0.651 and 0.394 where `best` had 0.490 and 0.309.
    """
    return jnp.arange(diagonal.shape[0])


@variant("order", "group", GroupSettings)
def group(diagonal: jax.Array, settings: GroupSettings) -> jax.Array:
    """Blocks of rows by descending mean diagonal, rows within a block as they are: memory stays local.

    Measured: nothing yet on a whole model.
    """
    k, size = diagonal.shape[0], settings.rows
    blocks = -(-k // size)
    padded = jnp.pad(diagonal, (0, blocks * size - k))
    count = jnp.minimum(size, k - size * jnp.arange(blocks))
    means = padded.reshape(blocks, size).sum(axis=1) / count.astype(diagonal.dtype)
    # A short last block stays last, lest its padding fall among the rows.
    key = jnp.where(count < size, -jnp.inf, means)
    first = jnp.argsort(-key, stable=True) * size
    return (first[:, None] + jnp.arange(size)).reshape(-1)[:k]
