"""The quantization pass: every linear at its chosen setting, on the states that the quantized model really has."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from exl2jax.models import Decoder, LinearSpec, ModuleSpec
from exl2jax.models.modules import LinearGroup, NormSpec
from exl2jax.ops import HessianFactor, PackedLinear
from exl2jax.qparams import QParams
from exl2jax.quantize.diagnostics import clamp_bias, hessian_diagnostics, linear_diagnostics, starved_experts
from exl2jax.quantize.head import quantize_head
from exl2jax.quantize.linear import Checks, Quantized, as_checks, in_threads, quantize, repacked, require_sound
from exl2jax.quantize.outputs import Outputs, feedback_of
from exl2jax.quantize.propagate import StageTask, StageTerms, Strengths, corrected_targets, finish, stage_terms
from exl2jax.quantize.report import ModuleReport
from exl2jax.quantize.store import stored_norm, tensor_file
from exl2jax.quantize.tune import TuneTask
from exl2jax.stock_tables import head_qparams
from exl2jax.storage import write_checked_tensors
from exl2jax.stream.blocks import Block, HeadBlock, Piece, cut
from exl2jax.stream.forward import errors_by_row, forward, mean_of_rows, require_finite
from exl2jax.stream.hessians import collect
from exl2jax.stream.later import Later, at_once
from exl2jax.stream.scan import REFERENCE, STATES, Carry
from exl2jax.stream.scoring import perplexity, score
from exl2jax.stream.streams import Rows, Stream, added, read
from exl2jax.stream.token_classes import group_tables
from exl2jax.variants.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeStep:
    """The step of the quantization scan, with everything that stays the same through it.

    The carry holds the quantized model's states and, as `REFERENCE`, those of the full-precision one: of all rows where
    the recipe propagates errors or tunes, else of the `check_rows` that the final check runs on. `later` takes the work
    that need not be done before the next module: writing the files. `outputs` gives the gradients at a linear's
    outputs, where errors are fed to later columns.
    """

    decoder: Decoder
    recipe: Recipe
    strategy: Mapping[str, Mapping[str, QParams]]
    head_bits: int
    input_ids: np.ndarray
    rows: Rows
    out_tensor: Path
    check_rows: int
    routed_only: bool = True
    seed: int = 0
    token_weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    later: Later = at_once
    outputs: Outputs | None = None

    def start(self, states: np.ndarray) -> dict[str, np.ndarray]:
        """The carry before the first module, from the embedded rows."""
        return {STATES: states, REFERENCE: states[: None if self.recipe.carries_reference else self.check_rows].copy()}

    def __call__(self, carry: Carry, block: Block | HeadBlock) -> tuple[Carry, ModuleReport]:
        """Quantize a block and move on with its quantized outputs."""
        if isinstance(block, HeadBlock):
            return self._head(carry, block)
        run = partial(
            self._propagated if self.recipe.propagates else self._plain,
            states=carry[STATES],
            reference=carry[REFERENCE],
        )
        done = reduce(Outcome.joined, map(run, block.pieces(self.decoder)))
        error = mean_of_rows(self.rows.spans, read(errors_by_row(self.rows, done.states, done.wanted).parts()))
        notes = (*done.diagnostics, *starved_experts(block.spec, done.tokens))
        if self.recipe.tuning is not None and len(cut(block.spec)) > 1:
            notes = (*notes, f"{block.spec.key}: not tuned, since its experts do not fit in memory together")
        report = ModuleReport(
            key=block.spec.key,
            bits=done.bits,
            damping=done.damping,
            diagnostics=notes,
            tuning=done.tuning,
            own_norms=done.own_norms,
            largest_state=done.largest_state,
            largest_output=done.largest_output,
            **{"stream_error" if self.recipe.propagates else "rfn_error": error},
        )
        return {STATES: done.states, REFERENCE: done.reference}, report

    def _plain(self, piece: Piece, states: Stream, reference: Stream) -> "Outcome":
        """Towards the source's weights, all linears from one pass of the unquantized module over quantized states."""
        module, spec, params = piece.module, piece.spec, piece.params
        tables, wanted = group_tables(spec.groups, self.token_weights), states.like(*states.shape)
        found = collect(module, spec, params, self.rows, states, wanted, routed_only=self.routed_only, tables=tables)
        factors = [self.recipe.quantizer.factorize(hessian) for hessian in found.hessians]
        kernels = [[params[x.name]["kernel"] for x in group] for group in spec.groups]
        done = self._linears(piece, _Quantized(params, {}, {}), spec.groups, kernels, factors)
        full = piece.target(reference)
        piece.forward(reference, full)
        return self._outcome(piece, done, found.tokens[-len(spec.stages[-1]) :], states, full, wanted)

    def _propagated(self, piece: Piece, states: Stream, reference: Stream) -> "Outcome":
        """Towards the full-precision stream, stage after stage, each on inputs that are quantized already."""
        module, spec, params = piece.module, piece.spec, piece.params
        done, following, found = _Quantized(params, {}, {}), piece.target(reference), None
        strengths = Strengths(self.recipe.propagation, self.recipe.residual * module.residual_share)
        for stage, groups in enumerate(spec.stages):
            task = StageTask(
                module=module,
                spec=spec,
                stage=stage,
                params=params,
                quantized=done.params,
                rows=self.rows,
                states=states,
                reference=reference,
                strengths=strengths,
                routed_only=self.routed_only,
                tables=group_tables(groups, self.token_weights),
            )
            found = stage_terms(task, following if task.last else None)
            factors = [self.recipe.quantizer.factorize(terms.hessian) for terms in found.terms]
            targets = [
                corrected_targets([params[x.name]["kernel"] for x in group], factor, terms, strengths)
                for group, factor, terms in zip(groups, factors, found.terms, strict=True)
            ]
            done = self._linears(piece, done, groups, targets, factors)
        assert found is not None  # a module has stages
        last = found if self.recipe.tuning is None else found._replace(inputs=None)  # tuned norms change them
        return self._outcome(piece, done, found.tokens, states, following, following, last)

    def _linears(
        self,
        piece: Piece,
        done: "_Quantized",
        groups: Sequence[LinearGroup],
        targets: Sequence[Sequence[Any]],
        factors: Sequence[HessianFactor],
    ) -> "_Quantized":
        """Quantize the linears of some groups, each towards its target; the other parameters stay."""
        tasks = [
            (x, target, factor)
            for group, of_group, factor in zip(groups, targets, factors, strict=True)
            for x, target in zip(group, of_group, strict=True)
        ]

        def run(task: tuple[LinearSpec, jax.Array, HessianFactor]) -> Quantized:
            x, target, factor = task
            kernel = piece.params[x.name]["kernel"]
            setting, columns = self._settings(piece.spec)[x.name], feedback_of(x, self.outputs)
            return quantize(target, factor, setting, x, self.recipe.quantizer, kernel, columns)

        params, results = dict(done.params), dict(done.results)
        for (x, _, factor), result in zip(tasks, in_threads(run, tasks), strict=True):
            bias, _ = clamp_bias(x, piece.biases.get(x.name))
            params[x.name] = {"kernel": result.linear.weight} | ({} if bias is None else {"bias": bias})
            results[x.name] = result
            done.factors[x.name] = factor
        return _Quantized(params, results, done.factors)

    def _settings(self, spec: ModuleSpec) -> dict[str, QParams]:
        """The setting of each linear of a module by name."""
        return {name: q for slot in spec.slots for name, q in self.strategy[slot.key].items()}

    def _outcome(
        self,
        piece: Piece,
        done: "_Quantized",
        tokens: list[jax.Array],
        states: Stream,
        reference: Stream,
        wanted: Stream,
        last: StageTerms | None = None,
    ) -> "Outcome":
        """Run the quantized linears, from the inputs of the `last` stage where these are known, and store them."""
        done, tuned = self._tuned(piece, done, states, reference)
        out, module = piece.target(states), piece.module
        if last is None or last.inputs is None:
            tally = forward(module, done.params, states, out)
        else:
            tally = finish(module, done.params, states, last.inputs, out, last.tally)
        tally, counts, rows = read((tally, tokens, {name: x.checks for name, x in done.results.items()}))
        checks = {name: as_checks(row) for name, row in rows.items()}
        keys = {x.name: " and ".join(y.key for y in group) for group in piece.spec.groups for x in group}
        for linear in piece.spec.linears:
            require_sound(checks[linear.name], linear, keys[linear.name])
        require_finite(tally, piece.spec, "quantized")
        self._store(piece, done, tuned.pop("norms"))
        settings = self._settings(piece.spec)
        return Outcome(
            states=out,
            wanted=wanted,
            reference=reference,
            bits=sum(settings[x.name].total_bits(x.rows, x.columns) for x in piece.spec.linears),
            damping={name: found.damping for name, found in checks.items()},
            diagnostics=tuple(self._notes(piece, checks)),
            tokens=[round(float(n)) for n in counts],
            largest_state=float(tally.state),
            largest_output=float(tally.linear),
            **tuned,
        )

    def _notes(self, piece: Piece, checks: Mapping[str, Checks]) -> Iterator[str]:
        """Diagnostics of the linears of a piece."""
        for group in piece.spec.groups:
            yield from hessian_diagnostics(checks[group[0].name], group)
            for x in group:
                yield from linear_diagnostics(x, checks[x.name])
                yield from clamp_bias(x, piece.biases.get(x.name))[1]

    def _tuned(
        self, piece: Piece, done: "_Quantized", states: Stream, reference: Stream
    ) -> tuple["_Quantized", dict[str, Any]]:
        """Tune a module where the recipe says so: the result, and the record of it with the norms that changed.

        Pieces of a mixture are not tuned: the sum of their outputs is known only when the last one is stored.
        """
        if self.recipe.tuning is None or not piece.whole:
            return done, {"norms": ()}
        task = TuneTask(
            module=piece.module,
            spec=piece.spec,
            params=done.params,
            linears={name: result.linear for name, result in done.results.items()},
            states=states.array(),
            reference=reference.array(),
            mask=self.rows.mask.array(),
        )
        params, linears, result = task.run(self.recipe.tuning, self.seed)
        changed = () if result.values is None else result.values.norms
        norms = tuple(norm for norm in piece.spec.norms if norm.name in changed)
        results = {
            name: repacked(linear, done.factors[name], piece.params[name]["kernel"]) for name, linear in linears.items()
        }
        record = {
            "norms": norms,
            "tuning": {"before": result.before, "after": result.after, "steps": result.steps},
            "own_norms": tuple(norm.key for norm in norms),
        }
        return _Quantized(params, results, done.factors), record

    def _store(self, piece: Piece, done: "_Quantized", norms: Sequence[NormSpec]) -> None:
        """Write the packed linears and the changed norms, read from the device at once."""
        biases = {name: done.params[name].get("bias") for name in done.results}
        results = {x: (done.results[x.name].packed, done.results[x.name].linear.groups) for x in piece.spec.linears}
        values = {norm: done.params[norm.name] for norm in norms}

        def write() -> None:
            arrays = read([packed for packed, _ in results.values()])
            for (linear, (_, groups)), packed in zip(results.items(), arrays, strict=True):
                bias = biases[linear.name]
                self._write(linear, packed.stored(groups, None if bias is None else np.asarray(bias)))
            for norm, params in values.items():
                write_checked_tensors(tensor_file(self.out_tensor, norm.key), stored_norm(norm, params))

        self.later(write)

    def _head(self, carry: Carry, block: HeadBlock) -> tuple[Carry, ModuleReport]:
        kernel = block.params["lm_head"]["kernel"]
        qparams, quantizer = head_qparams(self.head_bits), self.recipe.quantizer
        packed, damping, diagnostics = quantize_head(
            self.decoder,
            block.spec,
            block.params,
            self.rows,
            carry[STATES],
            qparams,
            quantizer,
            reference=carry[REFERENCE] if self.recipe.carries_reference else None,
            strength=self.recipe.propagation,
        )
        self._write(block.spec, packed.packed)
        rows = min(self.check_rows, len(self.input_ids))
        ids, mask = self.input_ids[:rows], self.rows.mask.array(rows)
        params = {"norm": block.params["norm"], "lm_head": {"kernel": packed.weight}}
        full = {"norm": block.params["norm"], "lm_head": {"kernel": kernel}}
        report = ModuleReport(
            key=block.spec.key,
            bits=packed.packed.bits,
            damping=damping,
            diagnostics=diagnostics,
            perplexity=perplexity(score(self.decoder, params, carry[STATES].array(rows), ids).nll, mask),
            perplexity_full=perplexity(score(self.decoder, full, carry[REFERENCE].array(rows), ids).nll, mask),
        )
        return carry, report

    def _write(self, spec: LinearSpec, packed: PackedLinear) -> None:
        write_checked_tensors(tensor_file(self.out_tensor, spec.key), packed.tensors(spec.key))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of quantizing a module, or a piece of it.

    `states` are those after it, `wanted` those that they are judged by, `reference` the full-precision ones; `tokens`
    went into the Hessian of each group of the last stage; the rest is for the report.
    """

    states: Stream
    wanted: Stream
    reference: Stream
    bits: int
    damping: dict[str, float]
    diagnostics: tuple[str, ...]
    tokens: list[int]
    largest_state: float
    largest_output: float
    tuning: Mapping[str, float] | None = None
    own_norms: tuple[str, ...] = ()

    def joined(self, then: "Outcome") -> "Outcome":
        """Together with the next piece: states add up, the rest is put side by side."""
        wanted = added(self.wanted, then.wanted)
        return Outcome(
            states=added(self.states, then.states),
            wanted=wanted,
            reference=wanted if self.wanted is self.reference else added(self.reference, then.reference),
            bits=self.bits + then.bits,
            damping=self.damping | then.damping,
            diagnostics=self.diagnostics + then.diagnostics,
            tokens=self.tokens + then.tokens,
            largest_state=max(self.largest_state, then.largest_state),
            largest_output=max(self.largest_output, then.largest_output),
        )


class _Quantized(NamedTuple):
    """Parameters of a module with the linears so far quantized, the results of these, and the factors they rest on."""

    params: dict[str, Any]
    results: dict[str, Quantized]
    factors: dict[str, HessianFactor]
