"""Choosing the next token from logits: greedy, or drawn at a temperature from the likeliest tokens."""

from dataclasses import dataclass

import numpy as np

from exl2jax.errors import SettingsError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn with the seed.

    `top_p` keeps the fewest likeliest tokens whose chances add up to it. `new_tokens` is the most that are written.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    new_tokens: int = 128

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise SettingsError(f"`temperature` is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"`top_p` is {self.top_p}; it must lie above 0 and be at most 1")
        if self.seed < 0:
            raise SettingsError(f"`seed` is {self.seed}; it must be at least 0")
        if self.new_tokens < 1:
            raise SettingsError(f"`new_tokens` is {self.new_tokens}; it must be at least 1")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def pick(logits: np.ndarray, sampling: Sampling, chance: float) -> int:
    """The next token for `logits [V]`; `chance` in [0, 1) decides among those that may be drawn, in order of ids."""
    if sampling.greedy:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    kept = _likeliest(weights, sampling.top_p)
    totals = np.cumsum(weights[kept])
    return int(kept[np.searchsorted(totals, chance * totals[-1], side="right")])


def _likeliest(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ids, ascending, of the fewest tokens that hold the share `top_p`; equal ones by id, one token at least."""
    if top_p == 1:
        return np.flatnonzero(weights)
    order = np.argsort(-weights, kind="stable")
    totals = np.cumsum(weights[order])
    count = int(np.searchsorted(totals, top_p * totals[-1], side="left")) + 1
    return np.sort(order[:count])
