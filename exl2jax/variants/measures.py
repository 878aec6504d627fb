"""What an error is measured by, and towards what a linear is quantized: choices that set fields of a recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from exl2jax.ops import relative_frobenius
from exl2jax.variants.registry import NoSettings, variant


class Measure(NamedTuple):
    """Fields of the recipe that the measure stands for; of the pricing `accuracy` also the error of each row,
    `of_rows(out [R, T, D], ref [R, T, D]) -> [R]`, a function of a module so that it is compiled once.
    """  # noqa: D205

    fields: Mapping[str, Any]
    of_rows: Callable[[jax.Array, jax.Array], jax.Array] = relative_frobenius


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceSettings:
    """Rows on which perturbing each module alone is measured."""

    rows: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherSettings:
    """Rows of the forward and backward passes."""

    rows: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class AsymmetricSettings:
    """Strengths, 0 to 1: of what the inputs have become, and of the error of the stream itself."""

    strength: float = 0.5
    residual: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what overshoots."""
        if not (0 <= self.strength <= 1 and 0 <= self.residual <= 1):
            raise ValueError("strength and residual must lie between 0 and 1")


@variant("error", "stock")
def frobenius(settings: NoSettings) -> Measure:
    """`||out - ref|| / ||ref||` of a module's output, stock's measure (docs/format.md 2.7): pricing `accuracy`."""
    return Measure({"pricing": "accuracy"})


@variant("error", "squared")
def squared(settings: NoSettings) -> Measure:
    """`||out - ref||^2 / ||ref||^2`, the share of a row's energy that is lost: pricing `accuracy`."""
    return Measure({"pricing": "accuracy"}, squared_frobenius)


@variant("error", "divergence", DivergenceSettings)
def divergence(settings: DivergenceSettings) -> Measure:
    """The KL divergence of the final logits that perturbing one block causes, by the relative errors of its linears:
    pricing `divergence`.
    """  # noqa: D205
    return Measure({"pricing": "divergence", "divergence_rows": settings.rows})


@variant("error", "fisher", FisherSettings)
def fisher(settings: FisherSettings) -> Measure:
    """The KL divergence of the final logits that Fisher information expects: pricing `fisher`, the presets' own."""
    return Measure({"pricing": "fisher", "fisher_rows": settings.rows})


@variant("hessian", "stock")
def symmetric(settings: NoSettings) -> Mapping[str, Any]:
    """`X^T X` of the quantized stream, towards the source's weights (docs/format.md 2.3): propagation 0, residual 0."""
    return {"propagation": 0.0, "residual": 0.0}


@variant("hessian", "asymmetric", AsymmetricSettings)
def asymmetric(settings: AsymmetricSettings) -> Mapping[str, Any]:
    """`X_q^T X_q` with `X_q^T (X_f - X_q)` beside it, towards the full-precision stream (QEP, arXiv:2504.09629):
    `strength` is the recipe's propagation, `residual` its own.
    """  # noqa: D205
    return {"propagation": settings.strength, "residual": settings.residual}


def squared_frobenius(out: jax.Array, ref: jax.Array) -> jax.Array:
    """The square of `relative_frobenius`: `[..., T, D] -> [...]`."""
    return jnp.square(relative_frobenius(out, ref))
