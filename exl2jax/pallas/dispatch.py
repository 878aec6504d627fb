"""The one choice of an implementation for the inner loops."""

from functools import cache, partial
from typing import Any

import jax

from exl2jax.errors import SettingsError
from exl2jax.ops import XLA, Kernels
from exl2jax.ops.fused import FUSED
from exl2jax.ops.kernels import PANEL
from exl2jax.pallas.packing import pack_tiles
from exl2jax.pallas.scale_losses import index_losses, scale_losses
from exl2jax.pallas.tiles import Tiles
from exl2jax.pallas.walk import walk_group

LOOPS = {"xla": XLA, "fused": FUSED}
"""Implementations that XLA compiles; they run on every platform."""

IMPLEMENTATIONS = (*LOOPS, "pallas", "pallas_interpret")

MIN_COMPUTE_CAPABILITY = 9.0
"""Oldest CUDA devices that Mosaic GPU is made for (Hopper)."""


def choose_implementation(device: Any = None) -> str:
    """`pallas` on a CUDA device that Mosaic GPU is made for, `fused` on other GPUs, else `xla`."""
    device = device or jax.local_devices()[0]
    if _mosaic_device(device):
        return "pallas"
    return "fused" if device.platform == "gpu" else "xla"


def kernels_for(implementation: str | None = None) -> Kernels:
    """The inner loops by name, chosen by platform where there is none.

    Raises `SettingsError` for an unknown name, and `NotImplementedError` where compiled kernels are asked of a device
    that cannot run them: there is no silent fallback.
    """
    name = implementation or choose_implementation()
    if name not in IMPLEMENTATIONS:
        raise SettingsError(f"implementation is {name!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    if name in LOOPS:
        return LOOPS[name]
    if name == "pallas" and not _mosaic_device(jax.local_devices()[0]):
        raise NotImplementedError(
            f"implementation 'pallas' needs a CUDA device of compute capability {MIN_COMPUTE_CAPABILITY:g} or later, "
            f"this is {jax.local_devices()[0].device_kind}; take {choose_implementation()!r} or 'pallas_interpret'"
        )
    return pallas_kernels(Tiles(interpret=name == "pallas_interpret"))


@cache
def pallas_kernels(tiles: Tiles) -> Kernels:
    """The kernels under these tiles; the same object each time, so that it is a stable static argument."""
    return Kernels(
        partial(scale_losses, tiles=tiles),
        partial(index_losses, tiles=tiles),
        partial(walk_group, tiles=tiles),
        partial(pack_tiles, tiles=tiles),
        panel=PANEL,
    )


def _mosaic_device(device: Any) -> bool:
    """Whether Mosaic GPU kernels run on a device."""
    if device.platform != "gpu":
        return False
    try:
        return float(device.compute_capability) >= MIN_COMPUTE_CAPABILITY
    except (AttributeError, ValueError):  # ROCm devices name an architecture instead
        return False
