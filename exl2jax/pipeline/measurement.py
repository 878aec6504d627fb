"""The measurement record: for every module, its candidates with their cost and accuracy, in the stock JSON form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl2jax.candidates import ATTENTION, MLP
from exl2jax.errors import MeasurementError
from exl2jax.models import ModuleSpec
from exl2jax.models.modules import ATTENTION_KIND, MLP_KIND, SLIDING_KIND
from exl2jax.pipeline.sensitivity import SECTION, Sensitivity
from exl2jax.qparams import QParams
from exl2jax.storage import read_json, write_json

TABLES = {ATTENTION_KIND: ATTENTION, SLIDING_KIND: ATTENTION, MLP_KIND: MLP}

MIN_ERROR = 0.0
MIN_ACCURACY = 1e-6
"""Floor of an accuracy in the file, as stock writes it."""

CLOSING_KEYS = ("model.norm.norm", "lm_head.linear")
"""Modules that stock lists with `null`: they are not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One setting of all linears of a module: `qparams` by linear name, bits on disk, accuracy in (0, 1]."""

    qparams: Mapping[str, QParams]
    total_bits: int
    accuracy: float

    @property
    def error(self) -> float:
        """`1 - accuracy`, what allocation spends bits against."""
        return max(1 - self.accuracy, MIN_ERROR)

    def to_json(self) -> dict[str, Any]:
        """The stock record."""
        head = {"accuracy": self.accuracy, "total_bits": self.total_bits}
        return head | {name: qp.to_json() for name, qp in self.qparams.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What bits are allocated by: candidates by module key in module order (stock's), or costs of linears (ours)."""

    modules: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None

    def to_json(self, last_module_idx: int) -> dict[str, Any]:
        """The stock file, and our section beside; complete when `last_module_idx` is the head's index."""
        records: dict[str, Any] = {key: [c.to_json() for c in rows] for key, rows in self.modules.items()}
        ours = {} if self.sensitivity is None else {SECTION: self.sensitivity.to_json()}
        return {"measurement": records, "last_module_idx": last_module_idx, **ours}

    def write(self, path: Path, specs: Sequence[ModuleSpec]) -> None:
        """Write the file; a complete measurement closes with the unmeasured norm and head."""
        record = self.to_json(len(self.modules))
        if self.modules and len(self.modules) == len(specs):
            record["measurement"] |= dict.fromkeys(CLOSING_KEYS)
            record["last_module_idx"] = len(specs) + len(CLOSING_KEYS)
        write_json(path, record)


def module_bits(spec: ModuleSpec, qparams: Mapping[str, QParams]) -> int:
    """Bits on disk of a module under `qparams`."""
    return sum(qparams[linear.name].total_bits(linear.rows, linear.columns) for linear in spec.linears)


def candidate_rows(spec: ModuleSpec) -> tuple[dict[str, QParams], ...]:
    """The stock candidates of a module, one mapping per row of its table; an MLP without a gate has none for it."""
    names = [linear.name for linear in spec.linears]
    return tuple(dict(zip(names, row[-len(names) :], strict=True)) for row in TABLES[spec.kind])


def read_measurement(path: Path, specs: Sequence[ModuleSpec], *, partial: int | None = None) -> Measurement:
    """Read a measurement, ours or stock's, for the modules of a model.

    `partial` takes only that many modules from the front. Costs are counted anew from the shapes, so that a file of
    another model is noticed. Raises `MeasurementError` naming the file, the module and what is wrong.
    """
    record = _read(path)
    rows = record.get("measurement") if isinstance(record, dict) else None
    wanted = specs if partial is None else specs[:partial]
    sensitivity = _sensitivity(path, record, wanted)
    if sensitivity is not None and not rows:
        return Measurement(sensitivity=sensitivity)
    if not isinstance(rows, dict) or not rows:
        raise MeasurementError(f"{path}: holds no measurement; run the measurement pass again")
    extra = [k for k in rows if k not in {s.key for s in specs} | set(CLOSING_KEYS)]
    if extra and partial is None:
        raise MeasurementError(f"{path}: module {extra[0]} is not in this model; the file belongs to another one")
    modules = {spec.key: _candidates(path, spec, rows.get(spec.key)) for spec in wanted}
    return Measurement(modules=modules, sensitivity=sensitivity)


def read_sensitivity(path: Path, specs: Sequence[ModuleSpec]) -> Sensitivity | None:
    """The costs in a measurement file, whatever stock's records beside them; None where it has none."""
    return _sensitivity(path, _read(path), specs)


def _read(path: Path) -> Any:
    return read_json(path, MeasurementError, "the measurement file")


def _sensitivity(path: Path, record: Any, specs: Sequence[ModuleSpec]) -> Sensitivity | None:
    ours = record.get(SECTION) if isinstance(record, dict) else None
    return None if ours is None else Sensitivity.from_json(ours, specs, path)


def _candidates(path: Path, spec: ModuleSpec, records: Any) -> tuple[Candidate, ...]:
    if not isinstance(records, list) or not records:
        raise MeasurementError(f"{path}: no candidates for {spec.key}; the file is incomplete or of another model")
    return tuple(_candidate(f"{path}: {spec.key}[{i}]", spec, record) for i, record in enumerate(records))


def _candidate(where: str, spec: ModuleSpec, record: Any) -> Candidate:
    names = [linear.name for linear in spec.linears]
    if not isinstance(record, dict) or not all(name in record for name in names):
        raise MeasurementError(f"{where}: must hold accuracy, total_bits and {', '.join(names)}")
    accuracy = record.get("accuracy")
    if not isinstance(accuracy, int | float) or not 0 < accuracy <= 1:
        raise MeasurementError(f"{where}: accuracy must lie in (0, 1], got {accuracy!r:.40}")
    qparams = {name: QParams.from_json(record[name], f"{where}.{name}") for name in names}
    bits = module_bits(spec, qparams)
    if not any(linear.bias for linear in spec.linears) and record.get("total_bits") != bits:
        raise MeasurementError(
            f"{where}: total_bits is {record.get('total_bits')!r:.30}, this model's shapes give {bits}; "
            "the file belongs to another model"
        )
    return Candidate(qparams=qparams, total_bits=bits, accuracy=float(accuracy))
