"""Pure, jit-able maths of EXL2: Hessians, scale search, GPTQ, half-exact rounding, packing and error measures.

Nothing here reads files, logs, or keeps state. The letters are the papers': `H` Hessian, `W` weight, `U` the upper
Cholesky factor of the inverse Hessian, `E` the scaled errors of GPTQ.
"""

from exl2jax.ops.bitstream import pack_codes, pack_tiles
from exl2jax.ops.error import proxy_loss, relative_frobenius
from exl2jax.ops.gptq import (
    QuantizedLinear,
    WalkOptions,
    dequantized_weight,
    gptq,
    gptq_arrays,
    gptq_tile_losses,
    round_to_nearest,
    walk_tile_losses,
)
from exl2jax.ops.groups import GroupTable, group_table
from exl2jax.ops.hessian import HessianFactor, accumulate_hessian, factorize, gram, solve
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.packing import PackedArrays, PackedLinear, pack_arrays, pack_linear, pack_scales, unpack_linear
from exl2jax.ops.products import Products, product, sum_over_tokens
from exl2jax.ops.rounding import dequantize, half_scale, quantize
from exl2jax.ops.scales import ScaleChoice, search_columns, search_scales

__all__ = [
    "XLA",
    "GroupTable",
    "HessianFactor",
    "Kernels",
    "PackedArrays",
    "PackedLinear",
    "Products",
    "QuantizedLinear",
    "ScaleChoice",
    "WalkOptions",
    "accumulate_hessian",
    "dequantize",
    "dequantized_weight",
    "factorize",
    "gptq",
    "gptq_arrays",
    "gptq_tile_losses",
    "gram",
    "group_table",
    "half_scale",
    "pack_arrays",
    "pack_codes",
    "pack_linear",
    "pack_scales",
    "pack_tiles",
    "product",
    "proxy_loss",
    "quantize",
    "relative_frobenius",
    "round_to_nearest",
    "search_columns",
    "search_scales",
    "solve",
    "sum_over_tokens",
    "unpack_linear",
    "walk_tile_losses",
]
