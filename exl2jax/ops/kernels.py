"""The inner loops that another room may replace by kernels of its own, with their contracts."""

from typing import NamedTuple, Protocol

import jax

from exl2jax.ops.bitstream import pack_tiles
from exl2jax.ops.groups import Begin
from exl2jax.ops.scale_losses import IndexLosses, ScaleLosses, index_losses, scale_losses
from exl2jax.ops.walk import walk_group

BLOCKS = 32
"""Most blocks of columns by default: within one there is no feedback, so that a row takes few steps."""

PANEL = 1024
"""Rows of a panel on a GPU: enough for large products between panels, little enough to waste few within one."""


class WalkGroup(Protocol):
    """The contract of `walk_group`, for other implementations."""

    def __call__(
        self,
        w: jax.Array,
        u: jax.Array,
        begin: Begin,
        scale: jax.Array,
        bits: jax.Array,
        rows: jax.Array | None = None,
        shift: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Scaled errors and codes of the group `w [size, N]`, which begins at row `begin.row` of `u`."""
        ...


class PackTiles(Protocol):
    """The contract of `pack_tiles`, for other implementations."""

    def __call__(self, codes: jax.Array, bits: jax.Array) -> jax.Array:
        """Words `[K / 32, 8, N]` of `codes [K, N]` at the width of each tile."""
        ...


class Kernels(NamedTuple):
    """Functions with the contracts of those in `exl2jax.ops`; hashable, so that they can be static under `jit`.

    `panel` is set where a few wide steps are faster than many narrow ones, as on a GPU: copies of a matrix then go side
    by side, nothing branches, and the errors of so many rows reach the rows after them in one product. Feedback between
    columns goes in at most so many `blocks` of them, each of which walks the rows by itself.
    """

    scale_losses: ScaleLosses
    index_losses: IndexLosses
    walk_group: WalkGroup
    pack_tiles: PackTiles
    panel: int | None = None
    blocks: int = BLOCKS


XLA = Kernels(scale_losses, index_losses, walk_group, pack_tiles)
"""The implementation of this room for processors; it runs on every platform."""
