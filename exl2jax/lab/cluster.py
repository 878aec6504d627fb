"""The same plan over many machines, by Ray (optional extra): a task per measurement and per cell.

The sweep's folder must be one that every node sees (a network file system), or every node keeps its own models; rows
come back through Ray and land in one table either way.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from exl2jax.errors import Interrupted, SettingsError
from exl2jax.lab.cell import ROW_NAME, Evaluator, failed_row
from exl2jax.lab.plan import Cell, Resources, SweepPlan
from exl2jax.lab.sweep import Runner, cell_folder, measure, measurement_folder, one_cell
from exl2jax.storage import make_directory, write_json
from exl2jax.stream.progress import RunControl

MISSING = "Ray is not installed; get it with: pip install 'exl2jax[ray]'"
POLL_SECONDS = 1.0


def ray_runner(address: str) -> Runner:
    """A runner on the Ray cluster at `address` (`auto`, `ray://HOST:PORT`, `HOST:PORT`, or `local` to start one)."""
    try:
        import ray  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise SettingsError(MISSING) from e
    return partial(_run_on_ray, address)


def _run_on_ray(address: str, plan: SweepPlan, cells: Sequence[Cell], out: Path, control: RunControl) -> None:
    import ray  # pyright: ignore[reportMissingImports]

    begun = not ray.is_initialized()
    if begun:
        ray.init(address=address, log_to_driver=False)
    try:
        _collect(plan, cells, out.resolve(), control)
    finally:
        if begun:
            ray.shutdown()


def _collect(plan: SweepPlan, cells: Sequence[Cell], out: Path, control: RunControl) -> None:
    """Start every task, and take the rows as they come."""
    import ray  # pyright: ignore[reportMissingImports]

    options = _options(plan.resources)
    measure_there, run_there = ray.remote(**options)(_measure_task), ray.remote(**options)(_cell_task)
    measurements: dict[str, Any] = {}
    waiting: dict[Any, Cell] = {}
    control.progress.start("sweep", len(cells), 0)
    for cell in cells:
        if cell.measurement not in measurements:
            measurements[cell.measurement] = measure_there.remote(cell, out)
        waiting[run_there.remote(plan, cell, out, measurements[cell.measurement])] = cell
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
        for task in done:
            cell = waiting.pop(task)
            control.progress.step(f"{cell.name}: {_row(task, cell, out)['status']}")
        if control.stop.asked and waiting:
            for task in waiting:
                ray.cancel(task, force=True)
            raise Interrupted(f"stopped with {len(waiting)} cells to go; run the same command to resume")
    control.progress.finish()


def _options(resources: Resources) -> dict[str, Any]:
    """A task that dies with its node is run again elsewhere, where it resumes from what the folder holds."""
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "memory": resources.memory_gb * 2**30 or None,
        "max_retries": resources.retries,
    }


def _row(task: Any, cell: Cell, out: Path) -> dict[str, Any]:
    """The row of a finished task, kept here too where the node's folder is not this one."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

    try:
        row: Any = ray.get(task)
    except RayError as e:
        return failed_row(cell, e, cell_folder(out, cell))
    folder = cell_folder(out, cell)
    if not (folder / ROW_NAME).exists():
        make_directory(folder, "the folder of a cell")
        write_json(folder / ROW_NAME, row)
    return row


def _measure_task(cell: Cell, out: Path) -> str | None:
    """Make a measurement on a node: None, or why it failed (which the cells then find out themselves)."""
    try:
        measure(cell, measurement_folder(out, cell), RunControl())
    except Exception as e:
        return str(e)
    return None


def _cell_task(plan: SweepPlan, cell: Cell, out: Path, _: str | None) -> dict[str, Any]:
    """Run a cell on a node, once its measurement is there."""
    return one_cell(plan, cell, out, Evaluator(cell), RunControl())
