"""`exl2jax plan` against what the conversion then does, and what both refuse before anything is computed."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from exl2jax import convert
from exl2jax.cli import main
from exl2jax.errors import MeasurementError, StorageError
from exl2jax.exl2.compile import compile_model
from exl2jax.models import open_model
from exl2jax.models.source import HFModel
from tests.reliability.scene import Scene, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


def planned(scene: Scene, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, object]]:
    code = main(["plan", str(scene.model), "-c", str(scene.tokens), "-r", "4", "-mr", "2", "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


def test_the_plan_is_kept(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(scene, capsys, "-b", "4.5")
    assert code == 0 and plan["refused"] == []
    assert plan["calibration_tokens"] == {"measure": 64, "quantize": 128}
    assert any("measure pass under-calibrated: 64 tokens" in str(line) for line in plan["warnings"])  # type: ignore[union-attr]
    config = scene.config(tmp_path)
    convert(config)
    size = (tmp_path / "exl2" / "output.safetensors").stat().st_size
    assert 0.85 * int(plan["output_size"]) < size <= int(plan["output_size"])  # type: ignore[call-overload]
    used = sum(p.stat().st_size for p in (tmp_path / "work").rglob("*.safetensors")) + size
    assert used < 1.3 * int(plan["disk"])  # type: ignore[call-overload]


def test_the_size_by_a_measurement_is_exact(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(scene.config(tmp_path, shard_size=0.05))
    given = str(tmp_path / "work" / "measurement.json")
    written = {p.name: p.read_bytes() for p in (tmp_path / "exl2").glob("*.safetensors")}
    source = open_model(scene.model)
    assert isinstance(source, HFModel)
    for shard_mb in (0.0, 0.04, 0.043, 0.046, 0.05, 0.06, 0.08):
        target = tmp_path / f"compiled {shard_mb}"
        shards = compile_model(source, tmp_path / "work" / "out_tensor", target, shard_mb=shard_mb)
        code, plan = planned(scene, capsys, "-b", "4.5", "-m", given, "-ss", str(shard_mb))
        assert (len(shards) > 1) == (shard_mb > 0)
        assert code == 0 and plan["output_exact"] is True
        assert plan["output_size"] == sum(p.stat().st_size for p in shards), shard_mb
        assert list(plan["calibration_tokens"]) == ["quantize"]  # type: ignore[call-overload]
        assert shard_mb != 0.05 or {p.name: p.read_bytes() for p in shards} == written
    code, plan = planned(scene, capsys, "-b", "2", "-m", given)
    assert code == 1 and "these candidates reach" in str(plan["refused"]) and plan["output_exact"] is False


def test_limits_and_variants_of_the_conversion_are_planned_for(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(scene.config(tmp_path, pins=("*.q_proj=8",)))
    given = str(tmp_path / "work" / "measurement.json")
    size = (tmp_path / "exl2" / "output.safetensors").stat().st_size
    flags = ("-b", "4.5", "-m", given)
    code, plan = planned(scene, capsys, *flags, "--pin", "*.q_proj=8", "--variant", "scales=columns")
    assert code == 0 and plan["output_exact"] is True and plan["output_size"] == size
    assert planned(scene, capsys, *flags)[1]["output_size"] != size
    assert main(["plan", str(scene.model), "--variant", "scales=none"]) == 2
    assert "scales" in capsys.readouterr().err


def test_bits_out_of_reach_are_refused_before_anything_is_computed(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan = planned(scene, capsys, "-b", "2")
    assert code == 1
    (line,) = plan["refused"]  # type: ignore[misc]
    assert "these candidates reach" in line and float(plan["low_bpw"]) > 2  # type: ignore[arg-type]
    with pytest.raises(MeasurementError, match="these candidates reach"):
        convert(scene.config(tmp_path, bits=2.0))
    assert not (tmp_path / "work" / "measurement.json").exists()


def test_a_disk_too_small_is_refused_before_anything_is_computed(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    code, plan = planned(scene, capsys, "-b", "4.5")
    assert code == 1 and "MB of disk are needed" in str(plan["refused"])
    with pytest.raises(StorageError, match="MB of disk are needed"):
        convert(scene.config(tmp_path))


def test_the_plan_as_a_table(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(scene.model), "-c", str(scene.tokens), "-r", "4", "-mr", "2", "-b", "2"]) == 1
    said = capsys.readouterr().out
    assert "can be reached" in said and "would be refused" in said and "under-calibrated" in said


def test_text_too_short_to_tune_on_is_said(
    scene: Scene, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def said(*flags: str) -> list[str]:
        return [str(x) for x in planned(scene, capsys, "-b", "4.5", *flags)[1]["warnings"] if "not tuned" in str(x)]  # type: ignore[attr-defined]

    (line,) = said()
    assert not said("--preset", "fast") and not said("-om", str(tmp_path / "m.json"))
    convert(scene.config(tmp_path, bits=4.5, preset="best"))
    assert line in caplog.messages


def test_stock_candidates_have_a_range_of_their_own(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    _, ours = planned(scene, capsys)
    _, stock = planned(scene, capsys, "--preset", "stock")
    assert ours["low_bpw"] != stock["low_bpw"]
