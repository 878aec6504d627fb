"""The quantization pass: every linear at its chosen setting, on the states that the quantized model really has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, LinearSpec, ModuleSpec
from exl2jax.models.modules import NormSpec
from exl2jax.ops import HessianFactor, PackedLinear, QuantizedLinear
from exl2jax.qparams import QParams
from exl2jax.quantize.diagnostics import clamp_bias, hessian_diagnostics, linear_diagnostics, starved_experts
from exl2jax.quantize.head import quantize_head
from exl2jax.quantize.linear import Task, factor_hessian, module_factors, pack_checked, quantize_many
from exl2jax.quantize.propagate import StageTask, Strengths, corrected_target, finish, stage_terms
from exl2jax.quantize.report import ModuleReport
from exl2jax.quantize.store import stored_norm, tensor_file
from exl2jax.quantize.tune import TuneTask
from exl2jax.stock_tables import head_qparams
from exl2jax.storage import write_checked_tensors
from exl2jax.stream.blocks import Block, HeadBlock, Piece, cut
from exl2jax.stream.forward import Tally, errors_by_row, forward, mean_of_rows, require_finite
from exl2jax.stream.hessians import collect
from exl2jax.stream.scan import REFERENCE, STATES, Carry
from exl2jax.stream.scoring import perplexity, score
from exl2jax.stream.streams import Rows, Stream, added, read
from exl2jax.stream.token_classes import group_tables
from exl2jax.variants.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeStep:
    """The step of the quantization scan, with everything that stays the same through it.

    The carry holds the quantized model's states and, as `REFERENCE`, those of the full-precision one: of all rows where
    the recipe propagates errors or tunes, else of the `check_rows` that the final check runs on.
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
        errors = errors_by_row(self.rows, done.states, done.wanted)
        tally, parts, counts = read((done.tally, errors.parts(), done.tokens))
        require_finite(tally, block.spec, "quantized")
        error = mean_of_rows(self.rows.spans, parts)
        notes = (*done.diagnostics, *starved_experts(block.spec, [round(float(n)) for n in counts]))
        if self.recipe.tuning is not None and len(cut(block.spec)) > 1:
            notes = (*notes, f"{block.spec.key}: not tuned, since its experts do not fit in memory together")
        report = ModuleReport(
            key=block.spec.key,
            bits=done.bits,
            damping=done.damping,
            diagnostics=notes,
            tuning=done.tuning,
            own_norms=done.own_norms,
            **{"stream_error" if self.recipe.propagates else "rfn_error": error},
        )
        return {STATES: done.states, REFERENCE: done.reference}, report

    def _plain(self, piece: Piece, states: Stream, reference: Stream) -> "Outcome":
        """Towards the source's weights, all linears from one pass of the unquantized module over quantized states."""
        module, spec, params = piece
        tables, wanted = group_tables(spec.groups, self.token_weights), states.like(*states.shape)
        found = collect(module, spec, params, self.rows, states, wanted, routed_only=self.routed_only, tables=tables)
        factors = module_factors(spec, found.hessians, self.recipe.method)
        kernels = {linear.name: params[linear.name]["kernel"] for linear in spec.linears}
        done = self._linears(spec, spec.linears, params, kernels, factors)
        notes = [
            line
            for g, h in zip(spec.groups, found.hessians, strict=True)
            for line in hessian_diagnostics(h, factors[g[0].name], g)
        ]
        done = done._replace(diagnostics=(*done.diagnostics, *notes))
        full = piece.target(reference)
        piece.forward(reference, full)
        return self._outcome(piece, done, factors, found.tokens[-len(spec.stages[-1]) :], states, full, wanted)

    def _propagated(self, piece: Piece, states: Stream, reference: Stream) -> "Outcome":
        """Towards the full-precision stream, stage after stage, each on inputs that are quantized already."""
        module, spec, params = piece
        done, notes, following = _Quantized(params, {}, ()), list[str](), piece.target(reference)
        factors: dict[str, HessianFactor] = {}
        kernels = {x.name: jnp.asarray(params[x.name]["kernel"], jnp.float32) for x in spec.linears}
        strengths = Strengths(self.recipe.propagation, self.recipe.residual * module.residual_share)
        found = None
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
            targets = dict[str, jax.Array]()
            for group, terms in zip(groups, found.terms, strict=True):
                keys = " and ".join(linear.key for linear in group)
                factor = factor_hessian(terms.hessian, keys, self.recipe.method)
                notes += hessian_diagnostics(terms.hessian, factor, group)
                factors |= {x.name: factor for x in group}
                targets |= {x.name: corrected_target(kernels[x.name], factor, terms, strengths) for x in group}
            linears = [x for group in groups for x in group]
            now = self._linears(spec, linears, done.params, targets, factors)
            done = now._replace(linears={**done.linears, **now.linears})
            notes += now.diagnostics
        assert found is not None  # a module has stages
        done = done._replace(diagnostics=tuple(notes))
        kept = None if self.recipe.tuning else found.inputs  # tuned norms change them
        return self._outcome(piece, done, factors, found.tokens, states, following, following, kept)

    def _outcome(
        self,
        piece: Piece,
        done: "_Quantized",
        factors: Mapping[str, HessianFactor],
        tokens: list[jax.Array],
        states: Stream,
        reference: Stream,
        wanted: Stream,
        inputs: Sequence[Stream] | None = None,
    ) -> "Outcome":
        """Store the quantized linears and run them, from the `inputs` of the last stage where these are known."""
        params, kept = self._finish(piece, done, states, reference)
        out, module = piece.target(states), piece.module
        tally = forward(module, params, states, out) if inputs is None else finish(module, params, states, inputs, out)
        return Outcome(
            states=out,
            wanted=wanted,
            reference=reference,
            tally=tally,
            damping={name: float(factor.damping) for name, factor in factors.items()},
            diagnostics=done.diagnostics,
            tokens=tokens,
            **kept,
        )

    def _linears(
        self,
        spec: ModuleSpec,
        linears: Sequence[LinearSpec],
        params: Any,
        targets: Mapping[str, Any],
        factors: Mapping[str, HessianFactor],
    ) -> "_Quantized":
        """Quantize some linears of a module, whose other parameters stay."""
        settings = {name: q for slot in spec.slots for name, q in self.strategy[slot.key].items()}
        tasks = [Task(targets[x.name], factors[x.name], settings[x.name], x, self.recipe.method) for x in linears]
        out, results, diagnostics = dict(params), quantize_many(tasks), list[str]()
        for linear, result in zip(linears, results, strict=True):
            own = dict(params[linear.name])
            diagnostics += linear_diagnostics(linear, own["kernel"], result)
            bias, said = clamp_bias(linear, np.asarray(own["bias"]) if "bias" in own else None)
            diagnostics += said
            out[linear.name] = own | {"kernel": result.weight} | ({} if bias is None else {"bias": bias})
        return _Quantized(out, {x.name: r for x, r in zip(linears, results, strict=True)}, tuple(diagnostics))

    def _finish(
        self, piece: Piece, done: "_Quantized", states: Stream, reference: Stream
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tune a module where the recipe says so, pack, check and store it: its parameters, and what to report.

        Pieces of a mixture are not tuned: what they should give together is known only when the last one is stored.
        """
        spec, params, linears, report = piece.spec, done.params, done.linears, dict[str, Any]()
        norms: tuple[NormSpec, ...] = ()
        if self.recipe.tuning is not None and piece.whole:
            task = TuneTask(
                module=piece.module,
                spec=spec,
                params=params,
                linears=linears,
                states=states.array(),
                reference=reference.array(),
                mask=self.rows.mask.array(),
            )
            params, linears, result = task.run(self.recipe.tuning, self.seed)
            report["tuning"] = {"before": result.before, "after": result.after, "steps": result.steps}
            norms = () if result.values is None else tuple(n for n in spec.norms if n.name in result.values.norms)
        bits = 0
        for linear in spec.linears:
            packed = pack_checked(linears[linear.name], linear, params[linear.name].get("bias"))
            self._store(linear, packed.packed)
            bits += packed.packed.bits
        for norm in norms:
            write_checked_tensors(tensor_file(self.out_tensor, norm.key), stored_norm(norm, params[norm.name]))
        return params, report | {"bits": bits, "own_norms": tuple(norm.key for norm in norms)}

    def _head(self, carry: Carry, block: HeadBlock) -> tuple[Carry, ModuleReport]:
        kernel = block.params["lm_head"]["kernel"]
        qparams, method = head_qparams(self.head_bits), self.recipe.method
        packed, damping, diagnostics = quantize_head(
            self.decoder,
            block.spec,
            block.params,
            self.rows,
            carry[STATES],
            qparams,
            method,
            reference=carry[REFERENCE] if self.recipe.carries_reference else None,
            strength=self.recipe.propagation,
        )
        self._store(block.spec, packed.packed)
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

    def _store(self, spec: LinearSpec, packed: PackedLinear) -> None:
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
    tally: Tally
    bits: int
    damping: dict[str, float]
    diagnostics: tuple[str, ...]
    tokens: list[jax.Array]
    tuning: Mapping[str, float] | None = None
    own_norms: tuple[str, ...] = ()

    def joined(self, then: "Outcome") -> "Outcome":
        """Together with the next piece: states add up, the rest is put side by side."""
        wanted = added(self.wanted, then.wanted)
        return Outcome(
            states=added(self.states, then.states),
            wanted=wanted,
            reference=wanted if self.wanted is self.reference else added(self.reference, then.reference),
            tally=self.tally.joined(then.tally),
            bits=self.bits + then.bits,
            damping=self.damping | then.damping,
            diagnostics=self.diagnostics + then.diagnostics,
            tokens=self.tokens + then.tokens,
        )


class _Quantized(NamedTuple):
    """Parameters of a module with the linears so far quantized, those linears, and what there is to say of them."""

    params: dict[str, Any]
    linears: dict[str, QuantizedLinear]
    diagnostics: tuple[str, ...]
