"""The measurement pass: the error of every candidate of every module, at that module's output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from exl2jax.errors import NumericalError
from exl2jax.measure.measurement import MIN_ACCURACY, Candidate, candidate_rows, module_bits
from exl2jax.measure.trials import Stack, candidate_errors, expert_outputs
from exl2jax.models import Decoder, LinearSpec, ModuleSpec
from exl2jax.ops import HessianFactor, relative_frobenius
from exl2jax.pallas import kernels_for
from exl2jax.qparams import QParams
from exl2jax.quantize.linear import in_threads, module_factors
from exl2jax.stream.blocks import Block, Piece, cut
from exl2jax.stream.forward import ErrorOfRows, errors_by_row, forward, mean_of_rows, require_finite
from exl2jax.stream.hessians import collect
from exl2jax.stream.scan import STATES, Carry
from exl2jax.stream.streams import Rows, Stream, added, read
from exl2jax.variants import STOCK, Quantizer
from exl2jax.variants.candidates import STOCK_TABLE, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureStep:
    """The step of the measurement scan: the candidates of each slot of a module by key, and its unquantized output.

    Settings that several candidates share are quantized once. Accuracy is `1 -` the mean over rows of the error
    `of_rows`, stock's `||out - ref|| / ||ref||`, with the residual included, but for the branches of a parallel block.
    """

    decoder: Decoder
    rows: Rows
    routed_only: bool = True
    quantizer: Quantizer = STOCK
    table: Table = STOCK_TABLE
    of_rows: ErrorOfRows = relative_frobenius

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, dict[str, tuple[Candidate, ...]]]:
        """Measure one module and move on with its unquantized output."""
        states, settings = carry[STATES], self._settings(block.spec)
        if len(cut(block.spec, settings)) == 1:
            out, errors = self._whole(next(block.pieces(self.decoder, settings)), states)
        else:
            run = partial(self._experts, states=states)
            out, *trials = reduce(_summed, map(run, block.pieces(self.decoder, settings)))
            errors = {block.spec.key: [errors_by_row(self.rows, trial, out, self.of_rows) for trial in trials]}
        means = {key: self._means(found) for key, found in errors.items()}
        found = {
            slot.key: tuple(
                Candidate(qparams=row, total_bits=module_bits(slot, row), accuracy=max(MIN_ACCURACY, float(1 - error)))
                for row, error in zip(candidate_rows(slot, self.table), means[slot.key], strict=True)
            )
            for slot in block.spec.slots
        }
        return {STATES: out}, found

    def _means(self, errors: Sequence[Stream]) -> list[float]:
        """The mean error of each candidate from its errors by row."""
        found = read([stream.parts() for stream in errors])
        return [mean_of_rows(self.rows.spans, parts) for parts in found]

    def _whole(self, piece: Piece, states: Stream) -> tuple[Stream, dict[str, list[Stream]]]:
        """The module's output, and the errors by row of the candidates of its slots."""
        spec, params, errors = piece.spec, piece.params, {}
        out, factors = self._collected(piece, states)
        for slot in spec.slots:
            stacks, module, reference = self._quantized(slot, params, factors), self.decoder.module(slot), out
            if slot is not spec:
                reference = states.like(*states.shape)
                forward(module, params, states, reference)
            errors[slot.key] = candidate_errors(
                module, slot, params, stacks, self.rows, states, reference, self.of_rows
            )
        return out, errors

    def _experts(self, piece: Piece, states: Stream) -> list[Stream]:
        """The output of some experts, and that under each candidate, `[R, T, D]` each."""
        out, factors = self._collected(piece, states)
        stacks = self._quantized(piece.spec, piece.params, factors)
        return [out, *expert_outputs(piece.module, piece.spec, piece.params, stacks, states)]

    def _collected(self, piece: Piece, states: Stream) -> tuple[Stream, dict[str, HessianFactor]]:
        """The full-precision output, and the factors of the Hessians."""
        spec, out = piece.spec, states.like(*states.shape)
        found = collect(piece.module, spec, piece.params, self.rows, states, out, routed_only=self.routed_only)
        require_finite(read(found.tally), spec)
        return out, module_factors(spec, found.hessians, self.quantizer)

    def _settings(self, spec: ModuleSpec) -> int:
        """The most distinct settings that the candidates of a slot give to a linear."""
        tables = [candidate_rows(slot, self.table) for slot in spec.slots]
        return max(len({row[name] for row in table}) for table in tables for name in table[0])

    def _quantized(self, spec: ModuleSpec, params: Any, factors: Mapping[str, HessianFactor]) -> dict[str, Stack]:
        """Quantize every distinct setting of every linear once."""
        rows = candidate_rows(spec, self.table)
        distinct = {linear.name: list(dict.fromkeys(row[linear.name] for row in rows)) for linear in spec.linears}
        tasks = [(linear, qparams) for linear in spec.linears for qparams in distinct[linear.name]]

        def run(task: tuple[LinearSpec, QParams]) -> jax.Array:
            linear, qparams = task
            kernel, factor = jnp.asarray(params[linear.name]["kernel"], jnp.float32), factors[linear.name]
            return self.quantizer.quantize(kernel, factor, qparams.groups(linear.rows), kernels_for()).weight

        weights = in_threads(run, tasks)
        for (linear, _), finite in zip(tasks, read(_finite(weights)), strict=True):
            if not finite:
                raise NumericalError(f"{linear.key}: a candidate gave NaN or infinity; try other calibration rows")
        results = iter(weights)
        return {
            name: Stack([next(results) for _ in settings], [settings.index(row[name]) for row in rows])
            for name, settings in distinct.items()
        }


@jax.jit
def _finite(weights: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(weight)) for weight in weights]


def _summed(first: list[Stream], then: list[Stream]) -> list[Stream]:
    """Streams of two pieces, added one by one."""
    return [added(a, b) for a, b in zip(first, then, strict=True)]
