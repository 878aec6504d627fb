"""The choice of products: what follows it, what does not, and a resume that would choose others."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from exl2jax import ConversionConfig, convert
from exl2jax.conversion import config as settings
from exl2jax.errors import JobError
from exl2jax.models import build_decoder, module_specs, open_model
from exl2jax.ops import Products
from exl2jax.storage import read_json

FEW = {"dataset_rows": 2, "length": 32, "measurement_rows": 2, "measurement_length": 32}


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConversionConfig]:
    home = tmp_path_factory.mktemp("products")
    jobs = {
        products: ConversionConfig(
            in_dir=tiny_llama, out_dir=home / products, compile_full=home / f"{products}-exl2", products=products, **FEW
        )
        for products in Products
    }
    for job in jobs.values():
        convert(job)
    return jobs


def test_modules_follow_it_and_agree_to_bfloat16(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    h = np.random.default_rng(0).standard_normal((2, 16, model.config.hidden_size)).astype(np.float32)
    for spec in module_specs(model.config)[:2]:
        params = model.module_params(spec)
        exact, rounded = (
            np.asarray(build_decoder(model.config, p).module(spec).forward(params, jax.numpy.asarray(h)).hidden)
            for p in Products
        )
        change = np.linalg.norm(rounded - exact) / np.linalg.norm(exact - h)
        assert 1e-5 < change < 1e-2, spec.key


def test_both_give_results_of_about_one_quality(converted: dict[str, ConversionConfig]) -> None:
    """Other bytes, and errors of modules that differ by little of what quantization takes."""
    exact, rounded = (read_json(job.out_dir / "quantized.json", JobError, "reports") for job in converted.values())
    for a, b in zip(exact[:-1], rounded[:-1], strict=True):
        assert a["stream_error"] != b["stream_error"]
        assert a["stream_error"] == pytest.approx(b["stream_error"], rel=0.1)


def test_a_resume_that_would_choose_others_is_refused(
    converted: dict[str, ConversionConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = converted[Products.BFLOAT16]
    monkeypatch.setattr(settings, "natural_products", lambda: Products.FLOAT32)
    with pytest.raises(JobError, match="`products` bfloat16 there, float32 now"):
        convert(replace(begun, products=None))
    convert(replace(begun, products="bfloat16"))
