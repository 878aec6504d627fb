"""Calibration as a part of a conversion: every kind of source, what is kept of it, and bad input named in time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax import ConversionConfig, cli, convert
from exl2jax.calibration import CalibrationConfig, load_tokenizer
from exl2jax.calibration.records import hash_ids
from exl2jax.cli import convert as command
from exl2jax.conversion.calibrate import PassRows
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.errors import CalibrationError, Exl2JaxError, Interrupted, JobError, SettingsError
from exl2jax.models import HFModel, open_model
from exl2jax.stream.progress import RunControl, StopFlag

TEXTS = [f"The {word} of the town is painted every spring." for word in ("bridge", "gate", "old ferry house", "well")]


def settings(model: Path, base: Path, **changes: Any) -> ConversionConfig:
    config = ConversionConfig(in_dir=model, out_dir=base / "work", bits=4.5, length=24, measurement_length=16)
    return replace(config, dataset_rows=4, measurement_rows=2, **changes)


def pass_rows(config: ConversionConfig) -> PassRows:
    model = open_model(config.in_dir)
    assert isinstance(model, HFModel)
    return PassRows(config, model, load_tokenizer(config.in_dir), WorkDirectory(config.out_dir), RunControl())


@pytest.fixture
def weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("embedding", "module_params", "head_params"):
        monkeypatch.setattr(HFModel, name, lambda *_: pytest.fail("model weights were read"))


def test_python_data_goes_through_a_whole_conversion(tiny_llama: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama, tmp_path, cal_dataset=TEXTS, compile_full=tmp_path / "exl2", seed=3)
    config = replace(config, measurement_rows=4, measurement_length=24)  # passes of one shape compile once
    result = convert(config)
    rows, measured = (
        load_file(config.out_dir / name) for name in ("cal_data.safetensors", "cal_data_measure.safetensors")
    )
    assert rows["input_ids"].shape == (4, 24)
    assert measured["input_ids"].shape == (4, 24)
    encoded = load_tokenizer(tiny_llama).encode(TEXTS[0], template=True)
    assert rows["input_ids"][0].tolist() == encoded[:24].tolist()
    job = json.loads((config.out_dir / "job_new.json").read_text(encoding="utf-8"))
    for name, kept in (("quantize", rows), ("measure", measured)):
        record = job["records"]["calibration"][name]
        assert record["source"] == "examples"
        assert record["composition"] == {"examples": len(kept["input_ids"])}
        assert (record["rows"], record["length"]) == kept["input_ids"].shape
        assert record["seed"] == 3
        assert record["tokenizer"] == load_tokenizer(tiny_llama).fingerprint
        assert record["sha256"] == hash_ids(kept["input_ids"])
    assert result.calibration == job["records"]["calibration"]
    assert json.loads((tmp_path / "exl2/config.json").read_text())["quantization_config"]["calibration"] == {
        "rows": 4,
        "length": 24,
        "dataset": "examples",
    }
    assert convert(config).calibration == result.calibration, "asked again, the job is known as done"


def test_padded_rows_keep_their_mask(tiny_llama: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama, tmp_path, cal_dataset=[[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]])
    config.out_dir.mkdir()
    rows = pass_rows(config)
    for measure, lengths in ((True, [3, 5]), (False, [3, 5, 1, 2])):
        rows.write(measure=measure)
        kept = load_file(config.out_dir / "cal_data.safetensors")
        assert kept["attention_mask"].sum(axis=1).tolist() == lengths
        assert kept["input_ids"][1].tolist() == [4, 5, 6, 7, 8]
    assert len(load_file(config.out_dir / "cal_data_measure.safetensors")["input_ids"]) == 2


def test_self_rows_are_drawn_once_for_a_job(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tiny_llama, tmp_path, cal_dataset="self")
    first = pass_rows(config).build(measure=False)
    assert first.input_ids.shape == (4, 24)
    monkeypatch.setattr(HFModel, "embedding", lambda *_: pytest.fail("the model was sampled from again"))
    assert pass_rows(config).build(measure=False).sha256 == first.sha256
    with pytest.raises(pytest.fail.Exception):
        pass_rows(replace(config, seed=1)).build(measure=False)


def test_what_the_text_cannot_fill_is_written_by_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("c4", "wiki", "code", "tiny", "multilingual", "technical"):
        (tmp_path / "texts" / f"{name}.utf8").write_text("A few words. " * (40 if name == "c4" else 1))
    config = settings(tiny_llama, tmp_path, cal_dataset=f"standard:{tmp_path / 'texts'}", cal_fill=True)
    rows = pass_rows(replace(config, dataset_rows=12)).build(measure=False)
    assert rows.input_ids.shape == (12, 24)
    assert rows.composition["self"] > 5
    assert any("written by the model" in note for note in rows.notes)


BAD: dict[str, tuple[dict[str, Any], type[Exl2JaxError], str]] = {
    "unknown name": ({"cal_dataset": "wikitext3"}, SettingsError, "wikitext2, c4, c4-new"),
    "no such file": ({"cal_dataset": "nowhere.parquet"}, CalibrationError, "nowhere.parquet"),
    "no network": ({"cal_dataset": "wikitext2"}, CalibrationError, "`cal_dir`"),
    "too long": ({"length": 4096}, CalibrationError, "context of 256"),
    "ids": ({"cal_dataset": np.full((4, 24), 320)}, CalibrationError, "vocabulary of 320"),
    "too few": ({"cal_dataset": TEXTS[:3]}, CalibrationError, "3 are there, 4 rows are needed"),
    "empty": ({"cal_dataset": []}, CalibrationError, "empty"),
    "ragged": ({"cal_dataset": [[1, 2], [[3], [4, 5]]]}, CalibrationError, "entry 1"),
    "settings": ({"cal_dataset": CalibrationConfig(rows=3)}, SettingsError, "`cal_columns`, `cal_dir`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_weight_is_read(
    case: str, tiny_llama: Path, tmp_path: Path, weights_out_of_reach: None
) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        convert(settings(tiny_llama, tmp_path, **{"cal_dataset": TEXTS, **changes}))


def test_a_short_source_stops_the_job_before_the_measurement(
    tiny_llama: Path, tmp_path: Path, weights_out_of_reach: None
) -> None:
    """Two rows are enough to measure with, not to quantize with: said now, not after the measurement."""
    source = tmp_path / "short.txt"
    source.write_text("The mill stands by the river. " * 3, encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"short\.txt: \d+ tokens are there, 96 are needed"):
        convert(settings(tiny_llama, tmp_path, cal_dataset=str(source)))


def test_other_rows_under_the_same_name_are_refused_on_resume(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("The mill stands by the river, and the river stands by the mill. " * 9, encoding="utf-8")
    config = settings(tiny_llama, tmp_path, cal_dataset=source)
    stop = StopFlag()
    stop.ask()
    with pytest.raises(Interrupted):
        convert(config, RunControl(stop=stop))
    source.write_text("The river has left the mill and does not say where it has gone. " * 9, encoding="utf-8")
    with pytest.raises(JobError, match="calibration data changed"):
        convert(config)


def test_the_command_passes_on_what_is_said_about_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[ConversionConfig] = []
    monkeypatch.setattr(command, "convert", lambda config, control: asked.append(config) or pytest.skip("seen"))
    source = "-c a.parquet --cal-column title --cal-column text --cal-dir local --cal-split validation --cal-fill"
    with pytest.raises(pytest.skip.Exception):
        cli.main(["convert", "-i", str(tmp_path), "-o", "w", *source.split()])
    assert asked[0].calibration(measure=True) == CalibrationConfig(
        source="a.parquet",
        measure=True,
        columns=("title", "text"),
        cal_dir=Path("local"),
        split="validation",
        fill_with_self=True,
    )
    assert asked[0].cal_name == "a.parquet columns=('title', 'text') cal_dir=local split=validation fill_with_self=True"
