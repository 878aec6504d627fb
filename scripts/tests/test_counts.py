"""The counts of a conversion: calls and reads of known functions, launches of a known program, the table."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.bench import counts
from scripts.bench.launches import Launches, launches
from scripts.bench.traffic import CALLS, DOWN, PROGRAMS, READS, TIME, UP, Meter, Outermost, compiling, traffic

ROOT = Path(__file__).parents[2]


@jax.jit
def twice_of_counts(x: jax.Array) -> jax.Array:
    """A function that no other test calls."""
    return 2 * x


def test_calls_and_reads_by_module(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "kept.json")
    with compiling(meter), traffic(meter):
        meter.start("price", 2, 0)
        x = np.ones((4, 8), np.float32)
        y = twice_of_counts(x)
        for _ in range(4):
            twice_of_counts(x)
        meter.step("model.layers.0.mlp: 4 bits")
        both = jax.device_get((jax.device_put(x), jax.device_put(x)))
        assert sum(part.sum() for part in both) == 64
        assert np.asarray(y).sum() == 64
        scalar = jax.device_put(np.float32(3))
        assert (float(scalar), int(scalar), bool(scalar)) == (3.0, 3, True)
        meter.step("model.layers.1.mlp: 4 bits")
    (_, name, _), (stage, first, called), (_, second, read) = meter.modules
    assert (name, stage, first, second) == ("", "price", "model.layers.0.mlp", "model.layers.1.mlp")
    assert called[CALLS] == 5 and called[PROGRAMS] == 1 and called[UP] == 5 * x.nbytes and READS not in called
    assert read[READS] == 5 and read[DOWN] == 3 * x.nbytes + 12 and read[UP] >= 2 * x.nbytes and CALLS not in read
    assert sum(count for name, count in meter.names.items() if "twice_of_counts" in name) == 1
    kept = json.loads((tmp_path / "kept.json").read_text())["modules"]
    assert kept == [list(module) for module in meter.modules] and kept[1][2][TIME] >= 0


def test_nothing_stays_replaced() -> None:
    before = (np.asarray, jax.device_put, jax.device_get)
    with traffic(Meter()):
        assert np.asarray is not before[0]
    assert (np.asarray, jax.device_put, jax.device_get) == before
    assert float(jnp.float32(2)) == 2.0


PROGRAM = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %c = f32[2]{0} constant({-1, 2}), metadata={op_name="jit(f)/jit(g)"}
  %m = f32[] constant(-1), metadata={op_name="jit(f)/jit(g)"}
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %b = f32[8]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2"
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %b)
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%fused
}

%empty (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

%twice (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %z = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %p)
  %w = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %x = f32[8]{0} get-tuple-element(%w), index=1
  %v = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %c = f32[8]{0} conditional(%zero, %x, %x), branch_computations={%empty, %twice}
  ROOT %d = f32[8]{0} call(%c), to_apply=%twice
}
"""


def test_launches_of_a_program() -> None:
    # Seven rounds of two, one round and condition of the loop of unknown length, the longer branch, the call.
    assert launches(PROGRAM) == Launches(7 * 2 + 3 + 2 + 2, unknown_loops=1)


def kept(folder: Path, programs: int, reads: int) -> Path:
    """A folder as `run` leaves it, of two stages and three blocks."""
    folder.mkdir()
    found = [
        ["price", f"model.layers.{layer}.{kind}", {"programs": programs * (layer == late), "reads": reads}]
        for kind, late in (("self_attn", 2), ("mlp", 1))
        for layer in range(3)
    ]
    (folder / "cold.json").write_text(json.dumps({"modules": [["start", "", {}], *found]}))
    return folder


def test_the_table_of_two_checkouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [kept(tmp_path / "before", 9, 5), kept(tmp_path / "after", 2, 1)]
    assert counts.main(["table", *map(str, folders), "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|  | before | after | at most |",
        "| --- | --- | --- | --- |",
        "| programs compiled, cold | 18 | 4 | 70 |",
        "| programs compiled after the second block of a kind | 9 | 2 | 0 |",
    ]
    assert counts.main(["table", *map(str, folders)]) == 0
    assert "programs compiled, cold" in capsys.readouterr().out


def test_seconds_of_calls_inside_others_count_once() -> None:
    """Two calls inside a third, a call after them, and a fourth around all."""
    clock = Outermost()
    calls = [(1.0, 2.0), (1.0, 4.0), (4.0, 5.0), (1.0, 6.5), (7.0, 8.0)]  # duration, end
    owned = [clock.own(duration, now) for duration, now in calls]
    assert owned == [1.0, 1.0, 2.0, 1.0, 2.0]


def test_launches_of_a_priced_linear() -> None:
    modules = [["price", "model.layers.0.self_attn", {"program 0": 7, "program 2": 4, "calls": 11}]]
    compiled = [{"launches": [100, 0]}, {"failed": "no"}, {"launches": [25, 0]}]
    assert counts.priced_launches({"modules": modules, "compiled": compiled}) == "200"
    compiled[2] = {"launches": [25, 1]}
    said = counts.priced_launches({"modules": modules, "compiled": compiled})
    assert said == "200, loops of unknown length counted once"


@pytest.mark.slow
def test_what_a_tiny_conversion_asks_of_its_device(tmp_path: Path) -> None:
    """Counts do not depend on sizes, so three tiny blocks stand for a large model; cached programs count too."""
    model = write_tiny_llama(tmp_path / "model", num_layers=3)
    command = [sys.executable, "-m", "scripts.bench.traffic", str(tmp_path / "found.json"), str(model), "--calls"]
    subprocess.run([*command, "--rows", "3", "--length", "32"], cwd=ROOT, timeout=900, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert counts.total(found, PROGRAMS) <= 70
    assert counts.late_programs(found) == 0
    assert max(called[CALLS] for _, called in counts.modules(found, "price")) <= 40
    assert max(called[CALLS] for _, called in counts.modules(found, "quantize")) <= 40
    assert counts.mean_reads(found) <= 3.5


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100", "rtx4090"])
def test_a_conversion_is_recorded_without_computing(tmp_path: Path, device: str) -> None:
    sizes = ["--width", "64", "--inner", "160", "--heads", "4", "--vocabulary", "320", "--length", "32"]
    command = [sys.executable, "-m", "scripts.bench.programs", str(tmp_path / "found.json"), *sizes, "--only-record"]
    command += ["--device", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{found['programs']} programs recorded" in done.stdout and found["programs"] > 10
    stages = {stage for stage, _, _ in found["modules"]}
    assert {"forward", "backward", "price", "quantize"} <= stages
    assert all(calls["calls"] > 0 for _, calls in counts.modules(found))
