"""Dampings that follow the Hessian instead of a fixed share of its mean."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from exl2jax.ops.hessian import MIN_DAMPING
from exl2jax.variants import variant


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareSettings:
    """Share of the mean diagonal."""

    share: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what is no damping."""
        if not self.share > 0:
            raise ValueError("share must be positive")


@variant("damping", "growing", ShareSettings)
def growing(h: jax.Array, settings: ShareSettings) -> tuple[jax.Array, float]:
    """A small share of the mean diagonal, tenfold at each failure (0.01 is GPTQ's own default).

    Measured: 0.565 and 0.333 where `best` had 0.490 and 0.309.
    """
    return jnp.maximum(settings.share * jnp.mean(jnp.diagonal(h)), MIN_DAMPING), 10.0


@variant("damping", "eigenvalue", ShareSettings)
def eigenvalue(h: jax.Array, settings: ShareSettings) -> tuple[jax.Array, float]:
    """Damping that lifts the smallest eigenvalue to a share of the mean one; good Hessians stay as they are.

    Measured: nothing yet on a whole model.
    """
    mean = jnp.mean(jnp.diagonal(h))
    smallest = jnp.linalg.eigvalsh(h)[0]
    return jnp.maximum(settings.share * mean - smallest, MIN_DAMPING * jnp.maximum(mean, 1e-3)), 2.0
