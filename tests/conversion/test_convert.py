"""One real conversion of a tiny model, end to end: result, determinism, interruption, and everything refused."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import ConversionConfig, convert, evaluate
from exl2jax.errors import Exl2JaxError, Interrupted, JobError, MeasurementError, SettingsError, StorageError
from exl2jax.exl2.verify.directory import verify
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants.recipe import recipe_from

ROWS, LENGTH = 6, 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("model") / "tiny", seed=3, attention_bias=True, mlp_bias=True, num_layers=3, tie=False
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "rows.safetensors"
    ids = np.random.default_rng(5).integers(0, 300, (ROWS, LENGTH)).astype(np.int64)
    save_file({"input_ids": ids}, path)
    return path


def settings(model: Path, tokens: Path, base: Path, **changes: object) -> ConversionConfig:
    config = ConversionConfig(
        in_dir=model,
        out_dir=base / "work",
        compile_full=base / "exl2",
        cal_dataset=str(tokens),
        bits=4.5,
        dataset_rows=ROWS,
        measurement_rows=3,
        checkpoint_interval=0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def converted(model: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> ConversionConfig:
    config = settings(model, tokens, tmp_path_factory.mktemp("converted"))
    convert(config)
    return config


def digests(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def result_digests(config: ConversionConfig) -> dict[str, str]:
    assert config.compile_full is not None
    work = digests(config.out_dir)
    kept = {k: v for k, v in work.items() if k.startswith("out_tensor") or k in ("measurement.json", "quantized.json")}
    return kept | {f"exl2/{k}": v for k, v in digests(config.compile_full).items()}


def summary(config: ConversionConfig) -> dict[str, object]:
    return json.loads((config.out_dir / "job_new.json").read_text())["records"]["summary"]


def test_result_verifies_and_stays_close_to_the_source(converted: ConversionConfig) -> None:
    assert converted.compile_full is not None
    report = verify(converted.compile_full)
    assert report.faults == ()
    record = summary(converted)
    assert report.bits_per_weight == pytest.approx(record["bpw"])
    assert 4.2 < report.bits_per_weight <= 4.5
    ids = np.random.default_rng(9).integers(0, 300, (4, 40)).astype(np.int32)
    found = evaluate(converted.compile_full, ids, converted.in_dir)
    assert found.kl_divergence is not None and found.kl_divergence < 0.2
    assert record["perplexity"] == pytest.approx(record["perplexity_full"], rel=0.25)


def test_directory_holds_what_stock_reads(converted: ConversionConfig) -> None:
    assert converted.compile_full is not None
    names = {p.name for p in converted.compile_full.iterdir()}
    source = {p.name for p in converted.in_dir.iterdir() if p.suffix != ".safetensors"}
    assert names == source | {"output.safetensors"}
    config = json.loads((converted.compile_full / "config.json").read_text())
    original = json.loads((converted.in_dir / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == original
    assert quantization["quant_method"] == "exl2" and quantization["bits"] == 4.5 and quantization["head_bits"] == 6
    assert quantization["calibration"] == {"rows": ROWS, "length": LENGTH, "dataset": converted.cal_dataset}
    tensors = load_file(converted.compile_full / "output.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.bias"].dtype == np.float16
    assert not any(name.endswith("_proj.weight") for name in tensors)


def test_same_inputs_give_the_same_bytes(
    converted: ConversionConfig, model: Path, tokens: Path, tmp_path: Path
) -> None:
    again = settings(model, tokens, tmp_path)
    convert(again)
    assert result_digests(again) == result_digests(converted)


def test_stop_and_resume_give_the_same_bytes(
    converted: ConversionConfig, model: Path, tokens: Path, tmp_path: Path
) -> None:
    """Stopped after every single module, in every pass: forward, backward, price, quantize with the head."""
    config = settings(model, tokens, tmp_path)
    stops = 0
    while True:
        stop = StopFlag()
        stop.ask()
        try:
            convert(config, RunControl(stop=stop))
            break
        except Interrupted as e:
            assert e.exit_code == 130
            stops += 1
    assert stops == 5 + 5 + 5 + 6
    assert result_digests(config) == result_digests(converted)


def test_measurement_alone_then_used(converted: ConversionConfig, model: Path, tokens: Path, tmp_path: Path) -> None:
    """`-om` writes the file that the whole run makes, and `-m` with it gives the same model."""
    file = tmp_path / "m.json"
    convert(settings(model, tokens, tmp_path / "a", compile_full=None, output_measurement=file))
    assert file.read_bytes() == (converted.out_dir / "measurement.json").read_bytes()
    config = settings(model, tokens, tmp_path / "b", measurement=file)
    convert(config)
    ours, theirs = result_digests(config), result_digests(converted)
    assert {k: v for k, v in theirs.items() if k != "measurement.json"} == ours


def test_stock_preset_and_its_measurement_under_another_preset(model: Path, tokens: Path, tmp_path: Path) -> None:
    """Stock's own way measures every candidate; the best preset takes such a file and says that it is weaker."""
    stock = convert(settings(model, tokens, tmp_path / "a", preset="stock"))
    assert stock.allocation is not None and stock.allocation["pricing"] == "accuracy"
    assert stock.rfn_error and not stock.stream_error
    file = tmp_path / "a" / "work" / "measurement.json"
    record = json.loads(file.read_text())
    assert list(record) == ["measurement", "last_module_idx"] and record["last_module_idx"] == 2 * 3 + 2
    best = convert(settings(model, tokens, tmp_path / "b", measurement=file))
    assert best.allocation is not None and best.allocation["pricing"] == "accuracy"
    assert best.stream_error and not best.rfn_error
    assert any("stock's accuracies only" in warning for warning in best.warnings)
    assert best.allocation["modules"] == stock.allocation["modules"]
    assert verify(tmp_path / "b" / "exl2").faults == ()


