"""GPTQ in float64, row by row with immediate feedback to the rows below."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.oracles.rounding import dequantize, quantize
from tests.oracles.scales import search


class Quantized(NamedTuple):
    """Codes in packed row order, index `[G, N]`, maxima `[G]`, dequantized weights in original order (float64)."""

    codes: np.ndarray
    index: np.ndarray
    q_scale_max: np.ndarray
    weight: np.ndarray


def gptq(w: np.ndarray, perm: np.ndarray, u: np.ndarray, cut: Sequence[tuple[int, int]]) -> Quantized:
    """Quantize `w [K, N]`; `cut` lists `(rows, bits)` of each group of the permuted rows."""
    work = np.asarray(w, np.float64)[perm].copy()
    codes = np.zeros(work.shape, np.int64)
    result = np.zeros(work.shape)
    index, maxima = [], []
    a = 0
    for rows, bits in cut:
        b = a + rows
        qs, q_scale_max, scale, _ = search(work[a:b], bits)
        index.append(qs)
        maxima.append(q_scale_max)
        errors = np.zeros((rows, work.shape[1]))
        for c in range(a, b):
            codes[c] = quantize(work[c], scale, bits)
            result[c] = dequantize(codes[c], scale, bits)
            errors[c - a] = (work[c] - result[c]) / u[c, c]
            work[c + 1 : b] -= np.outer(u[c, c + 1 : b], errors[c - a])
        work[b:] -= u[a:b, b:].T @ errors
        a = b
    weight = np.zeros(work.shape)
    weight[perm] = result
    return Quantized(codes, np.asarray(index), np.asarray(maxima, np.float16), weight)


def proxy_loss(h: np.ndarray, w: np.ndarray, quantized: np.ndarray) -> float:
    """`tr(E^T H E)` with `E = quantized - w`, in float64."""
    error = np.asarray(quantized, np.float64) - np.asarray(w, np.float64)
    return float(np.trace(error.T @ np.asarray(h, np.float64) @ error))


def weighted_loss(h: np.ndarray, w: np.ndarray, quantized: np.ndarray, column_weight: np.ndarray) -> float:
    """`sum_n c_n (E^T H E)_nn` with `E = quantized - w`, in float64."""
    error = np.asarray(quantized, np.float64) - np.asarray(w, np.float64)
    return float(np.diagonal(error.T @ np.asarray(h, np.float64) @ error) @ np.asarray(column_weight, np.float64))
