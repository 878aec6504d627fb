"""The study of unseen rows on a tiny model: every linear of a layer has a line, and feedback changes its cost."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.studies.unseen import SHRINKAGES, main


def test_a_line_for_every_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_llama(tmp_path / "tiny")
    ids = np.random.default_rng(0).integers(0, 300, (9, 24))
    save_file({"input_ids": ids}, tmp_path / "rows.safetensors")
    options = ["--model", tmp_path / "tiny", "--tokens", tmp_path / "rows.safetensors", "--rows", "4", "--layers", "1"]
    assert main(list(map(str, options))) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == len(SHRINKAGES) + 3
    names = [line.split("|")[1].strip() for line in lines]
    parts = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *(f"self_attn.{n}_proj" for n in "qkvo"))
    assert names == [f"model.layers.1.{part}" for part in parts]
    assert any(ratio.split(",")[0].strip() != "1.00" for line in lines for ratio in line.split("|")[3:-1])
