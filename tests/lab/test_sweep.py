"""A sweep: its table, its failures, its resuming, and the bytes of a rerun."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from exl2jax import cli, evaluate
from exl2jax.errors import Interrupted, JobError, StorageError
from exl2jax.evaluation import load_eval_rows
from exl2jax.exl2.verify.directory import verify
from exl2jax.lab import SweepPlan, SweepResult, read_results, reproducible, run_sweep
from exl2jax.lab.estimate import estimate
from exl2jax.lab.results import SCHEMA
from exl2jax.stream.progress import RunControl


def rows_of(sweep: SweepResult) -> list[dict]:
    return read_results(sweep.table).to_pylist()


def the_bytes(table: Path) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(reproducible(read_results(table)), buffer)
    return buffer.getvalue()


class StopAfter:
    """Asks for a stop once a number of modules is done."""

    def __init__(self, modules: int) -> None:
        self.left = modules
        self.control = RunControl(progress=self)

    def start(self, stage: str, total: int, done: int) -> None: ...

    def finish(self) -> None: ...

    def step(self, message: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.control.stop.ask()


def test_the_table_says_it_all(sweep: SweepResult, plan: SweepPlan, tiny_llama: Path) -> None:
    rows = rows_of(sweep)
    assert [(r["variant"], r["bits"]) for r in rows] == [(c.variant, c.bits) for c in plan.cells()]
    assert [r["status"] for r in rows] == ["failed", *["ok"] * 5] and sweep.failed == 1
    for row in rows[1:]:
        folder = sweep.table.parent / row["output"]
        assert verify(folder).ok and row["bpw"] <= row["bits"]
        assert row["size"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        assert len(row["depth_error"]) == len(row["block_error"]) == 4 and len(row["domains"]) == 5
        assert all(row[f"{what}_{s}"] > 0 for what in ("seconds", "peak_memory") for s in ("measure", "evaluate"))
        assert not [name for name in SCHEMA.names if row[name] is None and name != "error"]
    best = rows[3]
    ids = load_eval_rows("heldout", tiny_llama, 64, 5).ids
    found = evaluate(sweep.table.parent / best["output"], ids, tiny_llama)
    assert (best["perplexity"], best["kl_divergence"]) == (found.perplexity, found.kl_divergence)
    assert best["perplexity_full"] == evaluate(tiny_llama, ids).perplexity


def test_a_failed_cell_says_why(sweep: SweepResult) -> None:
    row = rows_of(sweep)[0]
    assert "MeasurementError" in row["error"] and "raise `bits`" in row["error"]
    assert row["perplexity"] is None and json.loads(row["recipe"])["pricing"] == "accuracy"


def test_one_measurement_for_all_that_measure_the_same(sweep: SweepResult) -> None:
    rows = rows_of(sweep)
    assert len(list((sweep.table.parent / "measurements").iterdir())) == 2
    assert len({r["sha256_measurement"] for r in rows if r["variant"] != "stock"}) == 1


def test_interrupted_resumed_and_the_same_bytes(
    sweep: SweepResult, plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):  # in the stock measurement
        run_sweep(plan, tmp_path, StopAfter(2).control)
    assert read_results(tmp_path / "results.parquet").num_rows == 0
    with pytest.raises(Interrupted):  # in a later cell
        run_sweep(plan, tmp_path, StopAfter(12).control)
    done = read_results(tmp_path / "results.parquet").num_rows
    assert 1 <= done < 6
    result = run_sweep(plan, tmp_path)
    assert result.skipped == done - 1, "the failed cell is tried again"
    assert the_bytes(result.table) == the_bytes(sweep.table)
    from exl2jax.lab import cell

    monkeypatch.setattr(cell, "convert", lambda *_: pytest.fail("nothing is left to convert"))
    ready = replace(plan, variants=plan.variants[1:])
    again = run_sweep(ready, tmp_path)
    assert again.skipped == 4 and again.rows == result.rows[2:]


def test_reproducible_columns_are_those_without_time(sweep: SweepResult) -> None:
    names = reproducible(read_results(sweep.table)).column_names
    left = set(SCHEMA.names) - set(names)
    assert left == {n for n in SCHEMA.names if n.startswith(("seconds", "cpu_", "peak_", "tokens_per"))}


def test_models_need_not_stay(plan: SweepPlan, tmp_path: Path) -> None:
    small = replace(plan, keep=False, variants=plan.variants[1:2], targets=(4.5,))
    [row] = run_sweep(small, tmp_path).rows
    assert row["status"] == "ok" and row["output"] is None and not list(tmp_path.rglob("output*.safetensors"))


def test_estimates_before_and_after(sweep: SweepResult, plan: SweepPlan, tmp_path: Path) -> None:
    before = estimate(plan, tmp_path)
    assert all(not e.finished and e.seconds > 0 for e in before) and not list(tmp_path.iterdir())
    after = estimate(plan, sweep.table.parent)
    assert [e.finished for e in after] == [False, *[True] * 5]
    for guess, row in zip(after[1:], rows_of(sweep)[1:], strict=True):
        assert guess.size == pytest.approx(row["size"], rel=0.25), "headers weigh something in so small a model"
    from exl2jax.models import open_model

    big = np.prod(open_model(Path(plan.models[0])).embedding().shape) * 2
    assert all(e.size > big for e in before)


def test_one_sweep_at_a_time(plan: SweepPlan, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(JobError, match="another sweep"):
        run_sweep(plan, tmp_path)


def test_other_tables_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"cell": ["x"]}), tmp_path / "results.parquet")
    with pytest.raises(StorageError, match="not the results of a sweep"):
        read_results(tmp_path / "results.parquet")
    (tmp_path / "results.parquet").write_text("no")
    with pytest.raises(StorageError, match="cannot be read"):
        read_results(tmp_path / "results.parquet")


def test_command(sweep: SweepResult, plan: SweepPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.lab.conftest import TEXT

    path = tmp_path / "plan.toml"
    path.write_text(TEXT.format(model=plan.models[0]))
    out = str(sweep.table.parent)
    assert cli.main(["sweep", str(path), "--out", out, "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 6
    assert cli.main(["sweep", str(path), "--out", out, "--only", "fast"]) == 0
    shown = capsys.readouterr().out
    assert "fast" in shown and "stock" not in shown
    assert (sweep.table.parent / "report.html").exists()
    assert cli.main(["sweep", str(path), "--out", out, "--only", "nothing"]) == 2
    run_sweep(plan, sweep.table.parent)  # the whole table again, for other tests


def test_ray_says_how_to_get_it(plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from exl2jax.errors import SettingsError
    from exl2jax.lab.cluster import ray_runner

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"pip install 'exl2jax\[ray\]'"):
        ray_runner("auto")
