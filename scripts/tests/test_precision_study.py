"""The study of precision: what it does to the factors of products, and that a conversion feels it."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from exl2jax import ConversionConfig, ConversionResult
from exl2jax.ops import products
from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.studies.precision import as_they_are, converted, cut, rounded


def test_factors_lose_thirteen_bits() -> None:
    step = np.float32(2.0**-10)
    x = jnp.asarray([1 + step * np.float32(s) for s in (0, 0.49, 0.51, 1)] + [-1 - step * np.float32(0.51)])
    np.testing.assert_array_equal(cut(x), np.float32([1, 1, 1, 1 + step, -1]))
    np.testing.assert_array_equal(rounded(x), np.float32([1, 1, 1 + step, 1 + step, -1 - step]))
    np.testing.assert_array_equal(as_they_are(x), x)


def test_a_conversion_feels_it_and_the_package_is_left_as_it_was(tmp_path: Path) -> None:
    model, tokens = write_tiny_llama(tmp_path / "model", num_layers=1), tmp_path / "cal.safetensors"
    save_file({"input_ids": np.random.default_rng(1).integers(0, 300, (4, 32))}, tokens)
    seen: list[ConversionConfig] = []

    def found(name: str, change: object) -> bytes:
        config = ConversionConfig(
            in_dir=model,
            out_dir=tmp_path / name,
            compile_full=tmp_path / f"{name}-exl2",
            bits=5.0,
            cal_dataset=str(tokens),
            dataset_rows=4,
            measurement_rows=2,
        )
        seen.append(config)
        assert isinstance(converted(config, change), ConversionResult)  # type: ignore[arg-type]
        return (tmp_path / f"{name}-exl2" / "output.safetensors").read_bytes()

    plain = found("plain", as_they_are)
    assert plain == found("again", as_they_are) != found("cut", cut)
    assert products.jnp is jnp and len(seen) == 3
    with pytest.raises(ZeroDivisionError):
        converted(replace(seen[0], out_dir=tmp_path / "failed"), lambda x: x / (1 // 0))
    assert products.jnp is jnp
