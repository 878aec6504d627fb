"""The study of precision: what it does to the factors of products, and that a conversion feels it."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from exl2jax import ConversionConfig
from exl2jax.ops import products
from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.studies.precision import Factors, as_they_are, converted, cut, rounded


def test_factors_lose_thirteen_bits() -> None:
    step = np.float32(2.0**-10)
    x = jnp.asarray([1 + step * np.float32(s) for s in (0, 0.49, 0.51, 1)] + [-1 - step * np.float32(0.51)])
    np.testing.assert_array_equal(cut(x), np.asarray([1, 1, 1, 1 + step, -1], np.float32))
    np.testing.assert_array_equal(rounded(x), np.asarray([1, 1, 1 + step, 1 + step, -1 - step], np.float32))
    np.testing.assert_array_equal(as_they_are(x), x)


def test_a_conversion_feels_it_and_the_package_is_left_as_it_was(tmp_path: Path) -> None:
    model, tokens = write_tiny_llama(tmp_path / "model", num_layers=1), tmp_path / "cal.safetensors"
    save_file({"input_ids": np.random.default_rng(1).integers(0, 300, (4, 32))}, tokens)
    config = ConversionConfig(
        in_dir=model, out_dir=tmp_path / "failed", preset="fast", cal_dataset=str(tokens), measurement_rows=4
    )

    def found(name: str, change: Factors) -> bytes:
        path = tmp_path / f"{name}.json"
        converted(replace(config, out_dir=tmp_path / name, output_measurement=path), change)
        return path.read_bytes()

    assert found("plain", as_they_are) != found("cut", cut)
    assert products.jnp is jnp
    with pytest.raises(ZeroDivisionError):
        converted(config, lambda x: x / (1 // 0))
    assert products.jnp is jnp
