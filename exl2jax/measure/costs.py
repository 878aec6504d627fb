"""The pricing pass: the cost of each linear's error at each width, in expected KL divergence, without trial runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.errors import NumericalError
from exl2jax.measure.sensitivity import MEASURED, LinearCosts, Setting, pure_qparams
from exl2jax.models import Decoder, LinearSpec
from exl2jax.ops import HessianFactor
from exl2jax.pallas import kernels_for
from exl2jax.quantize.linear import in_threads, module_factors, require_half_range
from exl2jax.stream.blocks import Block, Piece, joined
from exl2jax.stream.forward import require_finite
from exl2jax.stream.hessians import collect
from exl2jax.stream.scan import STATES, Carry
from exl2jax.stream.streams import Rows, Stream, read
from exl2jax.stream.token_classes import group_tables, weights_beside
from exl2jax.variants import STOCK, Method


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceStep:
    """The step of the pricing scan; `fisher` holds the mean squared gradient of each linear's columns by its key.

    Where tokens have weights, these are there by the key with `TOKENS` after it. `method` quantizes the linears whose
    errors are priced.
    """

    decoder: Decoder
    rows: Rows
    fisher: Mapping[str, np.ndarray]
    routed_only: bool = True
    method: Method = STOCK

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, dict[str, LinearCosts]]:
        """Price the linears of a module and move on with its unquantized outputs."""
        price = partial(self._price, states=carry[STATES])
        out, costs = reduce(joined, map(price, block.pieces(self.decoder)))
        return {STATES: out}, costs

    def _price(self, piece: Piece, states: Stream) -> tuple[Stream, dict[str, LinearCosts]]:
        """Output of a piece of a module, and the costs of its linears.

        With `H` the mean of `w x^T x` over the tokens that reach a linear, `w` the weight of a token's class, an error
        `E` costs `1/2 sum_n F_n (E^T H E)_nn` nats per token; `F`, a mean over all tokens, counts how often an expert
        is asked.
        """
        spec, params = piece.spec, piece.params
        weights = weights_beside(spec.linears, self.fisher)
        tables = group_tables(spec.groups, weights)
        module, out = piece.module, piece.target(states)
        collected = collect(module, spec, params, self.rows, states, out, routed_only=self.routed_only, tables=tables)
        tally, counts = read((collected.tally, collected.tokens))
        require_finite(tally, spec)
        factors = module_factors(spec, collected.hessians, self.method)
        tokens = {x.name: round(float(n)) for group, n in zip(spec.groups, counts, strict=True) for x in group}

        def run(task: tuple[LinearSpec, Setting]) -> np.ndarray:
            linear, setting = task
            # The Hessian is a sum over its tokens divided by rows.
            weight = jnp.asarray(self.fisher[linear.key]) * (0.5 * states.count / max(tokens[linear.name], 1))
            found = _losses(params[linear.name]["kernel"], factors[linear.name], setting, weight, self.method)
            if not np.isfinite(found).all():
                raise NumericalError(
                    f"{linear.key}: its costs hold NaN or infinity; the activations of this calibration data overflow"
                )
            return found

        for linear in spec.linears:
            require_half_range(params[linear.name]["kernel"], linear)
        tasks = [(linear, setting) for linear in spec.linears for setting in MEASURED]
        losses = iter(in_threads(run, tasks))
        costs = {
            linear.key: LinearCosts(
                rows=linear.rows,
                columns=linear.columns,
                measured={setting: next(losses) for setting in MEASURED},
                token_weights=weights.get(linear.key),
            )
            for linear in spec.linears
        }
        return out, costs


def _losses(
    kernel: jax.Array, factor: HessianFactor, setting: Setting, weight: jax.Array, method: Method
) -> np.ndarray:
    groups = pure_qparams(setting).groups(kernel.shape[0])
    losses = method.tile_losses(jnp.asarray(kernel, jnp.float32), factor, groups, weight, kernels_for())
    return np.asarray(losses, np.float64)
