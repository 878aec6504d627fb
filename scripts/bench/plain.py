"""The stock algorithm as a plain loop in NumPy float32, to which the benchmark compares its figures."""

import numpy as np

GRID = [0.70 * (1 - i / 96) + 1.20 * i / 96 for i in range(97)]


def plain_gptq(w: np.ndarray, u: np.ndarray, size: int, bits: int) -> np.ndarray:
    """Quantize permuted weights `w [K, N]` through the factor `u [K, K]`, one width throughout: dequantized weights."""
    w, out = w.copy(), np.zeros_like(w)
    half = 2 ** (bits - 1)
    for a in range(0, len(w), size):
        b = min(a + size, len(w))
        scale = plain_scales(w[a:b], bits)
        errors = np.zeros_like(w[a:b])
        for c in range(a, b):
            code = np.clip(np.rint(w[c] / scale), -half, half - 1)
            out[c] = (code.astype(np.float16) * scale.astype(np.float16)).astype(np.float32)
            errors[c - a] = (w[c] - out[c]) / u[c, c]
            w[c:b] -= np.outer(u[c, c:b], errors[c - a])
        w[b:] -= u[a:b, b:].T @ errors
    return out


def plain_scales(w: np.ndarray, bits: int) -> np.ndarray:
    """Working scales `[N]` of a group, one pass over its weights for each multiplier."""
    half = 2 ** (bits - 1)
    base = (np.abs(w).max(axis=0) + 1e-12) / ((2**bits - 1) / 2)
    index = np.clip(np.rint(np.sqrt(base / base.max()) * 16), 1, 16)
    scale = (index / 16) ** 2 * base.max()
    losses = []
    for p in GRID:
        s = (scale * p).astype(np.float32)
        losses.append((np.abs(np.clip(np.rint(w / s), -half, half - 1) * s - w) ** np.float32(3.5)).sum())
    maximum = np.float16(base.max() * GRID[int(np.argmin(losses))]) * np.float16(1 / 256)
    return ((index**2).astype(np.float16) * maximum).astype(np.float32)


def plain_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack `codes [K, N]` a row at a time."""
    words = np.zeros((len(codes) * bits // 32 + 1, codes.shape[1]), np.uint64)
    for r, row in enumerate(codes.astype(np.uint64)):
        word, shift = divmod(r * bits, 32)
        words[word] |= (row << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        words[word + 1] |= row >> np.uint64(32 - shift)
    return words[:-1].astype(np.uint32)


def plain_attention(
    h: np.ndarray, norm: np.ndarray, weights: dict[str, np.ndarray], heads: int, kv_heads: int
) -> np.ndarray:
    """One row `[T, D]` through an attention module, head by head (positions left out: they cost next to nothing)."""
    x = _normed(h, norm)
    q, k, v = (x @ weights[name] for name in ("q_proj", "k_proj", "v_proj"))
    width = q.shape[1] // heads
    mixed = np.zeros_like(q)
    future = np.triu(np.full((len(h), len(h)), -np.inf, np.float32), 1)
    for head in range(heads):
        mine, theirs = head * width, head // (heads // kv_heads) * width
        scores = q[:, mine : mine + width] @ k[:, theirs : theirs + width].T * np.float32(width**-0.5) + future
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, mine : mine + width] = p / p.sum(axis=1, keepdims=True) @ v[:, theirs : theirs + width]
    return h + mixed @ weights["o_proj"]


def plain_mlp(h: np.ndarray, norm: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """One row `[T, D]` through a gated MLP."""
    x = _normed(h, norm)
    gate = x @ weights["gate_proj"]
    return h + (gate / (1 + np.exp(-gate)) * (x @ weights["up_proj"])) @ weights["down_proj"]


def _normed(h: np.ndarray, norm: np.ndarray) -> np.ndarray:
    return h / np.sqrt((h * h).mean(axis=1, keepdims=True) + np.float32(1e-5)) * norm
