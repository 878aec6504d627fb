"""How one linear is quantized: the choices of order, damping, scales and rounding together."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.ops import (
    XLA,
    HessianFactor,
    Kernels,
    QuantizedLinear,
    factorize,
    gptq,
    gptq_tile_losses,
    search_columns,
    search_scales,
    walk_tile_losses,
)
from exl2jax.ops.hessian import MAX_ATTEMPTS, lower_inverse
from exl2jax.ops.scales import ScaleChoice, ScaleSearch
from exl2jax.qparams import ROW_MULTIPLE, Group
from exl2jax.variants.registry import STOCK_NAME, Choice, NoSettings
from exl2jax.variants.rounding import Ordered, Rounded, weight_of

ORDER, DAMPING, SCALES, ROUNDING = (
    Choice(kind=kind, name=STOCK_NAME, settings=NoSettings()) for kind in ("order", "damping", "scales", "rounding")
)

TUNED_SEARCHES: dict[str, ScaleSearch] = {STOCK_NAME: search_scales, "columns": search_columns}
"""Scale searches by the name of their variant that run within the tuned walk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """A scale search bound to its settings, compared by value: one compilation however often it is chosen."""

    choice: Choice

    def __call__(self, w: jax.Array, bits: jax.Array, importance: jax.Array) -> ScaleChoice:
        return self.choice.function(w, bits, importance, self.choice.settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """The choices that quantize a linear: the presets' run in tuned operations, any other in the plain ones here."""

    order: Choice = ORDER
    damping: Choice = DAMPING
    scales: Choice = SCALES
    rounding: Choice = ROUNDING

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> "Method":
        """The method that a recipe's choices make, stock where they say nothing."""
        known = {field.name for field in fields(cls)}
        return cls(**{choice.kind: choice for choice in choices if choice.kind in known})

    def factorize(self, h: jax.Array) -> HessianFactor:
        """Order, damp and factor a Hessian `[K, K]`."""
        if self.order == STOCK.order and self.damping == STOCK.damping:
            return factorize(h)
        return _factorize(h, order=self.order, damping=self.damping)

    def quantize(
        self, w: jax.Array, factor: HessianFactor, groups: Sequence[Group], kernels: Kernels = XLA
    ) -> QuantizedLinear:
        """Quantize `w [K, N]` float32, cut into `groups` of the permuted rows; `kernels` serve the tuned walk."""
        search = self._tuned_walk
        if search is not None:
            return gptq(w, factor, groups, kernels, search)
        ordered = Ordered(w[factor.perm], factor, tuple(groups))
        found: Rounded = self.rounding.function(ordered, _Search(choice=self.scales), self.rounding.settings)
        weight = weight_of(found, ordered.groups, factor.inv_perm)
        return QuantizedLinear(found.codes, found.qs, found.qscale_max, factor.perm, ordered.groups, weight)

    def tile_losses(
        self,
        w: jax.Array,
        factor: HessianFactor,
        groups: Sequence[Group],
        column_weight: jax.Array,
        kernels: Kernels = XLA,
    ) -> jax.Array:
        """What `quantize` would cost, by tile of 32 permuted rows `[K / 32]`, as `ops.gptq_tile_losses` defines it."""
        search = self._tuned_walk
        if search is not None:
            return gptq_tile_losses(w, factor, groups, column_weight, kernels, search)
        error = w - self.quantize(w, factor, groups).weight.astype(jnp.float32)
        return _tile_losses(error, factor, column_weight, walked=self.rounding == STOCK.rounding)

    @property
    def search(self) -> ScaleSearch:
        """The scale search of the tuned walk that comes nearest: stock's where the chosen one is a plain function."""
        return TUNED_SEARCHES.get(self.scales.name, search_scales)

    @property
    def _tuned_walk(self) -> ScaleSearch | None:
        """The scale search to walk with, None where the walk must be the plain one."""
        return TUNED_SEARCHES.get(self.scales.name) if self.rounding == STOCK.rounding else None


STOCK = Method()
"""What stock does."""


@partial(jax.jit, static_argnames="walked")
def _tile_losses(error: jax.Array, factor: HessianFactor, column_weight: jax.Array, *, walked: bool) -> jax.Array:
    """Tiles of `sum_n c_n (E^T H E)_nn` for a weight error `E [K, N]`: `E^T (H + l I) E` is `|U^-T E|^2`.

    Rounding that `walked` with feedback has scaled errors that are uncorrelated; any other gives the exact sum only.
    """
    ordered = error[factor.perm]
    scaled = jax.scipy.linalg.solve_triangular(factor.u, ordered, trans=1, lower=False)
    if walked:
        return walk_tile_losses(scaled, factor.u, factor.damping, column_weight)
    rows = (jnp.square(scaled) - factor.damping * jnp.square(ordered)) @ column_weight
    return jnp.maximum(jnp.sum(rows.reshape(-1, ROW_MULTIPLE), axis=1), 0.0)


@partial(jax.jit, static_argnames=("order", "damping"))
def _factorize(h: jax.Array, *, order: Choice, damping: Choice) -> HessianFactor:
    """`ops.factorize` with its order and damping exchanged."""
    perm = order.function(jnp.diagonal(h), order.settings)
    ordered = h[perm][:, perm]
    first, growth = damping.function(ordered, damping.settings)
    eye = jnp.eye(h.shape[0], dtype=h.dtype)

    def attempt(value: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky((ordered + value * eye)[::-1, ::-1], symmetrize_input=False)

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        lower, _, attempts = state
        return ~jnp.all(jnp.isfinite(lower)) & (attempts < MAX_ATTEMPTS)

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, value, attempts = state
        return attempt(value * growth), value * growth, attempts + 1

    lower, value, attempts = lax.while_loop(failed, again, (attempt(first), first, jnp.int32(1)))
    u = lower_inverse(lower)[::-1, ::-1]
    ok = jnp.all(jnp.isfinite(u)) & jnp.isfinite(value)
    return HessianFactor(perm, jnp.argsort(perm), u, value, attempts, ok)
