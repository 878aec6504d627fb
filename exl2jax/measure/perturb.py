"""The measured effect of perturbing one module alone on the predictions, and the Fisher information scaled by it.

Each module's linears are rounded to nearest at four bits, one module at a time, and the rest of the model runs on in
full precision. All perturbed models go through one scan side by side: at every module those perturbed before move on,
and the module's own perturbation joins them. At the head the KL divergence of each is measured; over what the Fisher
information predicts for the same errors it gives one factor a module. Where there are no gradients, relative errors of
the linears' outputs take the place of the prediction, and the factors alone say how much a module matters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.measure.fisher import Columns, columns_by_name
from exl2jax.measure.inputs import InputStack
from exl2jax.models import Decoder, LinearSpec, Module, ModuleSpec
from exl2jax.ops import round_to_nearest
from exl2jax.qparams import q
from exl2jax.stream.blocks import Block, Piece
from exl2jax.stream.chunks import single_rows
from exl2jax.stream.hessians import group_weights
from exl2jax.stream.scan import PERTURBED, Carry
from exl2jax.stream.scoring import divergence, log_probabilities
from exl2jax.stream.streams import Rows, Stream
from exl2jax.stream.token_classes import TOKENS, group_tables, token_factors, weights_beside

ROUNDING = q("4", "1", "128")
"""The rounding of a perturbation: larger than float32 noise, and small enough for a second-order estimate."""

TOKEN_STRIDE = 4
"""Stride of the tokens that are compared at the head; neighbouring tokens give nearly the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbation:
    """The unscaled weights of a module's columns, and the divergence of its perturbation that they predict, in nats."""

    columns: Columns
    predicted: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PerturbStep:
    """The step of the perturbation scan over the first `rows` rows of `stack`.

    `fisher` holds the weight of each linear's columns by its key; None weighs every linear by its relative error.
    """

    decoder: Decoder
    stack: InputStack
    rows: int
    fisher: Mapping[str, np.ndarray] | None

    def start(self, modules: int) -> dict[str, np.ndarray]:
        """The carry before the first module: room for every perturbed model."""
        _, _, length, width = self.stack.shape
        return {PERTURBED: np.zeros((modules * self.rows, length, width), np.float32)}

    def place(self, values: np.ndarray) -> Stream:
        """The perturbed models as a stream in host memory, since their number changes from module to module."""
        return Stream.of(values, single_rows(len(values)), resident=False)

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, Perturbation]:
        """Move the models perturbed before on through a module, and add the one that is perturbed here."""
        own = self.stack.position(block.spec) * self.rows
        inputs = self.stack.read(block.spec)[: self.rows]
        streams = carry[PERTURBED].array().copy()
        perturb = partial(self._perturb, before=streams[:own], inputs=inputs)
        streams[: own + self.rows], found = reduce(_joined, map(perturb, block.pieces(self.decoder)))
        return {PERTURBED: self.place(streams)}, found

    def _perturb(self, piece: Piece, before: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, Perturbation]:
        """Run a piece of a module on the streams perturbed before, and rounded on the inputs of its own perturbation.

        Returns the outputs of all of them, and the predicted effect of the rounding.
        """
        spec, params = piece.spec, piece.params
        rounded = {linear.name: _rounded(params[linear.name]["kernel"], linear) for linear in spec.linears}
        perturbed = params | {name: params[name] | {"kernel": kernel} for name, kernel in rounded.items()}
        own = _outputs(piece._replace(params=perturbed), inputs)
        outputs = np.concatenate([_outputs(piece, before), own]) if len(before) else own
        tables = group_tables(spec.groups, weights_beside(spec.linears, self.fisher or {}))
        energy = _energies(piece.module, params, rounded, jnp.asarray(inputs), tables)
        columns = self._columns(spec, {name: np.asarray(out, np.float64) for name, (_, out) in energy.items()})
        predicted = sum(0.5 * float(np.asarray(e, np.float64) @ columns[name]) for name, (e, _) in energy.items())
        return outputs, Perturbation(columns=columns, predicted=predicted)

    def _columns(self, spec: ModuleSpec, outputs: Mapping[str, np.ndarray]) -> Columns:
        if self.fisher is not None:
            return columns_by_name(spec, self.fisher)
        return {name: np.full(e.shape, 1 / max(e.sum(), 1e-30), np.float32) for name, e in outputs.items()}


