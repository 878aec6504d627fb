"""Launching a Mosaic GPU kernel, compiled or interpreted."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from exl2jax.pallas.tiles import LANES, Tiles

COLUMN = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
"""A value for each of a program's columns, one to a thread; loads come so, constants must be told."""


def launch(
    body: Callable[..., None], out_type: Any, grid: Mapping[str, int], tiles: Tiles, scratch: tuple[Any, ...] = ()
) -> Callable[..., Any]:
    """The kernel with `body` over a grid of named axes; interpreted on any platform where `tiles` asks for it.

    `Lane` semantics lower in a tenth of the time that the default takes, to the same code.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if tiles.interpret else False,
    )


def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of an output."""
    return jax.ShapeDtypeStruct(dims, dtype)


def zeros(dtype: Any, tiles: Tiles) -> jax.Array:
    """A zero for each column of a program."""
    value = jnp.zeros((LANES,), dtype)
    return value if tiles.interpret else plgpu.layout_cast(value, COLUMN)
