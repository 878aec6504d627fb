"""The quantization pass: every linear at its chosen setting, on the states that the quantized model really has."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.candidates import head_qparams
from exl2jax.errors import NumericalError
from exl2jax.models import Decoder, LinearSpec, ModuleSpec
from exl2jax.ops import HessianFactor, PackedLinear
from exl2jax.pipeline.head import quantize_head
from exl2jax.pipeline.linear import Task, factor_hessian, pack_checked, quantize_many
from exl2jax.pipeline.measure import STATES, Block, module_factors
from exl2jax.pipeline.propagate import Strengths, corrected_target, stage_terms
from exl2jax.pipeline.recipe import Recipe
from exl2jax.pipeline.scan import Carry
from exl2jax.pipeline.scoring import perplexity, score
from exl2jax.pipeline.stream import collect, forward, relative_error
from exl2jax.pipeline.trouble import clamp_bias, hessian_trouble, linear_trouble, starved_experts
from exl2jax.qparams import QParams
from exl2jax.storage import write_checked_tensors

REFERENCE = "ref"
"""Name, in a carry, of the full-precision states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """What became of a module: bits on disk, error, damping, trouble, and for the head the final check.

    `rfn_error` is the relative Frobenius error of the module's output against the same module unquantized on the same
    input (stock's figure), `stream_error` that against the full-precision stream, everything before included; which of
    them there is depends on the recipe, and the head has none. The head has the perplexity of the quantized and of the
    full-precision model on the rows of the final check. `damping` is by linear; `trouble` says in words what was
    damped, clamped or never active.
    """

    key: str
    bits: int
    rfn_error: float | None = None
    stream_error: float | None = None
    damping: Mapping[str, float] = field(default_factory=dict)
    trouble: tuple[str, ...] = ()
    perplexity: float | None = None
    perplexity_full: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as it stands in the work directory."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ModuleReport":
        """Read the record back."""
        return cls(**{**record, "trouble": tuple(record["trouble"])})


