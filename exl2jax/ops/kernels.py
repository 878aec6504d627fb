"""The three inner loops that another room may replace by kernels of its own, with their contracts."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from exl2jax.ops.bitstream import pack_codes
from exl2jax.ops.scale_losses import ScaleLosses, scale_losses
from exl2jax.ops.walk import walk_group


class Kernels(NamedTuple):
    """Functions with the contracts of the three in `exl2jax.ops`; hashable, so that they can be static under `jit`."""

    scale_losses: ScaleLosses
    walk_group: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    pack_codes: Callable[..., jax.Array]


XLA = Kernels(scale_losses, walk_group, pack_codes)
"""The implementation of this room, on every platform."""
