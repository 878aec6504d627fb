"""Launching a Mosaic GPU kernel, compiled or interpreted."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from exl2jax.pallas.tiles import Tiles


def launch(
    body: Callable[..., None], out_type: Any, grid: Mapping[str, int], tiles: Tiles, scratch: tuple[Any, ...] = ()
) -> Callable[..., Any]:
    """The kernel with `body` over a grid of named axes; interpreted on any platform where `tiles` asks for it."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        interpret=plgpu.InterpretGPUParams() if tiles.interpret else False,
    )


def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of an output."""
    return jax.ShapeDtypeStruct(dims, dtype)
