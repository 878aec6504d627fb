"""A scale search of one's own: `exl2jax convert ... --plugin scale_search.py --variant scales=shrunk:share=0.95`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from exl2jax.ops import ScaleChoice, half_scale
from exl2jax.variants import variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where the largest weight of a column lies, as a share of the code's range."""

    share: float = 0.9


@variant("scales", "shrunk", Settings)
def shrunk(w: jax.Array, bits: jax.Array, importance: jax.Array, settings: Settings) -> ScaleChoice:
    """No search: the full scale of a column is `share` of its largest weight (a baseline, no source)."""
    scale = (jnp.max(jnp.abs(w), axis=0) + 1e-12) / ((jnp.exp2(bits) - 1) / 2)
    qs = jnp.clip(jnp.round(jnp.sqrt(scale / jnp.max(scale)) * 16), 1, 16)
    qscale_max = (jnp.max(scale) * settings.share).astype(jnp.float16)
    return ScaleChoice(qs.astype(jnp.uint8), qscale_max, half_scale(qscale_max, qs), jnp.float32(settings.share))
