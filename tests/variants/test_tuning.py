"""Tuning after quantization: the optimizer on a problem with a known answer, a module, and whole conversions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax import ConversionConfig, convert
from exl2jax.errors import Interrupted, SettingsError
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import build_decoder, module_specs, open_model
from exl2jax.quantize.report import ModuleReport
from exl2jax.storage import read_json
from exl2jax.stream.forward import embed, forward
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.stream.scoring import perplexity, score
from exl2jax.testing.states import stream_of
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants import choose
from exl2jax.variants.recipe import recipe_from
from exl2jax.variants.tuning import Tunable

ADAM = {"name": "adam", "steps": 6, "every": 2, "learning_rate": 4e-3}


def quadratic(judged: float) -> Tunable:
    """Distance to 0.2 for the steps, to `judged` for the held-out row."""
    return Tunable(
        start=jnp.zeros(3),
        rows=np.arange(4),
        batch=2,
        gradient=lambda v, rows: 2 * (v - 0.2),
        error=lambda v, rows: float(jnp.sum((v - judged) ** 2)),
    )


def adam(block: Tunable, **settings: Any):
    choice = choose("tuning", {"name": "adam", **settings})
    return choice.function(block, choice.settings)


def test_adam_reaches_the_optimum() -> None:
    found = adam(quadratic(0.2), steps=200, learning_rate=0.02, every=20)
    np.testing.assert_allclose(found.values, 0.2, atol=2e-3)
    assert found.after < 1e-4 < found.before


def test_nothing_gained_on_held_out_rows_keeps_the_start() -> None:
    found = adam(quadratic(-1.0), steps=200, learning_rate=0.02, every=5, patience=3)
    assert found.values is None and found.after == found.before
    assert found.steps == 15, "patience ended it"


@pytest.mark.parametrize("text", ["adam:steps=0", "adam:held_out=1", "adam:learning_rate=0", "adam:patience=0"])
def test_settings_out_of_range(text: str) -> None:
    with pytest.raises(SettingsError, match="adam"):
        choose("tuning", text)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ConversionConfig:
    model = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_layers=1)
    given: dict[str, Any] = {"dataset_rows": 6, "length": 32, "measurement_rows": 2, "measurement_length": 32}
    made = ConversionConfig(in_dir=model, out_dir=model.parent / "measure", preset="fast", bits=3.0, **given)
    path = model.parent / "m.json"
    convert(replace(made, output_measurement=path))
    return replace(made, measurement=path)


def tuned(base: ConversionConfig, folder: Path, control: RunControl | None = None, preset: str = "fast") -> Path:
    recipe = recipe_from({"preset": preset, "tuning": ADAM}, "mine")
    config = replace(base, preset=recipe, out_dir=folder / "work", compile_full=folder / "exl2", checkpoint_interval=0)
    convert(config, control)
    return folder / "exl2"


def reports(folder: Path) -> list[ModuleReport]:
    return [ModuleReport.from_json(x) for x in read_json(folder / "work" / "quantized.json", OSError, "reports")]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_a_tuned_conversion(base: ConversionConfig, tmp_path: Path, preset: str) -> None:
    out = tuned(base, tmp_path, preset=preset)
    assert verify(out).ok and verify(out).bits_per_weight <= 3.0
    found = reports(tmp_path)
    assert any(r.own_norms for r in found), "on noise at three bits something is gained"
    for report in found[:-1]:
        assert report.tuning is not None
        assert (report.tuning["after"] < report.tuning["before"]) == bool(report.own_norms)
    source, result = open_model(base.in_dir), open_model(out)
    key = next(key for r in found for key in r.own_norms)
    before, after = (m.files.read(f"{key}.weight").astype(np.float32) for m in (source, result))
    assert result.files.dtype(f"{key}.weight") == "F16" and not np.array_equal(before, after)
    np.testing.assert_allclose(after, before, rtol=0.05)


def test_a_stopped_tuned_conversion_ends_in_the_same_bytes(base: ConversionConfig, tmp_path: Path) -> None:
    whole = weights(tuned(base, tmp_path / "whole"))
    stop = StopFlag()
    stop.asked = True
    with pytest.raises(Interrupted):
        tuned(base, tmp_path / "again", RunControl(stop=stop))
    assert weights(tuned(base, tmp_path / "again")) == whole


def test_the_tuned_model_is_the_one_that_was_judged(base: ConversionConfig, tmp_path: Path) -> None:
    """The stored norms and maxima give, loaded anew, the calibration perplexity of the pass: bit for bit one model."""
    out = tuned(base, tmp_path)
    model = open_model(out)
    ids = load_file(tmp_path / "work" / "cal_data.safetensors")["input_ids"]
    decoder, states = build_decoder(model.config, base.precision), embed(model, ids)
    stream = stream_of(states)
    for spec in module_specs(model.config):
        forward(decoder.module(spec), jax.device_put(model.module_params(spec)), stream, stream)
    states = stream.array()
    rows = base.measurement_rows
    again = perplexity(score(decoder, model.head_params(), states[:rows], ids[:rows]).nll)
    assert again == pytest.approx(reports(tmp_path)[-1].perplexity, rel=1e-6)


def test_one_row_is_refused_at_once(base: ConversionConfig) -> None:
    recipe = recipe_from({"preset": "fast", "tuning": "adam"}, "mine")
    with pytest.raises(SettingsError, match="needs at least 2"):
        replace(base, preset=recipe, dataset_rows=1)
