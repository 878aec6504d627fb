"""Gradients kept of the linears' outputs against finite differences of a float64 Llama, and their file."""

from pathlib import Path

import numpy as np
import pytest

from exl2jax.errors import NumericalError, StorageError
from exl2jax.measure.fisher import head_gradients
from exl2jax.measure.outputs import OutputStep
from exl2jax.models import LinearSpec, Model, build_decoder, module_specs, open_model
from exl2jax.quantize.outputs import (
    PADDED,
    OutputGradients,
    feedback_of,
    feeds_columns,
    read_output_gradients,
    sample_bytes,
    write_output_gradients,
)
from exl2jax.stream.blocks import Block
from exl2jax.stream.forward import embed
from exl2jax.stream.scan import GRADIENT
from exl2jax.testing.states import rows_of
from exl2jax.testing.tiny_model import write_tiny_llama
from tests.measure.test_fisher import labels, llama, traced
from tests.oracles.fisher import Probe, slope

SEED, ROWS, LENGTH, STEP = 3, 2, 12, 1e-4
MASK = np.ones((ROWS, LENGTH), np.int32)
MASK[1, 10:] = 0
ORDINARY = [(0, 8), (0, 9), (0, 10), (0, 11), (1, 8), (1, 9)]
"""Row and place of the tokens that are kept: quiet, none of the first eight, no padding."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(write_tiny_llama(tmp_path_factory.mktemp("untied") / "tiny", tie=False, mlp_bias=True))


def kept(model: Model, states: np.ndarray, path: Path, spoiled: float = 0.0) -> dict[str, OutputGradients]:
    """Forward, head, back through the last block: what is written of each linear, by key."""
    specs, decoder = module_specs(model.config), build_decoder(model.config)
    stack = traced(model, states, path)
    rows, found = rows_of(states, MASK, single=True), dict[str, OutputGradients]()

    def write(linear: LinearSpec, gradients: OutputGradients) -> None:
        found[linear.key] = gradients

    step = OutputStep(decoder=decoder, stack=stack, rows=rows, write=write, wanted=feeds_columns)
    gradients = head_gradients(decoder, model.head_params(), stack.final(), MASK, seed=SEED)
    carry = {GRADIENT: rows.place(gradients + np.float32(spoiled))}
    for spec in specs[:-3:-1]:
        carry, _ = step(carry, Block(spec, model.module_params(spec)))
    return found


def test_ordinary_tokens_are_kept(model: Model, tmp_path: Path) -> None:
    """Every slope at three columns of each linear of the last block."""
    states = embed(model, np.random.default_rng(1).integers(0, 320, (ROWS, LENGTH)).astype(np.int32))
    specs = module_specs(model.config)
    oracle = llama(model)
    found, drawn = kept(model, states, tmp_path / "inputs"), labels(oracle, states)
    wanted = [(i, x) for i in (len(specs) - 2, len(specs) - 1) for x in specs[i].linears if feeds_columns(x)]
    assert sorted(found) == sorted(x.key for _, x in wanted) and len(wanted) == 5
    for index, linear in wanted:
        samples, scale = found[linear.key]
        assert (samples.dtype, scale.dtype) == (np.float16, np.float32)
        assert samples.shape == (len(ORDINARY), linear.columns)
        np.testing.assert_allclose(np.mean(samples.astype(np.float64) ** 2, axis=0), 1, rtol=1e-2)
        for column in (0, 5, linear.columns - 1):
            expected = [
                slope(oracle, states[r], drawn[r], MASK[r], Probe(index, linear.name, t, column, STEP))
                for r, t in ORDINARY
            ]
            got = samples[:, column].astype(np.float64) * scale[column]
            np.testing.assert_allclose(got, expected, rtol=1e-2, atol=5e-3 * np.abs(expected).max())


def test_gradients_that_overflow_are_refused(model: Model, tmp_path: Path) -> None:
    states = embed(model, np.zeros((ROWS, LENGTH), np.int32))
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp: the gradients hold NaN or infinity"):
        kept(model, states, tmp_path / "inputs", spoiled=np.nan)


def test_tokens_without_gradients_are_left_out() -> None:
    """An expert's gradients are zero at the tokens of others; an output without any has no scale."""
    gradients = np.zeros((5, 3), np.float32)
    gradients[1], gradients[4] = [3e-9, 0, -1], [4e-9, 0, 1]
    found = OutputGradients.of(gradients)
    np.testing.assert_allclose(found.scale, [np.sqrt(12.5e-18), 0, 1], rtol=1e-6)
    np.testing.assert_allclose(found.samples, [[3 / np.sqrt(12.5), 0, -1], [4 / np.sqrt(12.5), 0, 1]], rtol=1e-3)
    assert found.padded.samples.shape == (PADDED, 3) and not found.padded.samples[2:].any()
    nothing = OutputGradients.of(gradients[:1])
    assert nothing.samples.shape == (0, 3) and not nothing.scale.any()
    assert nothing.padded.samples.shape == (PADDED, 3)


def test_the_file_of_a_linear(tmp_path: Path) -> None:
    linear = LinearSpec(name="q_proj", key="model.layers.0.self_attn.q_proj", rows=32, columns=16)
    gradients = OutputGradients.of(np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32))
    write_output_gradients(tmp_path, linear, gradients)
    for got, expected in zip(read_output_gradients(tmp_path, linear), gradients, strict=True):
        assert np.array_equal(got, expected) and got.dtype == expected.dtype
    assert sample_bytes(linear, 40) == gradients.samples.nbytes
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match="q_proj"):
        read_output_gradients(tmp_path, linear)


def test_linears_that_feed_nothing_read_nothing() -> None:
    def read(linear: LinearSpec) -> OutputGradients:
        raise AssertionError(linear.key)

    for name in ("v_proj", "gate_proj", "w1.3"):
        assert feedback_of(LinearSpec(name=name, key=name, rows=32, columns=16), read) is None
    assert feedback_of(LinearSpec(name="q_proj", key="q", rows=32, columns=16), None) is None
    assert feedback_of(LinearSpec(name="up_proj", key="up", rows=32, columns=16400), read) is None
