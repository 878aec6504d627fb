"""A shard size is judged by what the largest tensor surely takes, and by the allocation once there is one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from exl2jax import ConversionConfig, cli, convert
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.errors import SettingsError
from exl2jax.exl2.verify.directory import verify
from exl2jax.testing.tiny_model import write_tiny_llama

GATE, DOWN = (f"model.layers.0.mlp.{name}_proj.q_weight" for name in ("gate", "down"))
FITS_FOUR = 0.038
"""MiB. Each of them takes 0.031 MiB at 4 bits and 0.047 at 6; the embedding takes 0.032."""

WIDTHS = ["--exclude-bits", "2", "--exclude-bits", "3", "--exclude-bits", "5", "--exclude-bits", "8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shards")
    write_tiny_llama(home / "model", num_layers=1, intermediate_size=1024, vocab_size=264)
    save_file({"input_ids": np.random.default_rng(3).integers(0, 264, (2, 32))}, home / "rows.safetensors")
    return home


def planned(home: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    rows = ["-c", str(home / "rows.safetensors"), "-r", "2", "-mr", "2", "--preset", "fast", *WIDTHS]
    code = cli.main(["plan", str(home / "model"), *rows, *flags, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_size_that_no_allocation_fits_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(home, capsys, "-ss", "0.03")
    assert code == 1 and "-ss is 0.03 MB; model.embed_tokens.weight takes 0.03 MB" in plan["refused"][0]
    assert not [line for line in plan["warnings"] if "-ss" in line]
    code, plan = planned(home, capsys, "-ss", "0.04", "--pin", "*.down_proj=6")
    assert code == 1 and f"{DOWN} takes 0.05 MB; raise it" in plan["refused"][0]


def test_a_size_that_depends_on_the_allocation_is_a_warning(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(home, capsys, "-ss", str(FITS_FOUR), "-b", "4.5")
    (note,) = [line for line in plan["warnings"] if "-ss" in line]
    assert code == 0 and plan["refused"] == [] and f"{GATE} takes 0.05 MB if it gets the widest codes" in note
    for enough in ("0", "0.05"):
        code, plan = planned(home, capsys, "-ss", enough, "-b", "4.5")
        assert code == 0 and not [line for line in plan["warnings"] if "-ss" in line]


@pytest.mark.slow
def test_a_chosen_allocation_decides_before_the_quantization(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = WorkDirectory(home / "work")
    config = ConversionConfig(
        in_dir=home / "model",
        out_dir=work.path,
        compile_full=home / "exl2",
        cal_dataset=str(home / "rows.safetensors"),
        dataset_rows=2,
        measurement_rows=2,
        preset="fast",
        bits=6.5,
        exclude_bits=(2, 3, 5, 8),
        shard_size=FITS_FOUR,
    )
    with pytest.raises(SettingsError, match=f"`shard_size` is 0.038 MB; {GATE} takes 0.05 MB; raise it"):
        convert(config)
    assert work.measurement.exists() and not work.out_tensor.exists()
    measured = ["-m", str(work.measurement), "-ss", str(FITS_FOUR)]
    code, plan = planned(home, capsys, *measured, "-b", "6.5")
    assert code == 1 and GATE in plan["refused"][0] and not [line for line in plan["warnings"] if "-ss" in line]
    assert planned(home, capsys, *measured, "-b", "4.5")[0] == 0
    made = work.measurement.stat().st_mtime_ns
    convert(replace(config, shard_size=0.05))
    assert work.measurement.stat().st_mtime_ns == made, "the measurement is not repeated"
    assert verify(home / "exl2").faults == () and len(list((home / "exl2").glob("*.safetensors"))) > 1
    finished = convert(replace(config, bits=4.5, out_dir=home / "other", compile_full=home / "narrow"))
    assert not [note for note in finished.warnings if "widest codes" in note], "nothing is left to warn of"
