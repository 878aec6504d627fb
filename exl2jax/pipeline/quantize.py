"""The quantization pass: every linear at its chosen setting, on the states that the quantized model really has."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from exl2jax.candidates import head_qparams
from exl2jax.errors import NumericalError
from exl2jax.models import Decoder, LinearSpec, ModuleSpec
from exl2jax.ops import PackedLinear
from exl2jax.pipeline.head import quantize_head
from exl2jax.pipeline.linear import Task, pack_checked, quantize_many
from exl2jax.pipeline.measure import STATES, Block, module_factors
from exl2jax.pipeline.scan import Carry
from exl2jax.pipeline.scoring import perplexity, score
from exl2jax.pipeline.stream import collect, forward, relative_error
from exl2jax.qparams import QParams
from exl2jax.storage import write_checked_tensors

REFERENCE = "ref"
"""Name, in a carry, of the full-precision states of the rows that the final check runs on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """What became of a module: bits on disk, `rfn_error` (None for the head), damping by Hessian, and for the head the
    perplexity of the quantized and of the full-precision model on the final check's rows.
    """  # noqa: D205

    key: str
    bits: int
    rfn_error: float | None = None
    damping: tuple[float, ...] = ()
    attempts: int = 1
    perplexity: float | None = None
    perplexity_full: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as it stands in the work directory."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ModuleReport":
        """Read the record back."""
        return cls(**{**record, "damping": tuple(record["damping"])})


class HeadBlock(NamedTuple):
    """The head and its parameters (final norm included), the last block of the pass."""

    spec: LinearSpec
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeStep:
    """The step of the quantization scan, with everything that stays the same through it."""

    decoder: Decoder
    strategy: Mapping[str, Mapping[str, QParams]]
    head_bits: int
    input_ids: np.ndarray
    mask: np.ndarray | None
    out_tensor: Any

    def __call__(self, carry: Carry, block: Block | HeadBlock) -> tuple[Carry, ModuleReport]:
        """Quantize a block and move on with its quantized outputs."""
        return self._head(carry, block) if isinstance(block, HeadBlock) else self._module(carry, block)

    def _module(self, carry: Carry, block: Block) -> tuple[Carry, ModuleReport]:
        spec, states = block.spec, carry[STATES]
        params = jax.device_put(block.params)
        collected = collect(self.decoder, spec.kind, params, states, self.mask)
        factors = module_factors(spec, collected.first, collected.second)
        quantized, bits = self._linears(spec, params, factors)
        reference = forward(self.decoder, spec.kind, params, carry[REFERENCE])
        states = forward(self.decoder, spec.kind, quantized, states, out=states)
        if not np.isfinite(states).all():
            raise NumericalError(f"{spec.key}: the quantized output holds NaN or infinity")
        first, second = factors[spec.first[0].name], factors[spec.second.name]
        report = ModuleReport(
            key=spec.key,
            bits=bits,
            rfn_error=relative_error(states, collected.states, self.mask),
            damping=(float(first.damping), float(second.damping)),
            attempts=max(int(first.attempts), int(second.attempts)),
        )
        return {STATES: states, REFERENCE: reference}, report

    def _linears(self, spec: ModuleSpec, params: Any, factors: Any) -> tuple[dict[str, Any], int]:
        """Quantize, pack, check and store every linear: the parameters to go on with, and the bits on disk."""
        settings = self.strategy[spec.key]
        tasks = [Task(params[x.name]["kernel"], factors[x.name], settings[x.name], x) for x in spec.linears]
        out, bits = dict(params), 0  # norms and the like stay
        for linear, result in zip(spec.linears, quantize_many(tasks), strict=True):
            bias = params[linear.name].get("bias")
            packed = pack_checked(result, linear, None if bias is None else np.asarray(bias))
            self._store(linear, packed.packed)
            out[linear.name] = dict(params[linear.name]) | {"kernel": packed.weight}
            bits += packed.packed.bits
        return out, bits

    def _head(self, carry: Carry, block: HeadBlock) -> tuple[Carry, ModuleReport]:
        kernel = block.params["lm_head"]["kernel"]
        packed, damping = quantize_head(
            self.decoder, block.spec, block.params, carry[STATES], self.mask, head_qparams(self.head_bits)
        )
        self._store(block.spec, packed.packed)
        rows = len(carry[REFERENCE])
        ids, mask = self.input_ids[:rows], None if self.mask is None else self.mask[:rows]
        params = {"norm": block.params["norm"], "lm_head": {"kernel": packed.weight}}
        full = {"norm": block.params["norm"], "lm_head": {"kernel": kernel}}
        report = ModuleReport(
            key=block.spec.key,
            bits=packed.packed.bits,
            damping=damping,
            perplexity=perplexity(score(self.decoder, params, carry[STATES][:rows], ids).nll, mask),
            perplexity_full=perplexity(score(self.decoder, full, carry[REFERENCE], ids).nll, mask),
        )
        return carry, report

    def _store(self, spec: LinearSpec, packed: PackedLinear) -> None:
        write_checked_tensors(self.out_tensor / f"{spec.key}.safetensors", packed.tensors(spec.key))
