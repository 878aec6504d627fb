"""The scripts of `examples/` do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from exl2jax.lab import SweepResult, read_plan, read_results

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plan_of_make_lab() -> None:
    plan = read_plan(EXAMPLES / "lab.toml")
    assert len(plan.cells()) == 3 * 3 * 2
    assert len({cell.measurement for cell in plan.cells()}) == 2 * 2, "two pricings, two seeds"


def test_reading_the_table(sweep: SweepResult) -> None:
    pytest.importorskip("pandas")
    found = script("read_table").main(str(sweep.table))
    rows = [row for row in read_results(sweep.table).to_pylist() if row["status"] == "ok"]
    assert len(found) == len(rows) == 5
    for _, line in found.iterrows():
        [row] = [r for r in rows if (r["bits"], r["variant"]) == (line.bits, line.variant)]
        assert (line.kl, line.perplexity) == (row["kl_divergence"], row["perplexity"])


def test_a_sweep_over_bits(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("sweep_over_bits").main(str(tiny_llama), tmp_path, [4.5])
    assert "4.50 bits" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
