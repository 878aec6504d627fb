"""The record of one module's quantization."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """The result of a module: bits on disk, error, damping, diagnostics, and for the head the final check.

    `rfn_error` is the relative Frobenius error of the module's output against the same module unquantized on the same
    input (stock's figure), `stream_error` that against the full-precision stream, everything before included; which of
    them there is depends on the recipe, and the head has none. The head has the perplexity of the quantized and of the
    full-precision model on the rows of the final check. `damping` is by linear; `diagnostics` says in words what was
    damped, clamped or never active. `largest_state` and `largest_output` are the greatest absolute values of the hidden
    states after the module and of its linears' outputs, in the quantized model. `tuning` has the block's squared output
    error on held-out rows before and after, `own_norms` the keys of norms that are stored with values of their own.
    """

    key: str
    bits: int
    rfn_error: float | None = None
    stream_error: float | None = None
    damping: Mapping[str, float] = field(default_factory=dict)
    diagnostics: tuple[str, ...] = ()
    perplexity: float | None = None
    perplexity_full: float | None = None
    tuning: Mapping[str, float] | None = None
    own_norms: tuple[str, ...] = ()
    largest_state: float | None = None
    largest_output: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as it stands in the work directory."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ModuleReport":
        """Read the record back."""
        return cls(**{**record, **{name: tuple(record[name]) for name in ("diagnostics", "own_norms")}})
