"""Estimates of a plan: sizes from the shapes, times from operation counts and this machine's speed."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from exl2jax.estimate import Passes, Work, conversion_work
from exl2jax.estimate.devices import CORE
from exl2jax.lab.cell import finished_row
from exl2jax.lab.plan import Cell, SweepPlan
from exl2jax.lab.results import STAGES
from exl2jax.lab.sweep import cell_folder
from exl2jax.models import Model, head_spec, module_specs, open_model
from exl2jax.models.modules import embedding_shapes
from exl2jax.stock_tables import head_qparams

PROBE = 1024
SLOWER = CORE["products"] / CORE["elementwise"]
"""How many operations of a product one core does in the time of an element-wise one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A cell before it runs: bytes of its weight files, seconds, and whether it is finished already.

    Seconds hold the measurement for the first cell that needs it. They are rough: stages of `make lab` were off
    by up to a factor of two at the speed that fits the whole (docs/laboratory.md). Finished cells give the speed.
    """

    cell: str
    size: int
    seconds: float
    finished: bool


def estimate(plan: SweepPlan, out: Path) -> list[Estimate]:
    """Estimates of every cell of a plan."""
    cells = plan.cells()
    models = {cell.model: open_model(Path(cell.model)) for cell in cells}
    rows = {cell.name: finished_row(cell, cell_folder(out, cell)) for cell in cells}
    raw = {cell.name: _operations(cell, models[cell.model]) for cell in cells}
    speed = _observed_speed(cells, rows, raw) or _machine_speed()
    measured: set[str] = set()
    estimates = []
    for cell in cells:
        work = raw[cell.name]
        stages = [s for s in STAGES if s != "measure" or cell.measurement not in measured]
        measured.add(cell.measurement)
        done = rows[cell.name] is not None
        seconds = 0.0 if done else sum(work[s] for s in stages) / speed
        estimates.append(Estimate(cell=cell.name, size=_size(cell, models[cell.model]), seconds=seconds, finished=done))
    return estimates


def _size(cell: Cell, model: Model) -> int:
    weights = sum(spec.weights for spec in module_specs(model.config))
    head = head_spec(model.config)
    head_bits = head_qparams(cell.config(Path("unused")).head_bits).total_bits(head.rows, head.columns)
    width = {"F32": 4, "F16": 2, "BF16": 2}
    names = embedding_shapes(model.config)
    plain = sum(_count(shape) * width.get(model.files.dtype(name), 2) for name, shape in names.items())
    return int((weights * cell.bits + head_bits) / 8) + plain


def _count(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _operations(cell: Cell, model: Model) -> dict[str, float]:
    """Floating-point operations by stage, element-wise ones weighted by how slowly they go."""
    head, plan = head_spec(model.config), cell.evaluation
    passes = _passes(cell)
    counted = {name: _weighted(work) for name, work in conversion_work(model.config, cell.recipe, passes).items()}
    evaluated = (plan.rows or 24) * plan.length
    weights = sum(spec.weights for spec in module_specs(model.config))
    return {
        "measure": sum(operations for name, operations in counted.items() if name != "quantize"),
        "quantize": counted["quantize"],
        "evaluate": evaluated * (2 * weights + 4 * head.weights),
    }


def _weighted(work: Work) -> float:
    return work.products + SLOWER * work.elementwise


def _passes(cell: Cell) -> Passes:
    """The rows of a cell; its quantization's length serves both passes where they differ."""
    known = {name: cell.settings.get(name) for name in ("measurement_rows", "length")} | {
        "rows": cell.settings.get("dataset_rows")
    }
    return Passes(**{name: value for name, value in known.items() if value is not None})


def _observed_speed(
    cells: Sequence[Cell], rows: Mapping[str, dict[str, Any] | None], raw: Mapping[str, Mapping[str, float]]
) -> float | None:
    """Operations per second of the cells that are finished here."""
    done = [(rows[c.name], raw[c.name]) for c in cells if rows[c.name] is not None]
    seconds = sum(row[f"seconds_{s}"] for row, _ in done if row for s in ("quantize", "evaluate"))
    work = sum(operations[s] for _, operations in done for s in ("quantize", "evaluate"))
    return work / seconds if seconds else None


def _machine_speed() -> float:
    """Operations per second of a matrix product."""
    x = jnp.ones((PROBE, PROBE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    start = time.monotonic()
    for _ in range(3):
        product(x, x).block_until_ready()
    return 3 * 2 * PROBE**3 / (time.monotonic() - start)
