"""The preflight check: size, disk, memory, time and refusals of a conversion, before anything is computed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exl2jax.allocate.allocate import feasible_bpw, reach, reachable_budget
from exl2jax.allocate.strategy import Strategy
from exl2jax.calibration import CalibrationRows
from exl2jax.conversion.context import Context
from exl2jax.conversion.operations import Duration, Speed, durations, pass_operations
from exl2jax.conversion.refusals import early_notes, early_refusals, require_shards
from exl2jax.conversion.scans import TokenRows
from exl2jax.conversion.strategy import choose_strategy, limited_measurement, usable_pricing
from exl2jax.conversion.tune_pass import kept_weights, obstacle
from exl2jax.errors import Exl2JaxError, MeasurementError, SettingsError, StorageError
from exl2jax.estimate.plan import FLOAT, HELD, STORED
from exl2jax.exl2.compile import compiled_size, source_head
from exl2jax.models import head_spec, slots_of
from exl2jax.models.modules import embedding_shapes, head_norm_spec
from exl2jax.qparams import QParams, padded_columns
from exl2jax.quantize.diagnostics import calibration_shortage
from exl2jax.quantize.end_to_end import PIECE
from exl2jax.quantize.outputs import feeds_columns, sample_bytes
from exl2jax.quantize.propagate import kept_bytes
from exl2jax.stock_tables import head_qparams

PROGRAM = 900 * 10**6
"""Bytes of the interpreter, its packages and what is compiled."""

LOGITS = 5
"""Arrays of the logits' size that the gradient of a divergence holds, in the program that XLA compiles."""

