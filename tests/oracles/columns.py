"""GPTQ with feedback between columns in float64, by conditional optima instead of factors.

Once some columns `P` of a row have lost `d_P`, the losses of the others that minimise `d^T M d` are
`-M_LL^-1 M_LP d_P`: a block of columns is rounded from its weights less those.
"""

from collections.abc import Sequence

import numpy as np

from tests.oracles.gptq import Quantized
from tests.oracles.rounding import dequantize, quantize
from tests.oracles.scales import search


def walked(
    w: np.ndarray, perm: np.ndarray, u: np.ndarray, m: np.ndarray, cut: Sequence[tuple[int, int]], block: int
) -> Quantized:
    """Quantize `w [K, N]`, columns in the order of `m [N, N]`; `cut` as `tests.oracles.gptq` has it."""
    work = np.asarray(w, np.float64)[perm].copy()
    codes, result = np.zeros(work.shape, np.int64), np.zeros(work.shape)
    index, maxima, columns = [], [], work.shape[1]
    pulls = [np.linalg.solve(m[a:, a:], m[a:, :a])[:block] for a in range(0, columns, block)]
    a = 0
    for rows, bits in cut:
        qs, q_scale_max, scale, _ = search(work[a : a + rows], bits)
        index.append(qs)
        maxima.append(q_scale_max)
        for c in range(a, a + rows):
            for start, pull in zip(range(0, columns, block), pulls, strict=True):
                part = slice(start, start + block)
                target = work[c, part] + pull @ (work[c] - result[c])[:start]
                codes[c, part] = quantize(target, scale[part], bits)
                result[c, part] = dequantize(codes[c, part], scale[part], bits)
            work[c + 1 :] -= np.outer(u[c, c + 1 :] / u[c, c], work[c] - result[c])
        a += rows
    weight = np.zeros(work.shape)
    weight[perm] = result
    return Quantized(codes, np.asarray(index), np.asarray(maxima, np.float16), weight)


def kronecker_loss(h: np.ndarray, m: np.ndarray, w: np.ndarray, quantized: np.ndarray) -> float:
    """`tr(M E^T H E)` with `E = quantized - w`, in float64."""
    error = np.asarray(quantized, np.float64) - np.asarray(w, np.float64)
    return float(np.sum(m * (error.T @ np.asarray(h, np.float64) @ error)))
