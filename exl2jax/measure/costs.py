"""The pricing pass: the cost of each linear's error at each width, in expected KL divergence, without trial runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.measure.sensitivity import MEASURED, LinearCosts, pure_qparams
from exl2jax.models import Decoder, LinearSpec
from exl2jax.ops import HessianFactor
from exl2jax.quantize.linear import Priced, as_checks, in_threads, price, require_priced
from exl2jax.stream.blocks import Block, Piece, joined
from exl2jax.stream.forward import require_finite
from exl2jax.stream.hessians import collect
from exl2jax.stream.scan import STATES, Carry
from exl2jax.stream.streams import Rows, Stream, read
from exl2jax.stream.token_classes import group_tables, weights_beside
from exl2jax.variants import STOCK, Quantizer


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceStep:
    """The step of the pricing scan; `fisher` holds the mean squared gradient of each linear's columns by its key.

    Where tokens have weights, these are there by the key with `TOKENS` after it. The priced errors are those that
    `quantizer` makes.
    """

    decoder: Decoder
    rows: Rows
    fisher: Mapping[str, np.ndarray]
    routed_only: bool = True
    quantizer: Quantizer = STOCK

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, dict[str, LinearCosts]]:
        """Price the linears of a module and move on with its unquantized outputs."""
        price = partial(self._price, states=carry[STATES])
        out, costs = reduce(joined, map(price, block.pieces(self.decoder)))
        return {STATES: out}, costs

    def _price(self, piece: Piece, states: Stream) -> tuple[Stream, dict[str, LinearCosts]]:
        """Output of a piece of a module, and the costs of its linears.

        With `H` the mean of `w x^T x` over the tokens that reach a linear, `w` the weight of a token's class, an error
        `E` costs `1/2 sum_n F_n (E^T H E)_nn` nats per token; `F`, a mean over all tokens, counts how often an expert
        is used.
        """
        module, spec, params = piece.module, piece.spec, piece.params
        known, out = weights_beside(spec.linears, self.fisher), piece.target(states)
        tables = group_tables(spec.groups, known)
        found = collect(module, spec, params, self.rows, states, out, routed_only=self.routed_only, tables=tables)
        fisher = [[self.fisher[x.key] for x in group] for group in spec.groups]
        weights = _column_weights(fisher, found.tokens, np.float32(0.5 * self.rows.mask.count))
        settings = tuple(map(pure_qparams, MEASURED))
        tasks = [
            (x, factor, weight)
            for group, hessian, of_group in zip(spec.groups, found.hessians, weights, strict=True)
            for factor in (self.quantizer.factorize(hessian),)
            for x, weight in zip(group, of_group, strict=True)
        ]

        def run(task: tuple[LinearSpec, HessianFactor, jax.Array]) -> Priced:
            linear, factor, weight = task
            return price(params[linear.name]["kernel"], factor, settings, weight, linear, self.quantizer)

        tally, priced = read((found.tally, in_threads(run, tasks)))
        require_finite(tally, spec)
        names = {x.name: " and ".join(y.key for y in group) for group in spec.groups for x in group}
        for (linear, *_), result in zip(tasks, priced, strict=True):
            require_priced(as_checks(result.checks), linear, names[linear.name])
        costs = {
            linear.key: LinearCosts(
                rows=linear.rows,
                columns=linear.columns,
                measured=dict(zip(MEASURED, np.asarray(result.losses, np.float64), strict=True)),
                token_weights=known.get(linear.key),
            )
            for (linear, *_), result in zip(tasks, priced, strict=True)
        }
        return out, costs


@jax.jit
def _column_weights(
    fisher: list[list[jax.Array]], tokens: list[jax.Array], half_rows: jax.Array
) -> list[list[jax.Array]]:
    """Weights of columns by group and linear: a Hessian is a sum over its tokens divided by rows."""
    return [[x * (half_rows / jnp.maximum(n, 1)) for x in of_group] for of_group, n in zip(fisher, tokens, strict=True)]
