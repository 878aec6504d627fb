"""The measurement record: for every module, its candidates with their cost and accuracy, in the stock JSON form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl2jax.errors import MeasurementError
from exl2jax.measure.sensitivity import SECTION, Sensitivity
from exl2jax.models import ModuleSpec, slots_of
from exl2jax.models.modules import (
    ATTENTION_KIND,
    BRANCH_ATTENTION_KINDS,
    SLIDING_KIND,
)
from exl2jax.qparams import QParams
from exl2jax.storage import read_json, write_json
from exl2jax.variants.candidates import STOCK_TABLE, Table

WITH_ATTENTION = (ATTENTION_KIND, SLIDING_KIND, *BRANCH_ATTENTION_KINDS)
"""Slots that take the rows of q, k, v, o; the others those of gate, up, down."""

METHOD = "method"
"""Key, in a measurement file, of the variants that made it."""

MIN_ERROR = 0.0
MIN_ACCURACY = 1e-6
"""Floor of an accuracy in the file, as stock writes it."""

PARALLEL = ".parallel_decoder."
"""Stock keeps attention and MLP of a parallel block as `attn` and `mlp` under one key."""

CLOSING_KEYS = ("model.norm.norm", "lm_head.linear")
"""Modules that stock lists with `null`: they are not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One setting of all linears of a module: `qparams` by linear name, bits on disk, accuracy in (0, 1].

    `cost` in nats stands in place of the accuracy where it is priced.
    """

    qparams: Mapping[str, QParams]
    total_bits: int
    accuracy: float = 1.0
    cost: float | None = None

    @property
    def error(self) -> float:
        """The cost or `1 - accuracy`, which allocation spends bits against."""
        return self.cost if self.cost is not None else max(1 - self.accuracy, MIN_ERROR)

    def to_json(self) -> dict[str, Any]:
        """The stock record."""
        head = {"accuracy": self.accuracy, "total_bits": self.total_bits}
        return head | {name.partition(".")[0]: qp.to_json() for name, qp in self.qparams.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The basis of the allocation: candidates by module key in module order (stock's), or costs of linears (ours).

    `method` names the variants that it was measured with, empty for stock's.
    """

    modules: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    method: str = ""

    def to_json(self, last_module_idx: int) -> dict[str, Any]:
        """The stock file, and our section beside; complete when `last_module_idx` is the head's index."""
        records: dict[str, Any] = {}
        for key, rows in self.modules.items():
            outer, branch = _split(key)
            found = [c.to_json() for c in rows]
            records[outer] = records.get(outer, {}) | {branch: found} if branch else found
        ours = {} if self.sensitivity is None else {SECTION: self.sensitivity.to_json()}
        made_by = {METHOD: self.method} if self.method else {}
        return {"measurement": records, "last_module_idx": last_module_idx, **made_by, **ours}

    def write(self, path: Path, specs: Sequence[ModuleSpec]) -> None:
        """Write the file; a complete measurement closes with the unmeasured norm and head."""
        done = [spec.index for spec in specs if all(slot.key in self.modules for slot in spec.slots)]
        record = self.to_json(done[-1] if done else 0)
        if len(done) == len(specs):
            record["measurement"] |= dict.fromkeys(_closing_keys(specs))
            record["last_module_idx"] += len(CLOSING_KEYS)
        write_json(path, record)


def module_bits(spec: ModuleSpec, qparams: Mapping[str, QParams]) -> int:
    """Bits on disk of a module under `qparams`."""
    return sum(qparams[linear.name].total_bits(linear.rows, linear.columns) for linear in spec.linears)


def candidate_rows(spec: ModuleSpec, table: Table = STOCK_TABLE) -> tuple[dict[str, QParams], ...]:
    """The candidates of a slot, one mapping per row of its part of the table; an MLP without a gate has none for it.

    All experts of a mixture take the same setting.
    """
    roles = list(dict.fromkeys(linear.role for linear in spec.linears))
    found = table.attention if spec.kind in WITH_ATTENTION else table.mlp
    rows = [dict(zip(roles, row[-len(roles) :], strict=True)) for row in found]
    return tuple({linear.name: row[linear.role] for linear in spec.linears} for row in rows)


