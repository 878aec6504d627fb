"""The measurement pass: what every candidate of every module does to that module's output."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce
from operator import iadd
from typing import Any

import numpy as np

from exl2jax.measure.measurement import MIN_ACCURACY, Candidate, candidate_rows, module_bits
from exl2jax.measure.trials import Stack, candidate_errors, expert_outputs
from exl2jax.models import Decoder, ModuleSpec
from exl2jax.ops import HessianFactor, relative_frobenius
from exl2jax.quantize.linear import Task, module_factors, quantize_many
from exl2jax.stream.blocks import Block, Piece, cut
from exl2jax.stream.forward import ErrorOfRows, forward, relative_error, require_finite
from exl2jax.stream.hessians import collect
from exl2jax.stream.scan import STATES, Carry
from exl2jax.variants import STOCK, Method
from exl2jax.variants.candidates import STOCK_TABLE, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureStep:
    """The step of the measurement scan: the candidates of each slot of a module by key, and its unquantized output.

    Settings that several candidates share are quantized once. Accuracy is `1 -` the mean over rows of the error
    `of_rows`, stock's `||out - ref|| / ||ref||`, with the residual included, but for the branches of a parallel block.
    """

    decoder: Decoder
    mask: np.ndarray | None
    routed_only: bool = True
    method: Method = STOCK
    table: Table = STOCK_TABLE
    of_rows: ErrorOfRows = relative_frobenius

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, dict[str, tuple[Candidate, ...]]]:
        """Measure one module and move on with its unquantized output."""
        states, settings = carry[STATES], self._settings(block.spec)
        if len(cut(block.spec, settings)) == 1:
            out, errors = self._whole(next(block.pieces(self.decoder, settings)), states)
        else:
            run = partial(self._experts, states=states)
            out, *trials = reduce(iadd, map(run, block.pieces(self.decoder, settings)))
            errors = {block.spec.key: [relative_error(trial, out, self.mask, self.of_rows) for trial in trials]}
        found = {
            slot.key: tuple(
                Candidate(qparams=row, total_bits=module_bits(slot, row), accuracy=max(MIN_ACCURACY, float(1 - error)))
                for row, error in zip(candidate_rows(slot, self.table), errors[slot.key], strict=True)
            )
            for slot in block.spec.slots
        }
        return {STATES: out}, found

    def _whole(self, piece: Piece, states: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The module's output, and the errors of the candidates of its slots."""
        spec, params, errors = piece.spec, piece.params, {}
        out, factors = self._collected(piece, states)
        for slot in spec.slots:
            stacks = self._quantized(slot, params, factors)
            reference = out if slot is spec else forward(self.decoder, slot.kind, params, states)
            trials = (params, stacks, states, reference, self.mask, self.of_rows)
            errors[slot.key] = candidate_errors(self.decoder, slot, *trials)
        return out, errors

    def _experts(self, piece: Piece, states: np.ndarray) -> np.ndarray:
        """What some experts add to the output and to that of each candidate, `[1 + candidates, R, T, D]`."""
        out, factors = self._collected(piece, states)
        stacks = self._quantized(piece.spec, piece.params, factors)
        return np.stack([out, *expert_outputs(piece.decoder, piece.spec, piece.params, stacks, states)])

    def _collected(self, piece: Piece, states: np.ndarray) -> tuple[np.ndarray, dict[str, HessianFactor]]:
        """The full-precision output, and the factors of the Hessians."""
        spec = piece.spec
        found = collect(piece.decoder, spec, piece.params, states, self.mask, routed_only=self.routed_only)
        require_finite(found.states, spec)
        return found.states, module_factors(spec, found.hessians, self.method)

    def _settings(self, spec: ModuleSpec) -> int:
        """The most distinct settings that the candidates of a slot give to a linear."""
        tables = [candidate_rows(slot, self.table) for slot in spec.slots]
        return max(len({row[name] for row in table}) for table in tables for name in table[0])

    def _quantized(self, spec: ModuleSpec, params: Any, factors: Mapping[str, HessianFactor]) -> dict[str, Stack]:
        """Quantize every distinct setting of every linear once."""
        rows = candidate_rows(spec, self.table)
        distinct = {linear.name: list(dict.fromkeys(row[linear.name] for row in rows)) for linear in spec.linears}
        tasks = [
            Task(params[linear.name]["kernel"], factors[linear.name], qparams, linear, self.method)
            for linear in spec.linears
            for qparams in distinct[linear.name]
        ]
        results = iter(quantize_many(tasks))
        return {
            name: Stack([next(results).weight for _ in settings], [settings.index(row[name]) for row in rows])
            for name, settings in distinct.items()
        }