HEADER = 160
"""Bytes of a safetensors header per tensor, at most: name, dtype, shape and place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """The result of the preflight check; sizes in bytes.

    `low_bpw` and `high_bpw` are the least and the most bits per weight of any allocation. `output_size` is that of the
    compiled weights: exact with a measurement (`output_exact`), otherwise the size of a fully spent budget, the most
    that they can take. `disk` is the largest size of work directory and result together, `memory` an estimate of the
    host memory. `refused` holds the errors that the conversion would raise, `warnings` its warnings.
    """

    bits: float
    low_bpw: float
    high_bpw: float
    output_size: int
    output_exact: bool
    source_size: int
    disk: int
    disk_free: int
    memory: int
    memory_present: int
    calibration_tokens: Mapping[str, int]
    durations: Mapping[str, Duration]
    refused: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return asdict(self)


def preflight(
    context: Context,
    rows: Mapping[str, CalibrationRows],
    speed: Speed | None = None,
    text: TokenRows | None = None,
) -> Preflight:
    """Check a conversion on the calibration rows of its passes, by name of the pass, and the `text` that it tunes on.

    A target out of reach is not raised but listed in `refused`. A measurement that the job names is read, and bits are
    allocated by it.
    """
    (low, high), exact, refused = _budget(context)
    disk, free = _disk(context, rows, high), _free(context)
    memory, present = _memory(context, rows), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tokens = {name: _tokens(each) for name, each in rows.items()}
    linears = [linear for spec in context.specs for linear in spec.linears]
    short = [f"{name} pass {line}" for name, count in tokens.items() for line in calibration_shortage(linears, count)]
    untuned = "" if text is None else obstacle(context, text)
    tight = [f"memory: about {memory / 1e9:.1f} GB are needed, this machine has {present / 1e9:.1f} GB"]
    return Preflight(
        bits=context.config.bits,
        low_bpw=low,
        high_bpw=high,
        output_size=_output_size(context, high) if exact is None else exact,
        output_exact=exact is not None,
        source_size=sum(path.stat().st_size for path in context.model.files.files),
        disk=disk,
        disk_free=free,
        memory=memory,
        memory_present=present,
        calibration_tokens=tokens,
        durations={} if speed is None else durations(pass_operations(context.config, context.model.config), speed),
        refused=tuple(str(e) for e in (*early_refusals(context), *refused, *_disk_refusals(context, disk, free))),
        warnings=(*early_notes(context), *short, *(tight if memory > present else []), *filter(None, [untuned])),
    )


def require_space(context: Context, rows: Mapping[str, CalibrationRows]) -> None:
    """Raise `StorageError` where the preflight check refuses for lack of disk space."""
    _, high = reach(context.specs, context.recipe.pricing, context.recipe.table, context.config.limits)
    for error in _disk_refusals(context, _disk(context, rows, high), _free(context)):
        raise error


def _budget(context: Context) -> tuple[tuple[float, float], int | None, list[Exl2JaxError]]:
    """Least and most bits per weight, the output size by a given measurement, and the refusals of the target."""
    config, specs, table = context.config, context.specs, context.recipe.table
    if config.measurement is None:
        within = reach(specs, context.recipe.pricing, table, config.limits)
        try:
            if config.output_measurement is None:
                reachable_budget(within, specs, config.bits)
        except MeasurementError as e:
            return within, None, [e]
        return within, None, []
    measurement = limited_measurement(context, config.measurement)
    pricing = usable_pricing(context, measurement)
    within = feasible_bpw(measurement, specs, pricing, table)
    try:
        strategy = choose_strategy(context, measurement, pricing)
        require_shards(context, chosen_qparams(context, strategy))
        return within, exact_size(context, strategy), []
    except (MeasurementError, SettingsError) as e:
        return within, None, [e]


def exact_size(context: Context, strategy: Strategy) -> int:
    """Bytes of the weight files that an allocation gives, headers included."""
    return compiled_size(context.model, chosen_qparams(context, strategy), shard_mb=context.config.shard_size)


def chosen_qparams(context: Context, strategy: Strategy) -> dict[str, QParams]:
    """The settings of an allocation and of the head, by the key of the linear."""
    chosen = {x.key: strategy.qparams[slot.key][x.name] for slot in slots_of(context.specs) for x in slot.linears}
    return {**chosen, head_spec(context.model.config).key: head_qparams(context.config.head_bits)}


def _disk_refusals(context: Context, disk: int, free: int) -> list[Exl2JaxError]:
    missing = disk - _present(context) - free
    if missing <= 0:
        return []
    return [
        StorageError(
            f"{context.config.out_dir}: {disk / 1e6:.0f} MB of disk are needed, {free / 1e6:.0f} MB are free; "
            f"free {missing / 1e6:.0f} MB more or choose another `out_dir`"
        )
    ]


def _linears_size(context: Context, high: float) -> int:
    """Bytes of the packed linears and the head, biases included, when the whole budget is spent."""
    weights = sum(spec.weights for spec in context.specs)
    head = head_spec(context.model.config)
    linears = [*(linear for spec in context.specs for linear in spec.linears), head]
    biases = sum(2 * padded_columns(linear.columns) for linear in linears if linear.bias)
    bits = int(weights * min(context.config.bits, high))
    return bits // 8 + head_qparams(context.config.head_bits).total_bits(head.rows, head.columns) // 8 + biases


def _output_size(context: Context, high: float) -> int:
    """Bytes of the compiled weights: packed linears, everything else as the source stores it, and headers."""
    model = context.model
    inner = [name for spec in context.specs for name in spec.plain]
    outer = [*embedding_shapes(model.config), *head_norm_spec(model.config).tensors, *model.copied()]
    tensors = sum(source_head(model, name).nbytes for name in (*inner, *outer))
    linears = sum(len(spec.linears) for spec in context.specs) + 1
    return _linears_size(context, high) + tensors + HEADER * (len(inner) + len(outer) + 6 * linears)


def _disk(context: Context, rows: Mapping[str, CalibrationRows], high: float) -> int:
    """Largest bytes of work directory and result: linears twice, states twice, and the inputs of all modules."""
    passing = 2 * _states(context, rows) + _inputs(context, rows)
    if context.config.output_measurement is not None:
        return passing
    return _linears_size(context, high) + _output_size(context, high) + passing


def _states(context: Context, rows: Mapping[str, CalibrationRows]) -> int:
    """Bytes of the hidden states in the largest checkpoint, the full-precision stream included."""
    streams = 2 if context.recipe.carries_reference else 1
    width = context.model.config.hidden_size
    return max((streams * each.input_ids.size * width * FLOAT for each in rows.values()), default=0)


def _inputs(context: Context, rows: Mapping[str, CalibrationRows]) -> int:
    """Bytes of the module inputs that a forward pass keeps for gradients, and of the gradients that are kept."""
    recipe, width = context.recipe, context.model.config.hidden_size
    counts = {"measure": recipe.fisher_rows if "forward" in recipe.passes else 0, "quantize": recipe.output_rows}
    tokens = {name: min(counts[name], len(x.input_ids)) * x.input_ids.shape[1] for name, x in rows.items()}
    linears = (x for spec in context.specs for x in spec.linears if feeds_columns(x))
    kept = sum(sample_bytes(linear, tokens.get("quantize", 0)) for linear in linears)
    return kept + max(tokens.values(), default=0) * width * FLOAT * (len(context.specs) + 1)


def _memory(context: Context, rows: Mapping[str, CalibrationRows]) -> int:
    """Estimated bytes of host memory.

    States twice, the inputs that propagation keeps of a module, and the larger of two: several copies of the largest
    module's weights and Hessian, or what GPTQ holds of the head. A tuning of the whole model comes later: its weights,
    three copies of the head, and the logits of a piece of text in all that is made of them.
    """
    module = max(spec.weights for spec in context.specs)
    widest = max(linear.rows for spec in context.specs for linear in spec.linears)
    table = context.model.config.vocab_size * context.model.config.hidden_size
    tokens = rows["quantize"].input_ids.size if "quantize" in rows and context.recipe.propagates else 0
    kept = max(kept_bytes(spec, tokens) for spec in context.specs)
    largest = max(FLOAT * (4 * module + 6 * widest**2), (STORED + HELD) * table)
    passes = 2 * _states(context, rows) + kept + largest
    logits = LOGITS * FLOAT * PIECE * context.model.config.vocab_size
    tuning = kept_weights(context) + (2 * FLOAT + STORED) * table + logits if context.recipe.tuned_steps else 0
    return max(passes, tuning) + PROGRAM


def _tokens(rows: CalibrationRows) -> int:
    return rows.input_ids.size if rows.attention_mask is None else int(rows.attention_mask.sum())


def _present(context: Context) -> int:
    """Bytes that an earlier run left in the work directory and the result; a resumed run does not need them again."""
    folders = [context.work.path, *([context.config.compile_full] if context.config.compile_full else [])]
    return sum(p.stat().st_size for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.is_file())


def _free(context: Context) -> int:
    """Free bytes on the disk of the work directory, which may not exist yet."""
    return shutil.disk_usage(_existing(context.config.out_dir)).free


def _existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists, which is on the same disk."""
    path = path.resolve()
    return next(p for p in (path, *path.parents) if p.is_dir())