def read_measurement(path: Path, specs: Sequence[ModuleSpec], *, partial: int | None = None) -> Measurement:
    """Read a measurement, ours or stock's, for the modules of a model.

    `partial` takes only that many modules from the front. Costs are counted anew from the shapes, so that a file of
    another model is noticed. Raises `MeasurementError` naming the file, the module and the fault.
    """
    record = _read(path)
    rows = record.get("measurement") if isinstance(record, dict) else None
    wanted = specs if partial is None else specs[:partial]
    sensitivity = _sensitivity(path, record, wanted)
    method = str(record.get(METHOD, "")) if isinstance(record, dict) else ""
    if sensitivity is not None and not rows:
        return Measurement(sensitivity=sensitivity, method=method)
    if not isinstance(rows, dict) or not rows:
        raise MeasurementError(f"{path}: holds no measurement; run the measurement pass again")
    known = {spec.key for spec in specs}
    extra = [key for key, found in rows.items() if key not in known and found is not None]
    if extra and partial is None:
        raise MeasurementError(f"{path}: module {extra[0]} is not in this model; the file belongs to another one")
    modules = {slot.key: _candidates(path, slot, _records(rows, slot.key)) for slot in slots_of(wanted)}
    return Measurement(modules=modules, sensitivity=sensitivity, method=method)


def read_sensitivity(path: Path, specs: Sequence[ModuleSpec]) -> Sensitivity | None:
    """The costs in a measurement file, whatever stock's records beside them; None where it has none."""
    return _sensitivity(path, _read(path), specs)


def _read(path: Path) -> Any:
    return read_json(path, MeasurementError, "the measurement file")


def _sensitivity(path: Path, record: Any, specs: Sequence[ModuleSpec]) -> Sensitivity | None:
    ours = record.get(SECTION) if isinstance(record, dict) else None
    return None if ours is None else Sensitivity.from_json(ours, specs, path)


def _split(key: str) -> tuple[str, str]:
    """The key of a file's record, and the branch of a parallel block within it; no branch for other modules."""
    outer, mark, branch = key.rpartition(PARALLEL)
    return (outer + PARALLEL[:-1], branch) if mark else (key, "")


def _records(rows: Mapping[str, Any], key: str) -> Any:
    outer, branch = _split(key)
    found = rows.get(outer)
    return found.get(branch) if branch and isinstance(found, dict) else found


def _closing_keys(specs: Sequence[ModuleSpec]) -> list[str]:
    prefix = specs[0].key.partition("model.layers.")[0]
    return [prefix + key for key in CLOSING_KEYS]


def _candidates(path: Path, spec: ModuleSpec, records: Any) -> tuple[Candidate, ...]:
    if not isinstance(records, list) or not records:
        raise MeasurementError(f"{path}: no candidates for {spec.key}; the file is incomplete or of another model")
    return tuple(_candidate(f"{path}: {spec.key}[{i}]", spec, record) for i, record in enumerate(records))


def _candidate(where: str, spec: ModuleSpec, record: Any) -> Candidate:
    roles = dict.fromkeys(linear.role for linear in spec.linears)
    if not isinstance(record, dict) or not all(role in record for role in roles):
        raise MeasurementError(f"{where}: must hold accuracy, total_bits and {', '.join(roles)}")
    accuracy = record.get("accuracy")
    if not isinstance(accuracy, int | float) or not 0 < accuracy <= 1:
        raise MeasurementError(f"{where}: accuracy must lie in (0, 1], got {accuracy!r:.40}")
    settings = {role: QParams.from_json(record[role], f"{where}.{role}") for role in roles}
    qparams = {linear.name: settings[linear.role] for linear in spec.linears}
    bits = module_bits(spec, qparams)
    if not any(linear.bias for linear in spec.linears) and record.get("total_bits") != bits:
        raise MeasurementError(
            f"{where}: total_bits is {record.get('total_bits')!r:.30}, this model's shapes give {bits}; "
            "the file belongs to another model"
        )
    return Candidate(qparams=qparams, total_bits=bits, accuracy=float(accuracy))
