"""`exl2jax doctor`: what is there, and what is missing for which command."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from exl2jax import cli
from exl2jax.calibration import stock_texts
from exl2jax.cli import doctor


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cache, no token, and no package that only some commands need."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(doctor, "_installed", lambda name: False)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_missing_is_named_with_its_command(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys)
    missing = {each["what"]: each["for"] for each in found["missing"]}
    assert set(missing) == {*doctor.OPTIONAL, "a token of the Hub", "texts of exllamav2"}
    assert missing["lm_eval"] == "eval --task" and not found["token"]
    assert found["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert found["devices"] and found["kernels"] in ("xla", "pallas")
    assert found["caches"]["models of the Hub"] == {"path": str(bare / "hub"), "bytes": 0}


def test_what_is_there_is_not_missing(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: True)
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    folder = stock_texts.cache_folder()
    folder.mkdir(parents=True)
    for name in stock_texts.SHA256:
        (folder / name).write_text("12345")
    found = shown(capsys)
    assert found["missing"] == [] and found["token"]
    assert found["caches"]["calibration texts of exllamav2"]["bytes"] == 5 * len(stock_texts.SHA256)


def test_the_table(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "missing: ray" in out and "kernels" in out and "disk free, this directory" in out
