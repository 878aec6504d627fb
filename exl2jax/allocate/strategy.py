"""The strategy: the settings chosen for every linear, with their cost and proof."""

from collections.abc import Mapping
from dataclasses import dataclass

from exl2jax.qparams import QParams
from exl2jax.variants.recipe import Pricing


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """The choice: `qparams` by module key and linear name, the bits it costs, and how it was found.

    `pricing` says what the bits were spent against. By `fisher` or `divergence`, `objective` is the expected KL
    divergence in nats per token; by `accuracy` it is `sum error^norm`, and `max_error` the largest error of a module.
    `gap` is the proven distance of the objective to its optimum, None where nothing is proven.
    """

    qparams: Mapping[str, Mapping[str, QParams]]
    total_bits: int
    weights: int
    objective: float
    pricing: Pricing
    solver: str
    gap: float | None
    norm: float | None = None
    max_error: float | None = None

    @property
    def bpw(self) -> float:
        """Bits per weight over the decoder's linears."""
        return self.total_bits / self.weights