def test_hessians_of_weighed_tokens(
    converted: ConversionConfig, model: Path, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every power of the weights quantizes otherwise; a measurement without any says so, and is the power 0."""
    record = json.loads((converted.out_dir / "measurement.json").read_text())

    def packed(power: float) -> list[str]:
        file = tmp_path / "m.json"
        file.write_text(json.dumps(record))
        recipe = recipe_from({"preset": "best", "weigh_hessians": power}, "weighed")
        config = settings(model, tokens, tmp_path / str(power), measurement=file, preset=recipe)
        convert(config)
        return [digest for name, digest in result_digests(config).items() if name.startswith("out_tensor")]

    none, half, full = packed(0.0), packed(0.5), packed(1.0)
    assert none != half != full != none
    assert "no weights of tokens" not in caplog.text
    for costs in record["sensitivity"]["linears"].values():
        del costs["token_weights"]
    shutil.rmtree(tmp_path / "0.5")
    with caplog.at_level(logging.WARNING):
        assert packed(0.5) == none
    assert "the measurement has no weights of tokens" in caplog.text


def test_both_measurements_in_one_file(converted: ConversionConfig, model: Path, tokens: Path, tmp_path: Path) -> None:
    """Stock's tools find their records, and the costs beside them are those of a measurement without."""
    file = tmp_path / "both.json"
    only = settings(model, tokens, tmp_path, compile_full=None, output_measurement=file, variants=("accuracies=true",))
    convert(only)
    both, ours = (json.loads(path.read_text()) for path in (file, converted.out_dir / "measurement.json"))
    assert both["sensitivity"] == ours["sensitivity"] and not ours["measurement"]
    assert both["last_module_idx"] == 2 * 3 + 2 and len(both["measurement"]) == 2 * 3 + 2
    assert all(0 < record["accuracy"] <= 1 for record in both["measurement"]["model.layers.1.mlp"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 5.0}, "bits"),
        ({"head_bits": 8}, "head_bits"),
        ({"seed": 1}, "seed"),
        ({"measurement_rows": 2}, "measurement_rows"),
        ({"cal_split": "validation"}, "cal_split"),
    ],
)
def test_other_settings_are_refused_by_name(converted: ConversionConfig, change: dict[str, object], named: str) -> None:
    with pytest.raises(JobError, match=f"begun with other inputs: `{named}` .* there, .* now"):
        convert(replace(converted, **change))  # type: ignore[arg-type]


def test_other_choices_are_refused_by_word(converted: ConversionConfig) -> None:
    with pytest.raises(JobError, match=r"inputs: `preset` best there, fast now\. Take the same, .*`no_resume`"):
        convert(replace(converted, preset="fast"))
    given = ("propagation=0.25", "scales=stock")
    with pytest.raises(JobError) as caught:
        convert(replace(converted, variants=given))
    assert "`variants` propagation=0.5 there, 0.25 now; `variants` scales=columns there, stock now" in str(caught.value)


