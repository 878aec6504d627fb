"""Pure, jit-able maths of EXL2: Hessians, scale search, GPTQ, half-exact rounding, packing and error measures.

Nothing here reads files, logs, or keeps state. The letters are the papers': `H` Hessian, `W` weight, `U` the upper
Cholesky factor of the inverse Hessian, `E` the scaled errors of GPTQ.
"""

from exl2jax.ops.bitstream import pack_codes
from exl2jax.ops.error import proxy_loss, relative_frobenius
from exl2jax.ops.gptq import QuantizedLinear, gptq, gptq_tile_losses, round_to_nearest, walk_tile_losses
from exl2jax.ops.hessian import HessianFactor, accumulate_hessian, factorize, gram
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.packing import PackedLinear, pack_linear, pack_scales, unpack_linear
from exl2jax.ops.rounding import dequantize, half_scale, quantize
from exl2jax.ops.scales import ScaleChoice, search_columns, search_scales

__all__ = [
    "XLA",
    "HessianFactor",
    "Kernels",
    "PackedLinear",
    "QuantizedLinear",
    "ScaleChoice",
    "accumulate_hessian",
    "dequantize",
    "factorize",
    "gptq",
    "gptq_tile_losses",
    "gram",
    "half_scale",
    "pack_codes",
    "pack_linear",
    "pack_scales",
    "proxy_loss",
    "quantize",
    "relative_frobenius",
    "round_to_nearest",
    "search_columns",
    "search_scales",
    "unpack_linear",
    "walk_tile_losses",
]
