"""Logits of the JAX forward pass against those of `transformers`, kept as arrays that `make parity` rebuilds."""

import json
from pathlib import Path

import numpy as np
import pytest

from exl2jax.evaluation import model_logits
from exl2jax.testing.parity_cases import DEMO_CASE, TINY_CASES, ParityCase
from exl2jax.testing.tiny_model import weights_digest

TOLERANCE = 1e-3  # absolute, on float32 logits of standard deviation 2 to 3


@pytest.fixture(scope="module")
def tiny_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model directory of each tiny case."""
    folder = tmp_path_factory.mktemp("parity")
    return {case.name: case.write(folder / case.name) for case in TINY_CASES}


def load_reference(case: ParityCase) -> dict[str, np.ndarray]:
    with np.load(case.reference, allow_pickle=False) as file:
        return dict(file)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    return top + np.log(np.exp(wide - top[..., None]).sum(axis=-1))


def check_length(model_dir: Path, reference: dict[str, np.ndarray], length: int) -> None:
    """Compare the kept logits of one sequence length, and all of them through their log-sum-exp."""
    ids = reference[f"input_ids_{length}"]
    logits = np.asarray(model_logits(model_dir, ids))
    assert logits.dtype == np.float32
    assert logits.shape[:2] == ids.shape
    kept = logits[:, reference[f"positions_{length}"]]
    expected = reference[f"logits_{length}"]
    stride = int(reference["column_stride"])
    np.testing.assert_allclose(kept[..., ::stride], expected, rtol=0.0, atol=TOLERANCE)
    np.testing.assert_allclose(log_sum_exp(kept), reference[f"logsumexp_{length}"], rtol=0.0, atol=TOLERANCE)


TINY_RUNS = [pytest.param(case, length, id=f"{case.name}-{length}") for case in TINY_CASES for length in case.lengths]


@pytest.mark.parametrize(("case", "length"), TINY_RUNS)
def test_tiny_models_agree(case: ParityCase, length: int, tiny_directories: dict[str, Path]) -> None:
    check_length(tiny_directories[case.name], load_reference(case), length)


def test_demo_model_agrees(demo_model: Path) -> None:
    reference = load_reference(DEMO_CASE)
    assert weights_digest(demo_model) == str(reference["weights_sha256"]), f"{demo_model} is another model"
    for length in DEMO_CASE.lengths:
        check_length(demo_model, reference, length)


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_references_belong_to_the_models(case: ParityCase, tiny_directories: dict[str, Path]) -> None:
    """A change of the builder needs new references: say so instead of failing on the numbers."""
    reference = load_reference(case)
    assert weights_digest(tiny_directories[case.name]) == str(reference["weights_sha256"]), "run `make parity`"
    assert {"python", "torch", "transformers"} <= json.loads(str(reference["versions"])).keys()