def test_a_failure_at_compilation_repeats_no_module(
    converted: ConversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval would write no checkpoint: the end of a pass writes one, and the job file moves on."""
    config = replace(converted, out_dir=tmp_path / "work", compile_full=tmp_path / "exl2", checkpoint_interval=3600)
    with monkeypatch.context() as patch:
        patch.setattr("exl2jax.conversion.convert.compile_model", lambda *_, **__: full_disk())
        with pytest.raises(StorageError, match="disk is full"):
            convert(config)
    stages = Stages()
    convert(config, RunControl(progress=stages))
    assert stages.begun == []
    assert result_digests(config) == result_digests(converted)


def test_a_failure_after_the_last_module_of_a_pass_repeats_no_module(
    converted: ConversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(converted, out_dir=tmp_path / "work", compile_full=tmp_path / "exl2", checkpoint_interval=3600)
    with monkeypatch.context() as patch:
        patch.setattr("exl2jax.conversion.work_directory.WorkDirectory.left_by", lambda *_: full_disk())
        with pytest.raises(StorageError, match="disk is full"):
            convert(config)
    stages = Stages()
    convert(config, RunControl(progress=stages))
    assert stages.begun[0] == ("forward", 6, 6), "every module of the pass was done"
    assert result_digests(config) == result_digests(converted)


class Stages:
    """A progress that keeps which stages began, with their modules and how many of them were done."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int, int]] = []

    def start(self, stage: str, total: int, done: int) -> None:
        self.begun.append((stage, total, done))

    def step(self, message: str) -> None:
        pass

    def finish(self) -> None:
        pass


def full_disk() -> None:
    raise StorageError("the disk is full")


def test_other_model_is_refused(converted: ConversionConfig, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", seed=4)
    with pytest.raises(JobError, match=r"begun with other inputs: model config .*; model weights"):
        convert(replace(converted, in_dir=other))


def test_shards(converted: ConversionConfig, tmp_path: Path) -> None:
    whole = convert(replace(converted, compile_full=tmp_path / "whole", shard_size=0))
    split = convert(replace(converted, compile_full=tmp_path / "split", shard_size=0.05))
    files = sorted(p.name for p in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"output-00001-of-{len(files):05}.safetensors"
    assert verify(tmp_path / "split").faults == ()
    assert whole.bpw == split.bpw


def test_unreachable_target_names_the_range(converted: ConversionConfig) -> None:
    with pytest.raises(MeasurementError, match=r"reach \d\.\d+ to \d\.\d+ bits"):
        convert(replace(converted, bits=2.0, out_dir=converted.out_dir.parent / "low", compile_full=None))


@pytest.mark.parametrize("name", ["model.safetensors", "output_old.safetensors", "cal_data.safetensors"])
def test_stray_weights_in_the_output_are_refused(converted: ConversionConfig, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    shutil.copy(converted.in_dir / "model.safetensors", target / name)
    with pytest.raises(Exl2JaxError, match=name.replace(".", r"\.")):
        convert(replace(converted, compile_full=target))
    assert [p.name for p in target.iterdir()] == [name]


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 1.9},
        {"bits": 8.1},
        {"bits": float("nan")},
        {"head_bits": 7},
        {"variants": ("solver=magic",)},
        {"length": 1},
    ],
)
def test_settings_out_of_range(converted: ConversionConfig, change: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as caught:
        replace(converted, **change)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_measurement_only_with_compile_is_refused(converted: ConversionConfig) -> None:
    with pytest.raises(SettingsError, match="`output_measurement`"):
        replace(converted, output_measurement=Path("m.json"))


def test_padded_calibration_rows_count_as_if_unpadded(model: Path, tmp_path: Path) -> None:
    """Rows padded with a mask give the very Hessians, and so the very bytes of the linears, that bare rows give."""
    from exl2jax.models import build_decoder, module_specs, open_model
    from exl2jax.stream.forward import embed
    from exl2jax.stream.hessians import Collected, collect
    from exl2jax.testing.states import rows_of, stream_of

    source = open_model(model)
    spec = module_specs(source.config)[0]
    ids = np.random.default_rng(2).integers(0, 300, (4, 32)).astype(np.int32)
    padded = np.pad(ids, ((0, 0), (0, 16)))
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 16)))
    params = source.module_params(spec)
    module = build_decoder(source.config).module(spec)

    def found(ids: np.ndarray, mask: np.ndarray | None) -> Collected:
        states = embed(source, ids)
        return collect(module, spec, params, rows_of(states, mask), stream_of(states), stream_of(states))

    bare, with_padding = found(ids, None), found(padded, mask)
    np.testing.assert_allclose(np.asarray(with_padding.hessians[0]), np.asarray(bare.hessians[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(with_padding.hessians[1]), np.asarray(bare.hessians[1]), rtol=1e-4, atol=1e-5)
