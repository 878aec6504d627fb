"""The three inner loops that another room may replace by kernels of its own, with their contracts."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from exl2jax.ops.bitstream import pack_codes
from exl2jax.ops.scales import GridLosses, grid_losses
from exl2jax.ops.walk import walk_group


class Kernels(NamedTuple):
    """Functions with the contracts of `grid_losses`, `walk_group` and `pack_codes`; hashable, so static under `jit`."""

    grid_losses: GridLosses
    walk_group: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    pack_codes: Callable[..., jax.Array]


XLA = Kernels(grid_losses, walk_group, pack_codes)
"""The implementation of this room, on every platform."""
