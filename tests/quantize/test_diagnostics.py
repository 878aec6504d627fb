"""Numerical diagnostics: every kind is survived and put in words, or refused by the name of the linear."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import convert
from exl2jax.errors import Exl2JaxError, HessianError, ModelError, NumericalError
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import LinearSpec
from exl2jax.ops import HessianFactor
from exl2jax.qparams import q
from exl2jax.quantize.diagnostics import (
    calibration_shortage,
    clamp_bias,
    hessian_diagnostics,
    linear_diagnostics,
    overflow_warnings,
)
from exl2jax.quantize.linear import (
    Checks,
    factor_hessian,
    pack_checked,
    quantize,
    read_checks,
    require_sound,
)
from tests.quantize.sound import quantize_soundly
from tests.reliability.scene import Scene, make_scene

K, N = 64, 32
SPEC = LinearSpec(name="down_proj", key="model.layers.0.mlp.down_proj", rows=K, columns=N, bias=True)
QPARAMS = q("4/3", ".5/.5", "32")


def gram(tokens: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, K)).astype(np.float32) * np.float32(scale)
    return x.T @ x


def dead(h: np.ndarray) -> np.ndarray:
    h = h.copy()
    h[:5], h[:, :5] = 0, 0
    return h


def duplicate(h: np.ndarray) -> np.ndarray:
    h = h.copy()
    h[1], h[:, 1] = h[0], h[:, 0]
    h[1, 1] = h[0, 0]
    return h


HESSIANS: dict[str, np.ndarray] = {
    "one token": gram(1),
    "rank of half the inputs": gram(K // 2),
    "all zero": np.zeros((K, K), np.float32),
    "all equal": np.ones((K, K), np.float32),
    "dead inputs": dead(gram(200)),
    "duplicate inputs": duplicate(gram(200)),
    "huge": gram(200, 1e15),
    "tiny": gram(200, 1e-15),
    "one outlier": gram(200) * np.where(np.arange(K) == 7, 1e4, 1).astype(np.float32),
    "rank one and huge": gram(1, 1e16),
}


@pytest.mark.parametrize("name", [n for n in HESSIANS if n != "one outlier"])
def test_degenerate_hessians_are_damped_and_serve(name: str) -> None:
    factor = factor_hessian(jnp.asarray(HESSIANS[name]), SPEC.key)
    assert np.isfinite(np.asarray(factor.u)).all() and float(factor.damping) > 0
    kernel = np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)
    linear = quantize_soundly(kernel, factor, QPARAMS, SPEC)
    assert np.isfinite(np.asarray(linear.weight)).all()
    pack_checked(linear, SPEC, None)


def checks_of(factor: HessianFactor) -> Checks:
    """The checks of a quantization by this factor."""
    (checks,) = read_checks([quantize(RANDOM, factor, QPARAMS, SPEC).checks])
    return checks


def indefinite(ratio: float) -> np.ndarray:
    """A symmetric matrix with unit diagonal whose least eigenvalue is `1 - ratio`."""
    h = np.eye(K, dtype=np.float32)
    h[0, 1] = h[1, 0] = ratio
    return h


@pytest.mark.parametrize(("ratio", "raises"), [(1.0, 0), (1.2, 1), (2.0, 4), (40.0, 9)])
def test_damping_grows_and_is_told(ratio: float, raises: int) -> None:
    hessian = jnp.asarray(indefinite(ratio))
    factor = factor_hessian(hessian, SPEC.key)
    assert int(factor.attempts) == raises + 1
    assert float(factor.damping) == pytest.approx(0.12 * 2**raises)
    assert float(factor.damping) > ratio - 1
    said = hessian_diagnostics(checks_of(factor), (SPEC,))
    assert said == ([f"{SPEC.key}: damping raised {raises} times, to {0.12 * 2**raises:.3g}"] if raises else [])


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (indefinite(1e4), "not positive definite after 10 dampings"),
        (np.full((K, K), np.nan, np.float32), "holds NaN or infinity"),
        (np.where(np.eye(K) > 0, np.inf, 0).astype(np.float32), "holds NaN or infinity"),
        (np.full((K, K), 3e38, np.float32) * np.where(np.eye(K) > 0, 1, -1).astype(np.float32), "dampings"),
    ],
)
def test_hopeless_hessians_are_refused_by_name(hessian: np.ndarray, message: str) -> None:
    with pytest.raises(HessianError, match=message) as caught:
        factor_hessian(jnp.asarray(hessian), SPEC.key)
    assert SPEC.key in str(caught.value)


def test_dead_inputs_are_told() -> None:
    hessian = jnp.asarray(HESSIANS["dead inputs"])
    factor = factor_hessian(hessian, SPEC.key)
    said = hessian_diagnostics(checks_of(factor), (SPEC, replace(SPEC, key="other")))
    assert said == [f"{SPEC.key} and other: 5 of {K} inputs are never active on this calibration data"]


def _rows(kernel: np.ndarray, rows: Any, value: Any) -> np.ndarray:
    kernel = kernel.copy()
    kernel[rows] = value
    return kernel


RANDOM = np.random.default_rng(2).standard_normal((K, N)).astype(np.float32)
KERNELS: dict[str, np.ndarray] = {
    "zero": np.zeros((K, N), np.float32),
    "constant": np.full((K, N), 0.37, np.float32),
    "all rows equal": np.tile(RANDOM[:1], (K, 1)),
    "duplicate rows": _rows(RANDOM, slice(0, 8), RANDOM[9]),
    "dead rows": _rows(RANDOM, slice(0, 8), 0),
    "dead columns": RANDOM * (np.arange(N) % 3 > 0),
    "tiny": RANDOM * np.float32(1e-30),
    "subnormal halves": RANDOM * np.float32(1e-7),
    "large": RANDOM * np.float32(5e3),
    "one outlier": _rows(RANDOM * np.float32(1e-3), 5, 3e4),
}


@pytest.mark.parametrize("name", list(KERNELS))
def test_odd_weights_give_finite_ones(name: str) -> None:
    kernel = KERNELS[name].astype(np.float32)
    factor = factor_hessian(jnp.asarray(gram(200)), SPEC.key)
    done = quantize(kernel, factor, QPARAMS, SPEC)
    weight = np.asarray(done.linear.weight, np.float32)
    assert np.isfinite(weight).all()
    assert np.isfinite(done.packed.stored(done.linear.groups).q_scale_max).all()
    (checks,) = read_checks([done.checks])
    require_sound(checks, SPEC, SPEC.key)
    said = linear_diagnostics(SPEC, checks)
    if name == "tiny":
        assert said == [f"{SPEC.key}: the weights of 2 groups vanish in half precision and are stored as zero"]
        assert not weight.any()
    else:
        assert said == []
        assert np.linalg.norm(weight - kernel) <= 0.3 * np.linalg.norm(kernel) + 1e-6 * np.sqrt(K * N)


@pytest.mark.parametrize("largest", [7e4, 1e30, 3e38, np.inf, np.nan])
def test_weights_beyond_half_precision_are_refused_by_name(largest: float) -> None:
    factor = factor_hessian(jnp.asarray(gram(200)), SPEC.key)
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj: a weight of magnitude .* 65504 at most"):
        quantize_soundly(_rows(RANDOM, 3, largest), factor, QPARAMS, SPEC)


def test_biases_are_clamped_to_what_the_format_holds() -> None:
    bias, said = clamp_bias(SPEC, np.asarray([1.0, -1e5, 65504.0, 3e38], np.float32))
    assert bias is not None and bias.tolist() == [1.0, -65504.0, 65504.0, 65504.0]
    assert said == [f"{SPEC.key}: 2 biases beyond half precision, clamped to 65504"]
    assert clamp_bias(SPEC, None) == (None, [])


def test_a_shortage_of_calibration_is_told() -> None:
    linears = [replace(SPEC, rows=rows, key=f"rows {rows}") for rows in (32, 64, 256)]
    assert calibration_shortage(linears, 256) == []
    (line,) = calibration_shortage(linears, 63)
    assert "63 tokens for 2 of 3 linears" in line and "(up to 256, rows 256)" in line


def test_states_near_the_end_of_half_precision_are_told_with_the_first_module() -> None:
    near = 0.5 * 65504
    peaks = [("a", 10.0, near - 1), ("b", 5.0, near), ("c", 4e5, 1.0)]
    (line,) = overflow_warnings(peaks)
    assert line.startswith("b: ") and "3.275e+04" in line and "4e+05 in 2 modules" in line
    assert "ExLlamaV2 keeps both in half precision" in line and "0.5 % of a row" in line
    assert overflow_warnings(peaks[:1]) == []
    (line,) = overflow_warnings([*peaks, ("d", 1.0, 1e5)], wide_residual=True)
    assert line.startswith("b: outputs of linears reach 3.275e+04") and "1e+05 in 2 modules" in line
    assert overflow_warnings(peaks[2:], wide_residual=True) == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


def changed(scene: Scene, home: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Scene:
    """The scene with other weights, in bfloat16 so that they may exceed half precision."""
    model = home / "model"
    model.mkdir()
    for path in scene.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in load_file(model / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return Scene(model, scene.tokens)


def test_a_troubled_model_is_converted_and_its_trouble_listed(scene: Scene, tmp_path: Path) -> None:
    """States far beyond half precision, dead inputs, duplicate rows, a vanishing matrix, few tokens."""

    def diagnostics(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][:] *= ml_dtypes.bfloat16(1e5)
        tensors["model.layers.0.mlp.up_proj.weight"][:3] = 0  # three inputs of down_proj are never active
        tensors["model.layers.1.self_attn.q_proj.weight"][1] = tensors["model.layers.1.self_attn.q_proj.weight"][0]
        tensors["model.layers.1.self_attn.v_proj.weight"][:] *= ml_dtypes.bfloat16(1e-30)
        tensors["model.layers.1.mlp.gate_proj.weight"][:] = ml_dtypes.bfloat16(0.01)

    config = changed(scene, tmp_path, diagnostics).config(tmp_path)
    result = convert(config)
    said = "\n".join(result.warnings)
    assert "model.layers.0.mlp: states or outputs of linears reach" in said
    assert "model.layers.0.mlp.down_proj: 3 of 160 inputs are never active" in said
    assert "model.layers.1.self_attn.v_proj: the weights of" in said
    assert "measure pass under-calibrated: 64 tokens for 2 of 14 linears" in said
    record = json.loads((config.out_dir / "job_new.json").read_text(encoding="utf-8"))["records"]["summary"]
    assert record["warnings"] == list(result.warnings)
    reports = json.loads((config.out_dir / "quantized.json").read_text(encoding="utf-8"))
    assert all(value > 0 for report in reports for value in report["damping"].values())
    assert max(report["largest_state"] or 0 for report in reports) > 1e5, "float32 holds what half precision cannot"
    assert set(reports[1]["damping"]) == {"gate_proj", "up_proj", "down_proj"}
    assert config.compile_full is not None and verify(config.compile_full).faults == ()


def _set(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[:] = ml_dtypes.bfloat16(value)

    return change


@pytest.mark.parametrize(
    ("name", "value", "error", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan, ModelError, r"mlp\.up_proj\.weight holds NaN or infinity"),
        ("model.norm.weight", np.inf, ModelError, r"model\.norm\.weight holds NaN or infinity"),
        ("model.layers.0.input_layernorm.weight", 3e38, Exl2JaxError, r"model\.layers\.0\.self_attn"),
        ("model.layers.0.mlp.down_proj.weight", 1e30, NumericalError, r"layers\.0\.mlp"),
    ],
)
def test_a_hopeless_model_is_refused_by_name(
    scene: Scene, tmp_path: Path, name: str, value: float, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named) as caught:
        convert(changed(scene, tmp_path, _set(name, value)).config(tmp_path))
    assert isinstance(caught.value, Exl2JaxError) and caught.value.exit_code == 1
