"""Scale searches of a group `w [rows, N]`: one 4-bit index per column, one maximum per group."""

import jax

from exl2jax.ops import search_columns, search_scales
from exl2jax.ops.scales import GroupContext, ScaleChoice
from exl2jax.variants.registry import NoSettings, variant


@variant("scales", "stock")
def stock(w: jax.Array, bits: jax.Array, importance: jax.Array, settings: NoSettings) -> ScaleChoice:
    """97 multipliers from 0.7 to 1.2, power 3.5, as stock ExLlamaV2 does (docs/format.md 2.6)."""
    return search_scales(w, bits)


@variant("scales", "columns")
def columns(w: jax.Array, bits: jax.Array, importance: jax.Array, settings: NoSettings) -> ScaleChoice:
    """Least squared error with an index for every column, rows weighted by what their error costs, `1 / U_ii^2`
    (least-squares clipping as in OMSE, arXiv:1902.06822, within EXL2's indices).
    """  # noqa: D205
    return search_columns(w, bits, GroupContext(importance))
