"""Every bad input: one clear line that names the file, the key and what to do, and nothing left to be trusted."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import cli
from exl2jax.conversion import context
from exl2jax.testing.tiny_model import write_tiny_llama

WEIGHTS = "model.safetensors"
FIRST_NORM = "model.layers.0.input_layernorm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the passes that have begun."""
    begun: list[str] = []
    scan = context.scan

    def counted(*args: Any, **kwargs: Any) -> Any:
        begun.append(kwargs["stage"])
        return scan(*args, **kwargs)

    monkeypatch.setattr(context, "scan", counted)
    return begun


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "rows.safetensors"
    save_file({"input_ids": np.random.default_rng(0).integers(0, 300, (4, 32))}, path)
    return path


def run(model: Path, tokens: Path, *more: str, out: Path | None = None) -> int:
    out = out or model.parent / "work"
    job = ["-i", str(model), "-o", str(out), "-cf", str(model.parent / "exl2"), "-c", str(tokens), "-mr", "2"]
    return cli.main(["convert", *job, *more])


def complaint(capsys: Any) -> str:
    """The message on stderr, which is one line; stdout is empty."""
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return edit


def edit_weights(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        save_file(change(load_file(model / WEIGHTS)), model / WEIGHTS)

    return edit


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: int(len(data) * keep)])

    return edit


def remove(*names: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).unlink() for name in names] and None


def pickled(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no directory": (lambda model: shutil.rmtree(model), ["no such model directory"]),
    "no config": (remove("config.json"), ["config.json", "is missing"]),
    "config cut short": (cut("config.json", 0.5), ["config.json", "cannot be read"]),
    "config of another kind": (lambda m: (m / "config.json").write_text("[]") and None, ["config.json"]),
    "config without a size": (edit_config(hidden_size=None), ["config.json", "hidden_size"]),
    "unknown architecture": (
        edit_config(architectures=["MadeUpForCausalLM"]),
        ["config.json", "MadeUpForCausalLM", "not supported"],
    ),
    "no tokenizer": (remove("tokenizer.json"), ["tokenizer"]),
    "tokenizer cut short": (cut("tokenizer.json", 0.5), ["tokenizer.json"]),
    "no weights": (remove(WEIGHTS), ["no *.safetensors weights"]),
    "pickled weights": (pickled, ["pytorch_model.bin", "safetensors"]),
    "weights cut short": (cut(WEIGHTS, 0.9), [WEIGHTS, "download it again"]),
    "weights cut in the header": (cut(WEIGHTS, 0.001), [WEIGHTS, "download it again"]),
    "a missing tensor": (
        edit_weights(lambda t: {k: v for k, v in t.items() if k != UP_PROJ}),
        [UP_PROJ, "is missing"],
    ),
    "a tensor of the wrong shape": (
        edit_weights(lambda t: t | {UP_PROJ: t[UP_PROJ][:-1].copy()}),
        [WEIGHTS, UP_PROJ, "[159, 64]", "[160, 64]"],
    ),
    "a tensor of integers": (
        edit_weights(lambda t: t | {UP_PROJ: t[UP_PROJ].astype(np.int32)}),
        [WEIGHTS, UP_PROJ, "I32"],
    ),
    "a NaN in the weights": (
        edit_weights(lambda t: t | {Q_PROJ: np.where(np.arange(64) == 7, np.float16(np.nan), t[Q_PROJ])}),
        [WEIGHTS, Q_PROJ, "NaN"],
    ),
    "an infinity in the norms": (
        edit_weights(lambda t: t | {FIRST_NORM: np.full(64, np.inf, np.float16)}),
        [WEIGHTS, FIRST_NORM, "infinity"],
    ),
}