def _joined(
    first: tuple[np.ndarray, Perturbation], then: tuple[np.ndarray, Perturbation]
) -> tuple[np.ndarray, Perturbation]:
    """The results of two pieces of a module together."""
    (states, a), (more, b) = first, then
    columns = {**a.columns, **b.columns}
    return states + more, Perturbation(columns=columns, predicted=a.predicted + b.predicted)


def scaled(found: Sequence[Perturbation], divergence: np.ndarray) -> list[Columns]:
    """The columns' weights of every module, scaled to predict the measured `divergence [modules]`."""
    factors = [measured / max(p.predicted, 1e-30) for p, measured in zip(found, divergence, strict=True)]
    return [
        {n: w if n.endswith(TOKENS) else (factor * w).astype(np.float32) for n, w in p.columns.items()}
        for p, factor in zip(found, factors, strict=True)
    ]


def divergences(
    decoder: Decoder, params: Any, streams: np.ndarray, reference: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
    """Mean KL divergence `[modules]` of final `streams [modules * k, T, D]` from `reference [k, T, D]`, in nats.

    `mask [k, T]` leaves padding out; every `TOKEN_STRIDE`-th token is compared.
    """
    rows = len(reference)
    weight = np.ones(reference.shape[:2]) if mask is None else mask.astype(np.float64)
    weight = weight[:, ::TOKEN_STRIDE]
    totals = np.zeros(len(streams) // rows)
    for r in range(rows):
        full = log_probabilities(decoder, params, reference[r, ::TOKEN_STRIDE])
        for m in range(len(totals)):
            kl = _divergence(decoder, params, streams[m * rows + r, ::TOKEN_STRIDE], full)
            totals[m] += np.asarray(kl, np.float64) @ weight[r]
    return totals / weight.sum()


def _outputs(piece: Piece, states: np.ndarray) -> np.ndarray:
    """Output of a piece on states in host memory `[R, T, D]`."""
    rows = Rows.of(np.ones(states.shape[:2]), states.shape[-1], resident=False)
    out = Stream.empty(rows.spans, states.shape[1:], resident=False)
    piece.forward(rows.place(states), out)
    return out.array()


def _rounded(kernel: jax.Array, linear: LinearSpec) -> jax.Array:
    rows = jnp.arange(linear.rows)
    return round_to_nearest(jnp.asarray(kernel, jnp.float32), rows, ROUNDING.groups(linear.rows)).weight


@partial(jax.jit, static_argnames="module")
def _energies(
    module: Module,
    params: Any,
    rounded: Mapping[str, jax.Array],
    h: jax.Array,
    tables: np.ndarray | None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Mean squares over a linear's tokens, by column, of its error (each token by its weight) and of its output."""
    inputs, every = [x for stage in module.forward(params, h).inputs for x in stage], jnp.ones(h.shape[:2])
    weights = group_weights(module.routed(params, h), len(inputs), every)
    factors = token_factors(weights, tables, h, every)
    names = [group for stage in module.stages for group in stage]

    def squares(name: str, x: jax.Array, weight: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = params[name]["kernel"]
        error = x @ (rounded[name].astype(jnp.float32) - kernel)
        count, output = jnp.maximum(jnp.sum(weight), 1), x @ kernel.astype(jnp.float32)
        means = [jnp.sum(jnp.square(y * f[..., None]), (0, 1)) / count for y, f in ((error, factor), (output, weight))]
        return means[0], means[1]

    found = zip(names, inputs, weights, factors, strict=True)
    return {name: squares(name, *arrays) for group, *arrays in found for name in group}


@partial(jax.jit, static_argnames="decoder")
def _divergence(decoder: Decoder, params: Any, h: jax.Array, full: jax.Array) -> jax.Array:
    return divergence(full, log_probabilities(decoder, params, h))
