"""Run a plan: measurements shared by cells, cells one after the other, one table; finished cells are skipped."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from exl2jax.errors import Interrupted, JobError
from exl2jax.lab.cell import Evaluator, failed_row, finished_row, measure, row_of, run_cell
from exl2jax.lab.plan import Cell, SweepPlan
from exl2jax.lab.results import write_results
from exl2jax.storage import make_directory
from exl2jax.stream.progress import RunControl

log = logging.getLogger(__name__)

TABLE_NAME = "results.parquet"

type Runner = Callable[[SweepPlan, Sequence[Cell], Path, RunControl], None]
"""Runs unfinished cells in a sweep's folder, where each leaves its row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """Rows of a sweep in the plan's order, the path of its table, and the number of cells finished before."""

    rows: tuple[dict[str, Any], ...]
    table: Path
    skipped: int

    @property
    def failed(self) -> int:
        """Number of cells that could not be finished."""
        return sum(row["status"] != "ok" for row in self.rows)


def run_sweep(
    plan: SweepPlan, out: Path, control: RunControl | None = None, runner: Runner | None = None
) -> SweepResult:
    """Run every cell of a plan that `out` does not hold yet, and write the table of all of them.

    A failed cell is a row that says why, and is tried again next time. Raises `Interrupted` when `control.stop` was
    asked, with the table of what is done; the same call resumes. `JobError` when another sweep runs in `out`.
    """
    make_directory(out, "`out`")
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise JobError(f"{out}: another sweep is running here; wait or choose another `out`") from e
    with lock:
        cells = plan.cells()
        known = {cell.name: row for cell in cells if (row := finished_row(cell, cell_folder(out, cell)))}
        waiting = [cell for cell in cells if cell.name not in known]
        log.info("sweep: %d cells, %d finished before", len(cells), len(known))
        try:
            (runner or run_here)(plan, waiting, out, control or RunControl())
        finally:
            rows = tuple(row for cell in cells if (row := row_of(cell, cell_folder(out, cell))))
            write_results(out / TABLE_NAME, rows)
    return SweepResult(rows=rows, table=out / TABLE_NAME, skipped=len(known))


def run_here(plan: SweepPlan, cells: Sequence[Cell], out: Path, control: RunControl) -> None:
    """Run cells one after the other in this process; those of one measurement follow each other."""
    evaluators: dict[str, Evaluator] = {}
    for number, cell in enumerate(cells):
        log.info("sweep: cell %d of %d, %s", number + 1, len(cells), cell.name)
        evaluator = evaluators.setdefault(cell.model, Evaluator(cell))
        row = one_cell(plan, cell, out, evaluator, control)
        if row["status"] != "ok":
            log.warning("sweep: %s failed: %s", cell.name, row["error"])
        if control.stop.asked and number + 1 < len(cells):
            raise Interrupted(f"stopped after {number + 1} of {len(cells)} cells; run the same command to resume")


def one_cell(plan: SweepPlan, cell: Cell, out: Path, evaluator: Evaluator, control: RunControl) -> dict[str, Any]:
    """The measurement of a cell if it is not there yet, then the cell."""
    try:
        measurement = measure(cell, measurement_folder(out, cell), control)
    except Interrupted:
        raise
    except Exception as e:  # the cells of other measurements go on
        return failed_row(cell, e, cell_folder(out, cell))
    return run_cell(cell, measurement, cell_folder(out, cell), evaluator, control, keep=plan.keep)


def cell_folder(out: Path, cell: Cell) -> Path:
    """The folder of a cell's work directory, model and row."""
    return out / "cells" / cell.name


def measurement_folder(out: Path, cell: Cell) -> Path:
    """The folder of the measurement of a cell."""
    return out / "measurements" / cell.measurement