SEEN_WHEN_READ = ("a NaN in the weights", "an infinity in the norms")
"""Damage that shows in no header: it is named when the tensor is read, in the first pass."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model(kind: str, model: Path, tokens: Path, capsys: Any, passes: list[str]) -> None:
    damage, fragments = DAMAGE[kind]
    damage(model)
    assert run(model, tokens) == 1
    message = complaint(capsys)
    assert [part for part in fragments if part not in message] == [], message
    assert not (model.parent / "exl2").exists()
    assert not list((model.parent / "work").glob("output*"))
    assert bool(passes) == (kind in SEEN_WHEN_READ)
    if kind not in SEEN_WHEN_READ:
        assert cli.main(["plan", str(model), "-c", str(tokens), "-mr", "2"]) == 1
        planned = complaint(capsys)
        assert [part for part in fragments if part not in planned] == [], planned


def test_rows_that_are_no_multiple_of_32(tmp_path: Path, tokens: Path, capsys: Any) -> None:
    model = write_tiny_llama(tmp_path / "model", intermediate_size=144)
    assert run(model, tokens) in (1, 2)
    message = complaint(capsys)
    assert "down_proj: in_features is 144, EXL2 needs a multiple of 32" in message
    assert not (tmp_path / "work").exists()


def test_a_model_that_is_quantized_already(model: Path, tokens: Path, capsys: Any) -> None:
    edit_config(quantization_config={"quant_method": "gptq"})(model)
    edit_weights(lambda t: {k.replace("_proj.weight", "_proj.qweight"): v for k, v in t.items()})(model)
    assert run(model, tokens) == 2
    assert "already quantized (gptq); take the original" in complaint(capsys)


@pytest.mark.parametrize("preset", ["best", "stock"])
def test_a_target_out_of_reach_is_refused_before_anything_is_measured(
    preset: str, model: Path, tokens: Path, capsys: Any, passes: list[str]
) -> None:
    assert run(model, tokens, "-b", "2", "--preset", preset) == 1
    message = complaint(capsys)
    assert passes == []
    assert re.search(r"-b 2\.0: these candidates reach \d\.\d+ to 8\.\d+ bits per weight; raise -b", message), message
    assert not (model.parent / "work").exists()


CALIBRATION: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing.parquet": (lambda path: None, ["missing.parquet"]),
    "missing.safetensors": (lambda path: None, ["missing.safetensors"]),
    "empty.txt": (lambda path: path.write_text(""), ["empty.txt"]),
    "blank.txt": (lambda path: path.write_text("\n \n"), ["blank.txt"]),
    "short.txt": (lambda path: path.write_text("Too short."), ["short.txt", "tokens"]),
    "short.parquet": (
        lambda path: pq.write_table(pa.table({"text": ["Too short."]}), path),
        ["short.parquet", "tokens"],
    ),
    "numbers.parquet": (lambda path: pq.write_table(pa.table({"x": [1, 2]}), path), ["numbers.parquet", "text"]),
    "damaged.parquet": (lambda path: path.write_bytes(b"PAR1 nothing"), ["damaged.parquet"]),
    "damaged.safetensors": (lambda path: path.write_bytes(b"nothing"), ["damaged.safetensors"]),
    "other.safetensors": (lambda path: save_file({"x": np.zeros(3)}, path), ["other.safetensors", "input_ids"]),
    "beyond.safetensors": (
        lambda path: save_file({"input_ids": np.full((4, 64), 5000)}, path),
        ["beyond.safetensors", "5000", "320"],
    ),
}


@pytest.mark.parametrize("name", CALIBRATION)
def test_a_bad_calibration_file(name: str, model: Path, tmp_path: Path, capsys: Any, passes: list[str]) -> None:
    write, fragments = CALIBRATION[name]
    write(tmp_path / name)
    assert run(model, tmp_path / name, "-r", "4", "-l", "64", "-ml", "64") == 1
    message = complaint(capsys)
    assert [part for part in fragments if part not in message] == [], message
    assert not (tmp_path / "exl2").exists()
    assert not (tmp_path / "work" / "cal_data.safetensors").exists()
    assert passes == []


def test_an_output_that_cannot_be_a_directory(model: Path, tokens: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "work"):
        assert run(model, tokens, out=out) == 1
        message = complaint(capsys)
        assert str(out) in message
        assert "choose another" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(model: Path, tokens: Path, tmp_path: Path, capsys: Any) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert run(model, tokens, out=locked) == 1
    assert str(locked) in complaint(capsys)


def test_a_full_disk(model: Path, tokens: Path, tmp_path: Path, capsys: Any) -> None:
    """No file may grow beyond a few bytes, as on a full disk: nothing is left but the lock."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert run(model, tokens) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = complaint(capsys)
    assert str(tmp_path / "work") in message
    assert "cannot write" in message
    assert "free some space" in message
    assert [p.name for p in (tmp_path / "work").iterdir() if p.suffix != ".lock" and p.name != ".lock"] == []


def test_a_measurement_of_another_model(
    model: Path, tokens: Path, tmp_path: Path, capsys: Any, passes: list[str]
) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"measurement": {"model.layers.9.mlp": []}, "last_module_idx": 4}), encoding="utf-8")
    assert run(model, tokens, "-m", str(path)) == 1
    message = complaint(capsys)
    assert "m.json" in message and passes == []
    assert "another" in message


def test_resuming_where_there_is_nothing(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "work").mkdir()
    assert cli.main(["convert", "-o", str(tmp_path / "work")]) == 1
    assert "holds no job to resume; name the source model as -i" in complaint(capsys)
