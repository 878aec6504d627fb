"""Random streams: one per purpose, all from the job's seed, so that a new one does not change the others."""

from hashlib import sha256

import numpy as np


def _entropy(seed: int, purpose: str) -> list[int]:
    """Return the seed and four words that stand for the purpose."""
    digest = sha256(purpose.encode()).digest()
    return [seed, *np.frombuffer(digest[:16], dtype="<u4").tolist()]


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Random generator (PCG64) for one purpose of one job; draw with `dtype=np.int64` for equal bytes everywhere."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(_entropy(seed, purpose))))


def substream_seed(seed: int, purpose: str) -> int:
    """A 31-bit seed for one purpose, for generators of another kind (`jax.random.key`)."""
    word = np.random.SeedSequence(_entropy(seed, purpose)).generate_state(1, np.uint32)[0]
    return int(word) & 0x7FFFFFFF
