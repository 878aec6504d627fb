"""`plan --device`: from a config alone, and beside the plan of a model that is there."""

import json
from pathlib import Path

import pytest

from exl2jax.cli.entry import main
from exl2jax.testing.tiny_model import write_tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model")


def test_a_config_is_enough(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in model.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert main(["plan", str(model), "--device", "h100", "-r", "4", "-mr", "2", "-l", "24", "--json"]) == 0
    (key, found), *rest = json.loads(capsys.readouterr().out).items()
    assert (key, rest) == ("device", [])
    assert found["device"] == "H100 SXM 80 GB" and found["fits"] and found["total"] > 0
    assert found["streams"] == 2 * 4 * 4 * 24 * 64
    assert list(found["work"]) == ["forward", "backward", "price", "quantize", "tune"]
    assert main(["plan", str(model), "--device", "rtx4090"]) == 0
    said = capsys.readouterr().out
    assert "RTX 4090 24 GB: counted, not measured" in said and "at least" in said and "stay on the device" in said


def test_beside_the_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-c", "random", "-r", "4", "-mr", "2", "-l", "24", "-b", "4.5", "--device", "cpu"]
    assert main(["plan", str(model), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["refused"] == [] and found["device"]["launches"] == 0 and found["device"]["device"].endswith("cores")
    assert main(["plan", str(model), *options]) == 0
    said = capsys.readouterr().out
    assert "can be reached" in said and "counted, not measured" in said


def test_other_names_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--device", "tpu"]) == 2
    assert "--device is 'tpu'; it must be one of h100" in capsys.readouterr().err
