"""Weights out of GPTQ's layout, which GPTQModel and AutoRound write: nothing but NumPy.

A linear of K inputs and N outputs is `qweight [K * bits / 32, N]`, codes packed along the inputs; `qzeros
[groups, N * bits / 32]`, packed along the outputs; `scales [groups, N]`; and perhaps `g_idx [K]`, the group of each
input.
"""

from collections.abc import Mapping

import numpy as np


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[count, columns]` from a stream of bits in words `[rows, columns]` of 32 bits, the lowest bit first."""
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes = (words.view(np.uint32)[:, None, :] >> shifts[None, :, None]) & np.uint32(2**bits - 1)
        return codes.reshape(-1, words.shape[1]).astype(np.int32)
    stream = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & np.uint32(1)
    stream = stream.reshape(-1, bits, words.shape[1])
    return np.sum(stream.astype(np.int32) << np.arange(bits)[None, :, None], axis=1, dtype=np.int32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack`, for tests."""
    stream = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    stream = stream.reshape(-1, 32, codes.shape[1]).astype(np.uint64)
    return np.sum(stream << np.arange(32, dtype=np.uint64)[None, :, None], axis=1).astype(np.uint32).view(np.int32)


def weight_of(parts: Mapping[str, np.ndarray], bits: int, group: int, zero_offset: int = 1) -> np.ndarray:
    """The weight `[N, K]` float32 of a linear; GPTQ's first format stores zeros less by one, `zero_offset`."""
    codes = unpack(parts["qweight"], bits)
    zeros = unpack(np.ascontiguousarray(parts["qzeros"].T), bits).T + zero_offset
    groups = parts.get("g_idx", np.arange(len(codes)) // group)
    zeros = zeros[:, : codes.shape[1]]
    return ((codes - zeros[groups]) * parts["scales"].astype(np.float32)[groups]).T


def weights_of(tensors: Mapping[str, np.ndarray], bits: int, group: int) -> dict[str, np.ndarray]:
    """The weights of all linears in a file, by their plain names."""
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    found = {name: {part: tensors[f"{name}.{part}"] for part in parts if f"{name}.{part}" in tensors} for name in names}
    return {f"{name}.weight": weight_of(held, bits, group) for name, held in found.items()}
