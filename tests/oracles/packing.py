"""Bit packing through Python's own integers: a column is one long number."""

from collections.abc import Sequence

import numpy as np


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """`[rows, N]` codes to `[rows * bits / 32, N]` int32; row `r` occupies bits `r*bits` on of its column."""
    rows, columns = codes.shape
    words = np.zeros((rows * bits // 32, columns), np.uint32)
    for n in range(columns):
        stream = sum(int(codes[r, n]) << (r * bits) for r in range(rows))
        for i in range(len(words)):
            words[i, n] = stream >> (32 * i) & 0xFFFFFFFF
    return words.view(np.int32)


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `pack_codes`, int64."""
    rows, columns = words.shape[0] * 32 // bits, words.shape[1]
    codes = np.zeros((rows, columns), np.int64)
    for n in range(columns):
        stream = sum(int(word) << (32 * i) for i, word in enumerate(words[:, n].view(np.uint32)))
        for r in range(rows):
            codes[r, n] = stream >> (r * bits) & (2**bits - 1)
    return codes


def pack_scales(index: np.ndarray) -> np.ndarray:
    """`[G, N]` scale indices 1..16 to `[G, N/8]` int32 of nibbles minus one, lowest nibble = lowest column."""
    words = np.zeros((index.shape[0], index.shape[1] // 8), np.uint32)
    for g in range(index.shape[0]):
        for n in range(index.shape[1]):
            words[g, n // 8] |= np.uint32((int(index[g, n]) - 1) << (4 * (n % 8)))
    return words.view(np.int32)


def reconstruct(
    q_weight: np.ndarray, q_scale: np.ndarray, q_scale_max: np.ndarray, q_groups: Sequence[int], q_invperm: np.ndarray
) -> np.ndarray:
    """Dequantized float16 weights `[K, N]` of the stored tensors, straight from the format's description."""
    starts = [*q_groups[1::2], q_weight.shape[0]]
    parts = []
    for g, bits in enumerate(q_groups[0::2]):
        codes = unpack_codes(np.ascontiguousarray(q_weight[starts[g] : starts[g + 1]]), int(bits))
        words = q_scale[g].view(np.uint32)
        nibbles = np.asarray([int(words[n // 8]) >> (4 * (n % 8)) & 15 for n in range(codes.shape[1])])
        maximum = np.float16(q_scale_max[g]) * np.float16(1 / 256)
        scale = ((nibbles + 1) ** 2).astype(np.float16) * maximum
        parts.append((codes - 2 ** (int(bits) - 1)).astype(np.float16) * scale)
    return np.concatenate(parts)[q_invperm]
