"""A Llama decoder in float64, head by head and position by position, and the published RoPE frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Params = Mapping[str, Any]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Root-mean-square norm over the last axis."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def linear(params: Params, x: np.ndarray) -> np.ndarray:
    """`x W + b`."""
    y = x @ np.asarray(params["kernel"], np.float64)
    return y + np.asarray(params["bias"], np.float64) if "bias" in params else y


def rotate(vector: np.ndarray, position: int, frequencies: np.ndarray, amplitude: float) -> np.ndarray:
    """Turn the pairs `(i, i + half)` of one head's vector by `position * frequency`."""
    half = len(vector) // 2
    out = np.zeros(len(vector))
    for i, frequency in enumerate(frequencies):
        c, s = amplitude * math.cos(position * frequency), amplitude * math.sin(position * frequency)
        out[i] = vector[i] * c - vector[i + half] * s
        out[i + half] = vector[i + half] * c + vector[i] * s
    return out


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, kv_heads: int, frequencies: np.ndarray, amplitude: float
) -> np.ndarray:
    """Causal grouped-query attention of one sequence, flat projections `[T, heads * head_dim]`."""
    length, width = q.shape[0], q.shape[1] // heads
    out = np.zeros((length, heads * width))
    for head in range(heads):
        mine, shared = slice(head * width, (head + 1) * width), head // (heads // kv_heads)
        theirs = slice(shared * width, (shared + 1) * width)
        queries = [rotate(q[t, mine], t, frequencies, amplitude) for t in range(length)]
        keys = np.asarray([rotate(k[t, theirs], t, frequencies, amplitude) for t in range(length)])
        for t in range(length):
            scores = keys[: t + 1] @ queries[t] / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            out[t, mine] = weights / weights.sum() @ v[: t + 1, theirs]
    return out


def attention_block(
    params: Params,
    h: np.ndarray,
    heads: int,
    kv_heads: int,
    eps: float,
    frequencies: np.ndarray,
    amplitude: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """New hidden states of one sequence `[T, D]`, and the inputs of q, k, v and of o."""
    x = rms_norm(h, params["norm"]["weight"], eps)
    q, k, v = (linear(params[name], x) for name in ("q_proj", "k_proj", "v_proj"))
    mixed = attend(q, k, v, heads, kv_heads, frequencies, amplitude)
    return h + linear(params["o_proj"], mixed), x, mixed


def mlp_block(params: Params, h: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """New hidden states `[..., D]`, and the inputs of gate, up and of down."""
    x = rms_norm(h, params["norm"]["weight"], eps)
    gate, up = linear(params["gate_proj"], x), linear(params["up_proj"], x)
    inner = gate / (1 + np.exp(-gate)) * up
    return h + linear(params["down_proj"], inner), x, inner


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    wide = np.asarray(logits, np.float64)
    top = wide.max(axis=-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(axis=-1, keepdims=True))


def plain_frequencies(theta: float, dim: int) -> np.ndarray:
    """`theta^(-2i/dim)`."""
    return np.asarray([theta ** (-2 * i / dim) for i in range(dim // 2)])


def dynamic_frequencies(theta: float, dim: int, factor: float, trained: int, length: int) -> np.ndarray:
    """NTK-aware base that grows once the sequence is longer than the trained one."""
    growth = factor * max(length, trained) / trained - (factor - 1)
    return plain_frequencies(theta * growth ** (dim / (dim - 2)), dim)


def llama3_frequencies(theta: float, dim: int, factor: float, low: float, high: float, trained: int) -> np.ndarray:
    """Short waves kept, long waves slowed by the factor, those between blended."""
    out = []
    for f in plain_frequencies(theta, dim):
        wave = 2 * math.pi / f
        if wave < trained / high:
            out.append(f)
        elif wave > trained / low:
            out.append(f / factor)
        else:
            share = (trained / wave - low) / (high - low)
            out.append((1 - share) * f / factor + share * f)
    return np.asarray(out)


def yarn_frequencies(
    theta: float, dim: int, factor: float, trained: int, fast: float = 32, slow: float = 1
) -> np.ndarray:
    """NTK by parts: pairs that turn often are kept, pairs that turn seldom are slowed, a ramp between."""

    def pair(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), dim - 1)
    out = []
    for i, f in enumerate(plain_frequencies(theta, dim)):
        slowed = min(max((i - first) / max(last - first, 0.001), 0), 1)
        out.append(f * (1 - slowed) + f / factor * slowed)
    return np.asarray(out)
