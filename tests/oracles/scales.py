"""Scale search of a group in float64, one multiplier at a time."""

import numpy as np

from tests.oracles.rounding import half_scale

GRID = [0.7 * (1 - i / 96) + 1.2 * i / 96 for i in range(97)]


def base_scales(w: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    """Scale index 1..16 of every column, and the largest base scale of the group."""
    w = np.asarray(w, np.float64)
    base = (np.abs(w).max(axis=0) + 1e-12) / ((2**bits - 1) / 2)
    largest = float(base.max())
    return np.clip(np.rint(np.sqrt(base / largest) * 16), 1, 16).astype(np.int64), largest


def grid_loss(w: np.ndarray, bits: int, multiplier: float) -> float:
    """Sum over the group of `|clamp(rint(w / (s p))) s p - w|^3.5`."""
    w = np.asarray(w, np.float64)
    index, largest = base_scales(w, bits)
    step = (index / 16) ** 2 * largest * multiplier
    half = 2 ** (bits - 1)
    return float((np.abs(np.clip(np.rint(w / step), -half, half - 1) * step - w) ** 3.5).sum())


def search(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.float16, np.ndarray, float]:
    """Index by column, `q_scale_max`, working scale by column (float16), and the multiplier chosen."""
    index, largest = base_scales(w, bits)
    losses = [grid_loss(w, bits, p) for p in GRID]
    multiplier = GRID[int(np.argmin(losses))]
    q_scale_max = np.float16(min(largest * multiplier, 65504.0))
    return index, q_scale_max, half_scale(q_scale_max, index), multiplier


def index_losses(w: np.ndarray, bits: int, multipliers: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Squared error of every column at each index 1..16, rows weighted, `[multipliers, 16, N]`."""
    w = np.asarray(w, np.float64)
    _, largest = base_scales(w, bits)
    half = 2 ** (bits - 1)
    steps = (np.arange(1, 17) / 16) ** 2 * largest * np.asarray(multipliers, np.float64)[:, None]
    rounded = [[np.clip(np.rint(w / step), -half, half - 1) * step for step in row] for row in steps]
    return np.einsum("mirn,r->min", np.square(np.asarray(rounded) - w), np.asarray(importance, np.float64))
