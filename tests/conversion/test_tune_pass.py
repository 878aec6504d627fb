"""Tuning of a whole model in conversions: on text of its own, resumable, and stored as it was judged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import ConversionConfig, convert
from exl2jax.calibration import CalibrationRows
from exl2jax.conversion import tune_pass
from exl2jax.conversion.context import Context
from exl2jax.conversion.result import ConversionResult
from exl2jax.conversion.scans import TokenRows
from exl2jax.errors import Interrupted, SettingsError
from exl2jax.evaluation import evaluate
from exl2jax.evaluation.logits import model_logits
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import open_model
from exl2jax.quantize.changes import Changes
from exl2jax.quantize.end_to_end import HEAD, Passage, QuantizedModel, learning_rate
from exl2jax.report.tables import conversion_table
from exl2jax.storage import read_checked_tensors
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import write_tiny
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants.recipe import find_recipe, recipe_from
from tests.conversion.test_column_feedback import StopsIn

STEPS, LENGTH, ROWS = 24, 32, 12
TUNED = recipe_from({"preset": "fast", "tuned_steps": STEPS}, "mine")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ConversionConfig:
    """A model that knows something of its rows, of which twelve are quantized on and the others are not."""
    folder = tmp_path_factory.mktemp("whole")
    ids = np.random.default_rng(5).integers(0, 300, (ROWS + STEPS + tune_pass.JUDGES, LENGTH)).astype(np.int64)
    save_file({"input_ids": ids}, folder / "rows.safetensors")
    return ConversionConfig(
        in_dir=write_tiny_llama(folder / "tiny"),
        out_dir=folder / "work",
        compile_full=folder / "exl2",
        cal_dataset=str(folder / "rows.safetensors"),
        bits=2.5,
        preset=TUNED,
        dataset_rows=ROWS,
        measurement_rows=2,
        checkpoint_interval=0,
    )


@pytest.fixture(scope="module")
def converted(base: ConversionConfig) -> tuple[ConversionConfig, ConversionResult]:
    return base, convert(base)


def under(base: ConversionConfig, folder: Path, **changes: Any) -> ConversionConfig:
    return replace(base, out_dir=folder / "work", compile_full=folder / "exl2", **changes)


def shards(config: ConversionConfig) -> dict[str, bytes]:
    assert config.compile_full is not None
    return {path.name: path.read_bytes() for path in sorted(config.compile_full.glob("*.safetensors"))}


def test_a_tuned_model_is_better_on_text_that_nothing_saw(
    converted: tuple[ConversionConfig, ConversionResult], tmp_path: Path
) -> None:
    config, result = converted
    assert result.tuned is not None and result.tuned["after"] < result.tuned["before"]
    assert (result.tuned["steps"], result.tuned["tokens"]) == (STEPS, STEPS * LENGTH)
    plain = under(config, tmp_path, preset="fast", measurement=config.out_dir / "measurement.json")
    convert(plain)
    assert config.compile_full is not None and plain.compile_full is not None
    other = np.random.default_rng(9).integers(0, 300, (16, LENGTH)).astype(np.int32)
    found, before = (evaluate(x, other, config.in_dir).kl_divergence for x in (config.compile_full, plain.compile_full))
    assert found is not None and before is not None and found < before
    assert verify(config.compile_full).ok


def test_the_stored_model_is_the_one_that_was_judged(converted: tuple[ConversionConfig, ConversionResult]) -> None:
    """The divergence on the judging pieces by whole passes of both directories, against the record."""
    config, result = converted
    assert result.tuned is not None and config.compile_full is not None
    ids = load_file(str(config.cal_dataset))["input_ids"][ROWS:].astype(np.int32)
    order = np.random.default_rng([config.seed, 0x74756E65]).permutation(len(ids))[: tune_pass.JUDGES]
    full, ours = (jax.nn.log_softmax(model_logits(x, ids[order])) for x in (config.in_dir, config.compile_full))
    found = float(jnp.mean(jnp.sum(jnp.exp(full) * (full - ours), axis=-1)))
    assert found == pytest.approx(result.tuned["after"], rel=2e-3)


def test_only_maxima_and_norms_change(converted: tuple[ConversionConfig, ConversionResult]) -> None:
    config, _ = converted
    assert config.compile_full is not None
    tuned = read_checked_tensors(config.out_dir / "tuned.safetensors")[0]
    assert {name.rpartition(".")[2] for name in tuned} == {"q_scale_max", "weight"}
    before = {}
    for path in (config.out_dir / "out_tensor").iterdir():
        before |= read_checked_tensors(path)[0]
    stored, source = open_model(config.compile_full), open_model(config.in_dir)
    for name, tensor in tuned.items():
        assert stored.files.dtype(name) == "F16" and np.array_equal(stored.files.read(name), tensor)
        old = before[name] if name in before else source.files.read(name)
        np.testing.assert_allclose(tensor.astype(np.float32), old.astype(np.float32), rtol=0.15, atol=1e-4)
    for name in before.keys() - tuned.keys():
        assert np.array_equal(stored.files.read(name), before[name])


def test_a_stop_while_tuning_ends_in_the_same_bytes(
    converted: tuple[ConversionConfig, ConversionResult], tmp_path: Path
) -> None:
    done, _ = converted
    config, stop = under(done, tmp_path, measurement=done.out_dir / "measurement.json"), StopFlag()
    with pytest.raises(Interrupted, match=f"stopped in tune after 1 of {STEPS} steps"):
        convert(config, RunControl(progress=StopsIn("tune", stop), stop=stop))
    saved = config.out_dir / "hidden_states.safetensors"
    assert saved.exists()
    convert(config)
    assert shards(config) == shards(done)
    again = under(done, tmp_path / "torn", measurement=done.out_dir / "measurement.json")
    stop = StopFlag()
    with pytest.raises(Interrupted):
        convert(again, RunControl(progress=StopsIn("tune", stop), stop=stop))
    torn = again.out_dir / "hidden_states.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    convert(again)
    assert shards(again) == shards(done), "a torn checkpoint is begun anew"


def test_weights_that_do_not_fit_are_read_again_for_every_step(
    converted: tuple[ConversionConfig, ConversionResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, _ = converted
    monkeypatch.setattr(tune_pass, "KEPT_BYTES", 0)
    config = under(done, tmp_path, measurement=done.out_dir / "measurement.json")
    convert(config)
    assert shards(config) == shards(done)


def test_data_without_more_rows_leaves_the_model_as_it_is(base: ConversionConfig, tmp_path: Path) -> None:
    rows = tmp_path / "few.safetensors"
    save_file({"input_ids": load_file(str(base.cal_dataset))["input_ids"][: ROWS + 3]}, rows)
    config = under(base, tmp_path, cal_dataset=str(rows))
    result = convert(config)
    assert result.tuned is not None and "holds 3 pieces of text" in result.tuned["reason"]
    assert result.tuned["reason"] in result.warnings
    plain = under(base, tmp_path / "plain", preset="fast", measurement=config.out_dir / "measurement.json")
    convert(plain)
    assert shards(config) == shards(plain)


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "qwen2", "starcoder2"])
def test_experts_biases_and_norms_with_offsets(base: ConversionConfig, tmp_path: Path, name: str) -> None:
    config = under(base, tmp_path, in_dir=write_tiny(tmp_path / "tiny", TINY[name]), bits=3.0)
    result = convert(config)
    assert config.compile_full is not None and verify(config.compile_full).ok
    assert result.tuned is not None and result.tuned["after"] <= result.tuned["before"]
    parts = {key.rpartition(".")[2] for key in read_checked_tensors(config.out_dir / "tuned.safetensors")[0]}
    assert parts == {"q_scale_max", "weight"} | ({"bias"} if name in ("qwen2", "starcoder2") else set())


def test_gradients_are_those_of_finite_differences(converted: tuple[ConversionConfig, ConversionResult]) -> None:
    """A step along the gradient of maxima, of a norm and of the final norm changes the divergence as it says."""
    config, _ = converted
    context = Context.open(config, RunControl())
    model: QuantizedModel = tune_pass._model(context)
    ids = np.random.default_rng(1).integers(0, 300, (tune_pass.JUDGES + 1, LENGTH)).astype(np.int32)
    _, (piece,) = tune_pass._texts(context, TokenRows(ids, np.ones(ids.shape, np.int32)))
    start = model.start().values
    _, gradients = model.gradients(start, piece)
    for place in (context.specs[0].key, context.specs[-1].key, HEAD):
        found = gradients[place]
        length = float(sum(jnp.sum(x**2) for x in jax.tree.leaves(found))) ** 0.5
        assert length > 0
        step = 0.02 / length
        ends = [_divergence(model, start | {place: _along(found, sign * step)}, piece) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(length**2, rel=0.05)


def _along(gradient: Changes, step: float) -> Changes:
    return jax.tree.map(lambda g: step * g, gradient)


def _divergence(model: QuantizedModel, values: dict[str, Changes], piece: Passage) -> float:
    return model.gradients(values, piece)[0]


def test_rows_that_another_pass_takes_are_left_out(base: ConversionConfig, tmp_path: Path) -> None:
    """The measurement takes the first two rows, the quantization twelve: the others are what is left."""
    from exl2jax.conversion.convert import _Conversion

    run = _Conversion(Context.open(under(base, tmp_path), RunControl()))
    ids = load_file(str(base.cal_dataset))["input_ids"]
    assert np.array_equal(run.rows.unseen(5).input_ids, ids[ROWS : ROWS + 5])
    assert isinstance(run.rows.build(measure=False), CalibrationRows)
    assert len(run.rows.unseen(10**6).input_ids) == len(ids) - ROWS


def test_a_short_text_gives_the_rows_that_it_has(base: ConversionConfig, tmp_path: Path) -> None:
    """Fewer than are asked for, and fewer than the default number of rows."""
    from exl2jax.conversion.convert import _Conversion

    words = np.random.default_rng(4).integers(0, 10**4, 400)
    (tmp_path / "short.txt").write_text(" ".join(map(str, words)))
    config = under(base, tmp_path, cal_dataset=str(tmp_path / "short.txt"), length=LENGTH, measurement_length=LENGTH)
    run = _Conversion(Context.open(config, RunControl()))
    seen, most = run.rows.build(measure=False).input_ids, run.rows.unseen(10**6).input_ids
    held = len(run.context.tokenizer.encode((tmp_path / "short.txt").read_text())) // LENGTH
    assert ROWS + 5 < held < 100 and len(most) == held - ROWS
    assert np.array_equal(run.rows.unseen(5).input_ids, most[:5])
    assert not {row.tobytes() for row in seen} & {row.tobytes() for row in most}


def test_presets_and_numbers() -> None:
    assert learning_rate(3.0) == 2 * learning_rate(4.0) == learning_rate(2.0) / 2 == 3e-3
    assert find_recipe("max").tuned_steps == 60 and find_recipe("best").tuned_steps == 20
    assert find_recipe("max").quantizing_passes[-1] == "tune"
    assert tune_pass.rows_to_tune(60, 512) == 34 and tune_pass.rows_to_tune(60, 100) == 68
    with pytest.raises(SettingsError, match="tuned_steps is -1; it must be at least 0"):
        find_recipe("best").with_choices({"tuned_steps": -1})


def test_the_summary_says_what_was_gained(converted: tuple[ConversionConfig, ConversionResult]) -> None:
    _, result = converted
    table = conversion_table(result)
    assert "tuned as a whole" in table.columns[0]._cells
