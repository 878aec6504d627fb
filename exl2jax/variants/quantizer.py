"""The quantizer of a linear: the choices of order, damping, scale search and rounding together."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
)
from exl2jax.ops.scales import ALONE, GroupContext, ScaleChoice, ScaleSearch
from exl2jax.qparams import ROW_MULTIPLE, Group
from exl2jax.variants.registry import STOCK_NAME, Choice, NoSettings
from exl2jax.variants.rounding import Ordered, Rounded, weight_of

ORDER, DAMPING, SCALES, ROUNDING = (
    Choice(kind=kind, name=STOCK_NAME, settings=NoSettings()) for kind in ("order", "damping", "scales", "rounding")
)

OWN_SEARCHES: dict[str, ScaleSearch] = {STOCK_NAME: search_scales, "columns": search_columns}
"""Scale searches of `ops` by the name of their variant: they take what the walk has, kernels included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedSearch:
    """A scale search of a variant in the walk, which calls it on exactly the rows of a group.

    Compared by value: one compilation however often it is chosen.
    """

    choice: Choice

    def __call__(self, w: jax.Array, bits: jax.Array, context: GroupContext = ALONE) -> ScaleChoice:
        """`ScaleSearch`, one matrix after the other."""
        weights = jnp.ones(len(w), jnp.float32)
        if context.importance is not None:
            weights = lax.dynamic_slice_in_dim(context.importance, context.begin.row, len(w))
        parts = jnp.split(w, context.matrices, axis=1)
        of_part = jnp.broadcast_to(bits, (w.shape[1],)).reshape(context.matrices, -1)[:, 0]
        found = [self._on_rows(part, of_part[i], weights, context.rows) for i, part in enumerate(parts)]
        if context.matrices == 1:
            return found[0]
        stacked = (jnp.stack(x) for x in zip(*found, strict=True))
        return ScaleChoice(*(x.reshape(-1) for x in stacked))

    def _on_rows(self, w: jax.Array, bits: jax.Array, weights: jax.Array, rows: jax.Array | None) -> ScaleChoice:
        def first(size: int) -> ScaleChoice:
            return self.choice.function(w[:size], bits, weights[:size], self.choice.settings)

        if rows is None:
            return first(len(w))
        sizes = range(ROW_MULTIPLE, len(w) + 1, ROW_MULTIPLE)
        return lax.switch(rows // ROW_MULTIPLE - 1, [partial(first, size) for size in sizes])


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A variant's function bound to its settings, compared by value: one compilation however often it is chosen."""

    choice: Choice

    def __call__(self, *operands: jax.Array) -> Any:
        """The function's result on these operands."""
        return self.choice.function(*operands, self.choice.settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizer:
    """The four choices by which a linear is quantized. GPTQ runs in the walk of `ops`, any other rounding as it is."""

    order: Choice = ORDER
    damping: Choice = DAMPING
    scales: Choice = SCALES
    rounding: Choice = ROUNDING

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> "Quantizer":
        """The quantizer of a recipe's choices, with stock's choice of every kind that they leave out."""
        known = {field.name for field in fields(cls)}
        return cls(**{choice.kind: choice for choice in choices if choice.kind in known})

    def factorize(self, h: jax.Array) -> HessianFactor:
        """Order, damp and factor a Hessian `[K, K]`."""
        return factorize(h, Bound(choice=self.order), Bound(choice=self.damping))

    def quantize(
        self, w: jax.Array, factor: HessianFactor, groups: Sequence[Group], kernels: Kernels = XLA
    ) -> QuantizedLinear:
        """Quantize `w [K, N]` float32, cut into `groups` of the permuted rows; `kernels` serve the walk."""
        if self.walks:
            return gptq(w, factor, groups, kernels, self.search)
        ordered = Ordered(w[factor.perm], factor, tuple(groups))
        found: Rounded = self.rounding.function(ordered, Bound(choice=self.scales), self.rounding.settings)
        weight = weight_of(found, ordered.groups, factor.inv_perm)
        room = w.shape[0] // ROW_MULTIPLE - len(groups)
        qs = jnp.pad(found.qs, ((0, room), (0, 0)), constant_values=1)
        maxima = jnp.pad(found.qscale_max, (0, room), constant_values=1)
        return QuantizedLinear(found.codes, qs, maxima, factor.perm, ordered.groups, weight)

    def tile_losses(
        self,
        w: np.ndarray | jax.Array,
        factor: HessianFactor,
        cuts: tuple[tuple[Group, ...], ...],
        column_weight: jax.Array,
        kernels: Kernels = XLA,
    ) -> jax.Array:
        """The cost of `quantize` under each cut, by tile of 32 permuted rows `[cuts, K / 32]`.

        `ops.gptq_tile_losses` defines it.
        """
        if self.walks:
            return gptq_tile_losses(w, factor, cuts, column_weight, kernels, self.search)
        w = jnp.asarray(w, jnp.float32)
        errors = (w - self.quantize(w, factor, groups).weight.astype(jnp.float32) for groups in cuts)
        return jnp.stack([_tile_losses(error, factor, column_weight) for error in errors])

    @property
    def search(self) -> ScaleSearch:
        """The scale search of the walk."""
        return OWN_SEARCHES.get(self.scales.name) or SizedSearch(choice=self.scales)

    @property
    def walks(self) -> bool:
        """Whether the rounding is GPTQ itself, so that the walk of `ops` runs with the search that was chosen."""
        return self.rounding == ROUNDING


STOCK = Quantizer()
"""The quantizer of stock ExLlamaV2."""


@jax.jit
def _tile_losses(error: jax.Array, factor: HessianFactor, column_weight: jax.Array) -> jax.Array:
    """Tiles of `sum_n c_n (E^T H E)_nn` for a weight error `E [K, N]`: `E^T (H + l I) E` is `|U^-T E|^2`.

    Only the sum is exact: errors of a rounding that is no walk with feedback are correlated.
    """
    ordered = error[factor.perm]
    scaled = jax.scipy.linalg.solve_triangular(factor.u, ordered, trans=1, lower=False)
    rows = (jnp.square(scaled) - factor.damping * jnp.square(ordered)) @ column_weight
    return jnp.maximum(jnp.sum(rows.reshape(-1, ROW_MULTIPLE), axis=1), 0.0)
