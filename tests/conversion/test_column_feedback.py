"""Feedback between columns in whole conversions, by the preset `max`: it resumes, and serves every kind of module."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from exl2jax import ConversionConfig, convert
from exl2jax.errors import Interrupted, SettingsError
from exl2jax.exl2.verify.directory import verify
from exl2jax.pallas import dispatch
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import write_tiny
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants.recipe import find_recipe
from tests.conversion.test_convert import digests


class StopsIn:
    """Progress that asks to stop after the first module of a stage."""

    def __init__(self, stage: str, stop: StopFlag) -> None:
        self.wanted, self.stop, self.stage = stage, stop, ""

    def start(self, stage: str, total: int, done: int) -> None:
        self.stage = stage

    def step(self, message: str) -> None:
        if self.stage == self.wanted:
            self.stop.ask()

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ConversionConfig:
    folder = tmp_path_factory.mktemp("feedback")
    rows = np.random.default_rng(5).integers(0, 300, (6, 24)).astype(np.int64)
    save_file({"input_ids": rows}, folder / "rows.safetensors")
    return ConversionConfig(
        in_dir=write_tiny_llama(folder / "tiny"),
        out_dir=folder / "work",
        compile_full=folder / "exl2",
        cal_dataset=str(folder / "rows.safetensors"),
        bits=3.0,
        preset="max",
        measurement_rows=2,
        checkpoint_interval=0,
    )


@pytest.fixture(scope="module")
def converted(base: ConversionConfig) -> ConversionConfig:
    convert(base)
    return base


def under(base: ConversionConfig, folder: Path, **changes: object) -> ConversionConfig:
    return replace(base, out_dir=folder / "work", compile_full=folder / "exl2", **changes)  # type: ignore[arg-type]


def test_max_takes_it_and_leaves_nothing_behind(converted: ConversionConfig, tmp_path: Path) -> None:
    seconds = json.loads((converted.out_dir / "job_new.json").read_text())["records"]["seconds"]
    assert list(seconds) == ["forward", "backward", "price", "trace", "outputs", "quantize", "tune", "compile"]
    assert not (converted.out_dir / "outputs").exists() and not (converted.out_dir / "module_inputs.f32").exists()
    alone = under(converted, tmp_path, measurement=converted.out_dir / "measurement.json", preset="best")
    convert(alone)
    differ = [name for name in digests(alone.out_dir / "out_tensor") if _differs(converted, alone, name)]
    changed = {name.split(".")[-2] for name in differ if ".layers.0." in name}
    assert changed >= {"q_proj", "k_proj"} and "v_proj" not in changed


def _differs(a: ConversionConfig, b: ConversionConfig, name: str) -> bool:
    first, second = ((x.out_dir / "out_tensor" / name).read_bytes() for x in (a, b))
    return first != second


@pytest.mark.parametrize("stage", ["trace", "outputs", "quantize"])
def test_a_stop_in_each_stage_ends_in_the_same_bytes(converted: ConversionConfig, tmp_path: Path, stage: str) -> None:
    config, stop = under(converted, tmp_path, measurement=converted.out_dir / "measurement.json"), StopFlag()
    with pytest.raises(Interrupted, match=f"stopped in {stage}"):
        convert(config, RunControl(progress=StopsIn(stage, stop), stop=stop))
    convert(config)
    assert digests(config.out_dir / "out_tensor") == digests(converted.out_dir / "out_tensor")


@pytest.mark.parametrize("name", ["mixtral", "cohere"])
def test_experts_and_parallel_blocks(base: ConversionConfig, tmp_path: Path, name: str) -> None:
    config = under(base, tmp_path, in_dir=write_tiny(tmp_path / "tiny", TINY[name]), no_resume=True)
    convert(config)
    assert config.compile_full is not None and verify(config.compile_full).ok


def test_rows_too_short_for_an_ordinary_token_feed_nothing(base: ConversionConfig, tmp_path: Path) -> None:
    """No token lies beyond the eighth place: the same linears as without feedback, from the same measurement."""
    found = []
    for rows in (8, 0):
        folder = tmp_path / str(rows)
        known = tmp_path / "8" / "work" / "measurement.json"
        short = under(base, folder, length=8, measurement_length=8, variants=(f"output_rows={rows}",))
        convert(short if rows else replace(short, measurement=known))
        found.append(digests(folder / "work" / "out_tensor"))
        shutil.rmtree(folder / "exl2")
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_loops_of_a_gpu_without_kernels(
    converted: ConversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole conversion by both on the same processor: errors alike; sums have another order."""
    theirs = convert(converted).stream_error
    monkeypatch.setattr(dispatch, "choose_implementation", lambda device=None: "fused")
    ours = convert(under(converted, tmp_path)).stream_error
    assert not verify(tmp_path / "exl2").faults
    assert ours and theirs and ours != theirs
    for key, error in ours.items():
        assert error == pytest.approx(theirs[key], rel=0.1)


def test_another_rounding_goes_without() -> None:
    recipe = find_recipe("max")
    assert recipe == find_recipe("best").over((), name="max", output_rows=8, tuned_steps=60)
    assert find_recipe("best").quantizing_passes == ("quantize", "tune")
    assert recipe.output_rows == 8 and recipe.quantizing_passes == ("trace", "outputs", "quantize", "tune")
    descent = recipe.with_choices({"rounding": "descent"})
    assert descent.output_rows == 0 and descent.quantizing_passes == ("quantize", "tune")
    with pytest.raises(SettingsError, match=r"output_rows needs rounding stock, .* not descent; add output_rows=0"):
        recipe.with_choices({"rounding": "descent", "output_rows": "4"})
    with pytest.raises(SettingsError, match="output_rows is -1; it must be at least 0"):
        recipe.with_choices({"output_rows": -1})
