"""`inspect`: widths, groups and scales of known tensors, and the error against a source."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax import ConversionConfig, cli, load_exl2
from exl2jax.errors import FormatError, SettingsError
from exl2jax.exl2.inspect import inspect


@pytest.fixture(scope="module")
def converted(tiny_llama_untied: Path, tiny_conversion: Callable[[Path, str], ConversionConfig]) -> Path:
    found = tiny_conversion(tiny_llama_untied, "fast").compile_full
    assert found is not None
    return found


def test_figures_follow_from_the_tensors(converted: Path, tiny_llama_untied: Path) -> None:
    found = inspect(converted, source=tiny_llama_untied)
    assert [x.key for x in found][-1] == "lm_head" and len(found) == 3 * 7 + 1
    tensors = {n: t for path in converted.glob("*.safetensors") for n, t in load_file(path).items()}
    for x in found:
        stored = {name: tensors[f"{x.key}.{name}"] for name in ("q_weight", "q_scale", "q_scale_max", "q_groups")}
        widths = stored["q_groups"][0::2]
        assert sum(x.widths.values()) == x.rows == len(tensors[f"{x.key}.q_invperm"])
        assert set(x.widths) == set(widths.tolist()) and sum(x.groups.values()) == len(widths)
        assert sum(rows * count for rows, count in x.groups.items()) == x.rows
        size = sum(t.nbytes for t in stored.values()) + 4 * x.rows
        assert x.bpw == pytest.approx(8 * size / (x.rows * x.columns))
        assert x.scale_max[0] == stored["q_scale_max"].min() and x.scale_max[2] == stored["q_scale_max"].max()
        nibbles = stored["q_scale"].view(np.uint32)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
        steps = ((nibbles.reshape(len(widths), -1)[:, : x.columns].astype(float) + 1) / 16) ** 2
        steps = steps * stored["q_scale_max"].astype(float)[:, None]
        assert x.scale == pytest.approx((steps.min(), np.median(steps), steps.max()))
        assert x.subnormal == pytest.approx((steps < 2.0**-14).mean())


def test_error_against_the_source(converted: Path, tiny_llama_untied: Path) -> None:
    [x] = inspect(converted, "layers.1.mlp.down_proj.weight", tiny_llama_untied)
    weights = {n: t for path in tiny_llama_untied.glob("*.safetensors") for n, t in load_file(path).items()}
    wanted = weights["model.layers.1.mlp.down_proj.weight"].astype(np.float64).T
    model = load_exl2(converted)
    difference = model.module_params(_spec(model, x.key))["down_proj"]["kernel"].astype(np.float64) - wanted
    assert x.error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(wanted))
    assert x.max_error == pytest.approx(np.abs(difference).max()) and 0 < x.error < 0.5


def _spec(model: object, key: str):
    from exl2jax.models import module_specs

    return next(s for s in module_specs(model.config) if key in [x.key for x in s.linears])  # type: ignore[attr-defined]


def test_what_is_refused(converted: Path, tiny_llama_untied: Path) -> None:
    with pytest.raises(SettingsError, match="no linear's name holds 'nothing'"):
        inspect(converted, "nothing")
    with pytest.raises(SettingsError, match="must be the original"):
        inspect(converted, source=converted)
    with pytest.raises(FormatError, match="no quantization_config"):
        inspect(tiny_llama_untied)


def test_commands(converted: Path, tiny_llama_untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(converted), "q_proj", "--against", str(tiny_llama_untied), "--json"]) == 0
    linears = json.loads(capsys.readouterr().out)["linears"]
    assert len(linears) == 3 and all(x["error"] > 0 for x in linears)
    assert cli.main(["inspect", str(converted)]) == 0
    assert "lm_head" in capsys.readouterr().out
    assert cli.main(["dequantize", str(converted), str(tmp_path / "plain"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"] > 0
    assert cli.main(["dequantize", str(converted), str(tmp_path / "plain")]) == 2
