"""Run one cell: convert with the shared measurement, evaluate the result, put everything into one row."""

import json
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock

from exl2jax.conversion.convert import convert
from exl2jax.conversion.result import ConversionResult
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.errors import Interrupted, JobError
from exl2jax.evaluation import EvalRows, Evaluation, evaluate_one, load_eval_rows, reference_pass
from exl2jax.evaluation.perplexity import Reference
from exl2jax.lab.meter import Cost, metered
from exl2jax.lab.plan import Cell, settings_json
from exl2jax.storage import make_directory, read_json, remove, write_json
from exl2jax.storage.digests import digest
from exl2jax.stream.progress import RunControl
from exl2jax.version import VERSION

MEASUREMENT_NAME = "measurement.json"
COST_NAME = "cost.json"
ROW_NAME = "cell.json"
MODEL_NAME = "model"


class Evaluator:
    """The evaluation rows of a model and the full-precision model's pass over them, made when first needed."""

    def __init__(self, cell: Cell) -> None:
        """Keep the cell; nothing is read yet."""
        self._cell = cell
        self._ready: tuple[EvalRows, Reference] | None = None

    def ready(self) -> tuple[EvalRows, Reference]:
        """Rows and reference pass."""
        if self._ready is None:
            plan, model = self._cell.evaluation, Path(self._cell.model)
            rows = load_eval_rows(plan.source, model, plan.length, plan.rows)
            self._ready = rows, reference_pass(model, rows)
        return self._ready


def measure(cell: Cell, folder: Path, control: RunControl) -> Path:
    """The measurement that the cell shares with others; it is made in `folder` unless it is there already."""
    target = folder / MEASUREMENT_NAME
    make_directory(folder, "the folder of measurements")
    with FileLock(folder / ".lock"):  # cells that run side by side wait for the one that measures
        if not (folder / COST_NAME).exists():
            with metered() as cost:
                settings = cell.config(folder / "work", output_measurement=target, preset=cell.recipe.measuring)
                convert(settings, control)
            shutil.rmtree(folder / "work", ignore_errors=True)
            write_json(folder / COST_NAME, asdict(cost))  # last: its presence says that the measurement is complete
    return target


def run_cell(
    cell: Cell, measurement: Path, folder: Path, evaluator: Evaluator, control: RunControl, *, keep: bool
) -> dict[str, Any]:
    """Run a cell to its row, or to the row of its failure; `Interrupted` passes, with everything saved to resume."""
    try:
        row = _run(cell, measurement, folder, evaluator, control)
    except Interrupted:
        raise
    except Exception as e:  # the other cells go on after any failure
        return failed_row(cell, e, folder)
    if not keep:
        shutil.rmtree(folder / MODEL_NAME, ignore_errors=True)
        row["output"] = None
    write_json(folder / ROW_NAME, row)
    return row


def finished_row(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The row that an earlier run of the same cell left, unless it failed or there is none."""
    row = row_of(cell, folder)
    return row if row is not None and row["status"] == "ok" else None


def row_of(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The row that the last run of the cell left, None where there was none."""
    path = folder / ROW_NAME
    if not path.exists():
        return None
    row = read_json(path, JobError, "the row of a cell")
    return row if isinstance(row, dict) and row.get("cell") == cell.name else None


def failed_row(cell: Cell, error: BaseException, folder: Path) -> dict[str, Any]:
    """Leave and return the row of a cell that could not be finished."""
    row = {**_identity(cell), "status": "failed", "error": f"{type(error).__name__}: {error}"}
    make_directory(folder, "the folder of a cell")
    write_json(folder / ROW_NAME, row)
    return row


def _run(cell: Cell, measurement: Path, folder: Path, evaluator: Evaluator, control: RunControl) -> dict[str, Any]:
    make_directory(folder, "the folder of a cell")
    work, model = folder / "work", folder / MODEL_NAME
    with metered() as converting:
        result = convert(cell.config(work, measurement=measurement, compile_full=model), control)
    rows, reference = evaluator.ready()
    with metered() as evaluating:
        evaluation = evaluate_one(model, rows, reference)
    job = read_json(WorkDirectory(work).job_file, JobError, "the job file")
    remove(WorkDirectory(work).out_tensor)
    measuring = Cost(**read_json(measurement.parent / COST_NAME, JobError, "the cost of a measurement"))
    costs = {"measure": measuring, "quantize": converting, "evaluate": evaluating}
    return {
        **_identity(cell),
        "status": "ok",
        **_fingerprints(job["inputs"], result, measurement, rows),
        **_reached(cell, result),
        **_evaluated(evaluation, reference),
        **{f"{what}_{stage}": cost[what] for stage, c in costs.items() for cost in [asdict(c)] for what in cost},
    }


def _identity(cell: Cell) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "cell": cell.name,
        "model": cell.source,
        "variant": cell.variant,
        "preset": cell.recipe.name,
        "bits": cell.bits,
        "seed": cell.seed,
        "settings": settings_json(cell),
        "recipe": json.dumps(asdict(cell.recipe), sort_keys=True),
        "version_exl2jax": VERSION,
        "version_jax": jax.__version__,
        "version_jaxlib": version("jaxlib"),
        "version_numpy": np.__version__,
        "device": f"{device.platform}: {device.device_kind}, {platform.machine()}",
    }


def _fingerprints(
    inputs: dict[str, Any], result: ConversionResult, measurement: Path, rows: EvalRows
) -> dict[str, Any]:
    return {
        "sha256_model": inputs["model weights"],
        "sha256_tokenizer": inputs["tokenizer"],
        "sha256_calibration": ((result.calibration or {}).get("quantize") or {}).get("sha256"),
        "sha256_measurement": digest(measurement),
        "sha256_evaluation": rows.sha256,
    }


def _reached(cell: Cell, result: ConversionResult) -> dict[str, Any]:
    errors = result.rfn_error or result.stream_error or {}
    return {
        "output": f"cells/{cell.name}/{MODEL_NAME}",
        "bpw": result.bpw,
        "head_bits": result.head_bits,
        "size": result.size,
        "source_size": result.source_size,
        "calibration_perplexity": result.perplexity,
        "calibration_perplexity_full": result.perplexity_full,
        "block_error": [{"module": key, "error": error} for key, error in errors.items()],
        "warnings": list(result.warnings),
    }


def _evaluated(evaluation: Evaluation, reference: Reference) -> dict[str, Any]:
    names = (
        "perplexity",
        "perplexity_se",
        "kl_divergence",
        "kl_median",
        "kl_p90",
        "kl_p99",
        "top1_agreement",
        "tokens",
    )
    domain = ("perplexity", "kl_divergence", "tokens")
    return {
        **{name: getattr(evaluation, name) for name in names},
        "perplexity_full": reference.perplexity,
        "domains": [{"domain": d, **{n: getattr(f, n) for n in domain}} for d, f in evaluation.domains.items()],
        "depth_error": [{"module": key, "error": error} for key, error in evaluation.depth.items()],
        "tokens_per_second": evaluation.tokens_per_second,
    }
