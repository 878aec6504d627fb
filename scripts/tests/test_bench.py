"""The benchmark on tiny sizes: what it counts against counts from the tables, and what it prints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from exl2jax.errors import SettingsError
from exl2jax.estimate.work import candidates_work, distinct_settings, forward_work
from exl2jax.models import HFModel, module_specs, open_model
from exl2jax.stock_tables import ATTENTION, MLP
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import write_tiny
from scripts.bench import table as bench
from scripts.bench.rates import Rates
from scripts.bench.stages import PassSizes, measurement

RATES = Rates(products=1e9, elementwise=1e8, bandwidth=1e9)
"""Round figures in place of a measurement of the machine."""

KEYS = {"name", "seconds", "cpu_seconds", "limit_seconds", "ratio", "plain_seconds"}
LENGTH = 24


@pytest.fixture
def model(tiny_llama: Path) -> HFModel:
    found = open_model(tiny_llama)
    assert isinstance(found, HFModel)
    return found


def test_forward_work_of_a_row(model: HFModel) -> None:
    attention, mlp = module_specs(model.config)[:2]
    # Hidden size 64, four heads of 16 with two for keys and values, 160 inside; 300 causal pairs of 24 tokens.
    assert forward_work(attention, model.config, LENGTH).products == 2 * 24 * (64 * (64 + 32 + 32) + 64 * 64) + (
        2 * 2 * 300 * 4 * 16
    )
    assert forward_work(mlp, model.config, LENGTH).products == 2 * 24 * 3 * 64 * 160


def test_candidates_share_what_they_agree_in(model: HFModel) -> None:
    attention, mlp = module_specs(model.config)[:2]
    q, k, v, o = ({row[i] for row in ATTENTION} for i in range(4))
    projections = 64 * 64 * len(q) + 64 * 32 * (len(k) + len(v)) + 64 * 64 * len(set(ATTENTION))
    cores = len({row[:2] for row in ATTENTION}) + len({row[:3] for row in ATTENTION})
    assert candidates_work(attention, model.config, LENGTH).products == 48 * projections + 2 * 300 * 4 * 16 * cores
    assert {name: set(found) for name, found in distinct_settings(attention).items()} == {
        "q_proj": q,
        "k_proj": k,
        "v_proj": v,
        "o_proj": o,
    }
    gate, up = ({row[i] for row in MLP} for i in range(2))
    distinct = len(gate) + len(up) + len(set(MLP))
    assert candidates_work(mlp, model.config, LENGTH).products == 48 * 64 * 160 * distinct


def test_work_grows_with_rows_and_layers(model: HFModel) -> None:
    one = measurement(model, 2, PassSizes(measured=3, length=LENGTH))
    two = measurement(model, 4, PassSizes(measured=6, length=LENGTH))
    assert two.forward.products == 4 * one.forward.products
    assert one.forward.products < one.whole.products
    assert two.whole.elementwise == 2 * one.whole.elementwise  # rows cost GPTQ nothing


def test_only_modules_whose_work_is_counted(tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path, TINY["mixtral"]))
    assert isinstance(model, HFModel)
    with pytest.raises(SettingsError, match="self_attn: the benchmark counts"):  # attention that slides
        measurement(model, 2, PassSizes(measured=1, length=LENGTH))


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> dict[str, dict[str, Any]]:
    """The rows that the benchmark prints as JSON, by name."""
    monkeypatch.setattr(bench, "measure_rates", lambda: RATES)
    assert bench.main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rates"]["products"] == RATES.products
    for row in record["rows"]:
        assert set(row) >= KEYS
        assert row["ratio"] == pytest.approx(row["cpu_seconds"] / row["limit_seconds"])
    return {row["name"]: row for row in record["rows"]}


def test_passes(tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--quick", "--only", "stages", "--rows", "3,4", "--length", str(LENGTH))
    rows = run(capsys, monkeypatch, "--model", str(tiny_llama), *options)
    assert list(rows) == ["measure", "measure, all its work", "quantize", "quantize, all its work"]
    assert all(row["plain_seconds"] > 0 for row in rows.values())
    model = open_model(tiny_llama)
    assert isinstance(model, HFModel)
    forward = measurement(model, bench.BLOCK, PassSizes(measured=3, length=LENGTH)).forward
    assert rows["measure"]["limit_seconds"] == pytest.approx(forward.products / RATES.products)


def test_operations(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(capsys, monkeypatch, "--only", "operations", "--sizes", "64x32")
    assert list(rows) == [
        "hessian 64",
        "factorize 64",
        *(f"gptq 64x32 {width} bits" for width in bench.WIDTHS),
        "pack 64x32 4 bits",
    ]
    assert rows["gptq 64x32 4 bits"]["limit_seconds"] == pytest.approx(64 * 64 * 32 / 1e9 + 64 * 32 * 1079 / 1e8)
    assert all(row["plain_seconds"] > 0 for row in rows.values())


def test_parts_of_a_block(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(capsys, monkeypatch, "--model", str(tiny_llama), "--only", "parts", "--length", str(LENGTH))
    first = ("forward", "forward, bfloat16", "forward and Hessians", "error of the output")
    ends = (*first, "factors", "GPTQ", "packing and check")
    assert list(rows) == [f"{name} {end}" for name in ("attention", "MLP") for end in ends]
    assert all(row["limit_seconds"] > 0 for row in rows.values())


def test_a_run_kept_as_json_becomes_a_markdown_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = bench.row("gptq", bench.Spent(seconds=1.0, cpu_seconds=2.0), 0.5, 20.0)
    kept = tmp_path / "run.json"
    kept.write_text(json.dumps({"rates": {}, "rows": [dataclasses.asdict(row)]}))
    assert bench.main(["--markdown", str(kept)]) == 0
    assert "| gptq | 1 | 2 | 0.5 | 4.00 | 20 | 10.0 |" in capsys.readouterr().out
