"""Half-exact dequantization, in NumPy's own float16 arithmetic."""

import numpy as np


def half_scale(q_scale_max: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`half(half(index^2) * half(q_scale_max * half(1/256)))`, index 1..16; float16."""
    maximum = np.asarray(q_scale_max, np.float16) * np.float16(1 / 256)
    square = (np.asarray(index, np.int64) ** 2).astype(np.float16)
    return (square * maximum).astype(np.float16)


def dequantize(codes: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """`half(half(code - 2^(bits-1)) * scale)`; float16."""
    centred = (np.asarray(codes, np.int64) - 2 ** (bits - 1)).astype(np.float16)
    with np.errstate(over="ignore"):
        return (centred * np.asarray(scale, np.float16)).astype(np.float16)


def quantize(w: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """`clamp(rint(w / scale) + 2^(bits-1), 0, 2^bits - 1)` in float64; the zero code where the scale is zero."""
    w, scale = np.broadcast_arrays(np.asarray(w, np.float64), np.asarray(scale, np.float64))
    steps = np.divide(w, scale, out=np.zeros(w.shape), where=scale > 0)
    return np.clip(np.rint(steps) + 2 ** (bits - 1), 0, 2**bits - 1).astype(np.int64)