class HeadBlock(NamedTuple):
    """The head and its parameters (final norm included), the last block of the pass."""

    spec: LinearSpec
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeStep:
    """The step of the quantization scan, with everything that stays the same through it.

    The carry holds the quantized model's states and, as `REFERENCE`, those of the full-precision one: of all rows where
    the recipe propagates errors, else of the `check_rows` that the final check runs on.
    """

    decoder: Decoder
    recipe: Recipe
    strategy: Mapping[str, Mapping[str, QParams]]
    head_bits: int
    input_ids: np.ndarray
    mask: np.ndarray | None
    out_tensor: Path
    check_rows: int
    routed_only: bool = True

    def start(self, states: np.ndarray) -> Carry:
        """The carry before the first module, from the embedded rows."""
        return {STATES: states, REFERENCE: states[: None if self.recipe.propagates else self.check_rows].copy()}

    def __call__(self, carry: Carry, block: Block | HeadBlock) -> tuple[Carry, ModuleReport]:
        """Quantize a block and move on with its quantized outputs."""
        if isinstance(block, HeadBlock):
            return self._head(carry, block)
        carry, report = (self._propagated if self.recipe.propagates else self._plain)(carry, block)
        if not np.isfinite(carry[STATES]).all():
            raise NumericalError(f"{block.spec.key}: the quantized output holds NaN or infinity")
        return carry, report

    def _plain(self, carry: Carry, block: Block) -> tuple[Carry, ModuleReport]:
        """Towards the source's weights, all linears from one pass of the unquantized module over quantized states."""
        spec, states = block.spec, carry[STATES]
        params = jax.device_put(block.params)
        collected = collect(self.decoder, spec, params, states, self.mask, routed_only=self.routed_only)
        factors = module_factors(spec, collected.hessians, self.recipe.method)
        kernels = {linear.name: params[linear.name]["kernel"] for linear in spec.linears}
        quantized, bits, trouble = self._linears(spec, spec.linears, params, kernels, factors)
        reference = forward(self.decoder, spec.kind, params, carry[REFERENCE])
        states = forward(self.decoder, spec.kind, quantized, states, out=states)
        error = relative_error(states, collected.states, self.mask)
        trouble += [
            line
            for g, h in zip(spec.groups, collected.hessians, strict=True)
            for line in hessian_trouble(h, factors[g[0].name], g)
        ]
        trouble += starved_experts(spec, collected.tokens)
        report = _report(spec, bits, factors, trouble, rfn_error=error)
        return {STATES: states, REFERENCE: reference}, report

    def _propagated(self, carry: Carry, block: Block) -> tuple[Carry, ModuleReport]:
        """Towards the full-precision stream, stage after stage, each on inputs that are quantized already."""
        spec, states, reference = block.spec, carry[STATES], carry[REFERENCE]
        params = jax.device_put(block.params)
        quantized, bits, said, tokens, following = params, 0, list[str](), list[int](), reference
        factors: dict[str, HessianFactor] = {}
        kernels = {x.name: jnp.asarray(params[x.name]["kernel"], jnp.float32) for x in spec.linears}
        share = self.decoder.residual_share(spec.kind)
        strengths = Strengths(self.recipe.propagation, self.recipe.residual * share)
        for stage, groups in enumerate(spec.stages):
            found = stage_terms(
                self.decoder,
                spec,
                stage,
                params,
                quantized,
                states,
                reference,
                self.mask,
                strengths,
                routed_only=self.routed_only,
            )
            targets = dict[str, jax.Array]()
            for group, terms in zip(groups, found.terms, strict=True):
                keys = " and ".join(linear.key for linear in group)
                factor = factor_hessian(terms.hessian, keys, self.recipe.method)
                said += hessian_trouble(terms.hessian, factor, group)
                factors |= {x.name: factor for x in group}
                targets |= {x.name: corrected_target(kernels[x.name], factor, terms, strengths) for x in group}
            linears = [x for group in groups for x in group]
            quantized, more, trouble = self._linears(spec, linears, quantized, targets, factors)
            bits, said, tokens, following = bits + more, said + trouble, tokens + found.tokens, found.reference
        states = forward(self.decoder, spec.kind, quantized, states, out=states)
        error = relative_error(states, following, self.mask)
        said += starved_experts(spec, tokens)
        return {STATES: states, REFERENCE: following}, _report(spec, bits, factors, said, stream_error=error)

    def _linears(
        self,
        spec: ModuleSpec,
        linears: Sequence[LinearSpec],
        params: Any,
        targets: Mapping[str, Any],
        factors: Mapping[str, HessianFactor],
    ) -> tuple[dict[str, Any], int, list[str]]:
        """Quantize, pack, check and store some linears: `params` with them replaced, bits on disk, and trouble."""
        settings = {name: q for slot in spec.slots for name, q in self.strategy[slot.key].items()}
        tasks = [Task(targets[x.name], factors[x.name], settings[x.name], x, self.recipe.method) for x in linears]
        out, bits, trouble = dict(params), 0, list[str]()  # norms and the like stay
        for linear, result in zip(linears, quantize_many(tasks), strict=True):
            own = dict(params[linear.name])
            trouble += linear_trouble(linear, own["kernel"], result)
            bias, said = clamp_bias(linear, np.asarray(own["bias"]) if "bias" in own else None)
            trouble += said
            packed = pack_checked(result, linear, bias)
            self._store(linear, packed.packed)
            out[linear.name] = own | {"kernel": packed.weight} | ({} if bias is None else {"bias": bias})
            bits += packed.packed.bits
        return out, bits, trouble

    def _head(self, carry: Carry, block: HeadBlock) -> tuple[Carry, ModuleReport]:
        kernel = block.params["lm_head"]["kernel"]
        qparams, method = head_qparams(self.head_bits), self.recipe.method
        packed, damping, trouble = quantize_head(
            self.decoder, block.spec, block.params, carry[STATES], self.mask, qparams, method
        )
        self._store(block.spec, packed.packed)
        rows = min(self.check_rows, len(self.input_ids))
        ids, mask = self.input_ids[:rows], None if self.mask is None else self.mask[:rows]
        params = {"norm": block.params["norm"], "lm_head": {"kernel": packed.weight}}
        full = {"norm": block.params["norm"], "lm_head": {"kernel": kernel}}
        report = ModuleReport(
            key=block.spec.key,
            bits=packed.packed.bits,
            damping=damping,
            trouble=trouble,
            perplexity=perplexity(score(self.decoder, params, carry[STATES][:rows], ids).nll, mask),
            perplexity_full=perplexity(score(self.decoder, full, carry[REFERENCE][:rows], ids).nll, mask),
        )
        return carry, report

    def _store(self, spec: LinearSpec, packed: PackedLinear) -> None:
        write_checked_tensors(self.out_tensor / f"{spec.key}.safetensors", packed.tensors(spec.key))


def _report(
    spec: ModuleSpec, bits: int, factors: Mapping[str, HessianFactor], trouble: Sequence[str], **errors: float
) -> ModuleReport:
    """The report of a module whose linears used `factors`."""
    damping = {name: float(factor.damping) for name, factor in factors.items()}
    return ModuleReport(key=spec.key, bits=bits, damping=damping, trouble=tuple(trouble), **errors)
