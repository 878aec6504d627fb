"""Error propagation against least squares in float64, its terms against a float64 Llama."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.models import Decoder, ModelConfig, Module, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.ops import factorize
from exl2jax.quantize import propagate
from exl2jax.quantize.propagate import (
    CrossTerms,
    StageTask,
    StageTerms,
    Strengths,
    corrected_targets,
    finish,
    stage_terms,
)
from exl2jax.stream import chunks as stream
from exl2jax.stream.forward import forward
from exl2jax.testing.states import rows_of
from tests.oracles import llama

ROWS, LENGTH = 5, 12
MASK = (np.arange(LENGTH) < np.asarray([12, 12, 7, 12, 3])[:, None]).astype(np.int32)


def closest(x: np.ndarray, outputs: np.ndarray, kernel: np.ndarray, damping: float, rows: int) -> np.ndarray:
    """The weight whose outputs on `x` are closest to `outputs`, with a pull of `damping` towards `kernel`."""
    pull = np.sqrt(damping) * np.eye(x.shape[1])
    a = np.concatenate([x / np.sqrt(rows), pull])
    b = np.concatenate([outputs / np.sqrt(rows), pull @ kernel])
    return np.linalg.lstsq(a, b, rcond=None)[0]


@pytest.mark.parametrize(("strength", "residual"), [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.3, 0.7), (0.0, 1.0)])
def test_the_target_is_the_solution_of_least_squares(strength: float, residual: float) -> None:
    rng = np.random.default_rng(0)
    tokens, k, n = 300, 64, 40
    x_q = rng.standard_normal((tokens, k)) @ (np.eye(k) + 0.3 * rng.standard_normal((k, k)))
    x_f = x_q + 0.3 * rng.standard_normal((tokens, k))
    stream_error = 0.3 * rng.standard_normal((tokens, n))
    kernel = rng.standard_normal((k, n))
    missing = strength * (x_f - x_q) @ kernel + residual * stream_error
    hessian, cross, owed = (m / ROWS for m in (x_q.T @ x_q, x_q.T @ (x_f - x_q), x_q.T @ missing))
    factor = factorize(jnp.asarray(hessian, jnp.float32))
    h, c, o = (jnp.asarray(m, jnp.float32) for m in (hessian, cross, owed))
    strengths = Strengths(strength, residual)
    (got,) = corrected_targets([jnp.asarray(kernel, jnp.float32)], factor, CrossTerms(h, owed=o), strengths)
    if not residual:
        (shared,) = corrected_targets([jnp.asarray(kernel, jnp.float32)], factor, CrossTerms(h, cross=c), strengths)
        np.testing.assert_allclose(shared, got, atol=1e-4)
    outputs = (x_q + strength * (x_f - x_q)) @ kernel + residual * stream_error
    expected = closest(x_q, outputs, kernel, float(factor.damping), ROWS)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert np.abs(expected - kernel).max() > 0.01


def test_no_strength_leaves_the_weight_alone() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 32))
    kernel = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    terms = CrossTerms(*(jnp.asarray(x.T @ x, jnp.float32),) * 2)
    (got,) = corrected_targets([kernel], factorize(terms.hessian), terms, Strengths(0.0, 0.0))
    assert np.array_equal(got, kernel)


@pytest.fixture(scope="module")
def setting(tiny_llama_untied: Path) -> tuple[Decoder, tuple[ModuleSpec, ...], Any, np.ndarray, np.ndarray]:
    model = open_model(tiny_llama_untied)
    specs = module_specs(model.config)[:2]
    reference = np.random.default_rng(2).standard_normal((ROWS, LENGTH, 64)).astype(np.float32)
    states = reference + 0.2 * np.random.default_rng(3).standard_normal(reference.shape).astype(np.float32)
    return build_decoder(model.config), specs, [model.module_params(s) for s in specs], states, reference


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a chunk, the last chunk padded."""
    monkeypatch.setattr(stream, "CHUNK_TOKENS", 2 * LENGTH)


def block(kind: str, params: Any, h: np.ndarray) -> list[np.ndarray]:
    """New states and both stages' inputs `[R, T, ...]` in float64."""
    if kind == "mlp":
        return list(llama.mlp_block(params, h, 1e-5))
    frequencies = llama.plain_frequencies(10000.0, 16)
    rows = [llama.attention_block(params, row, 4, 2, 1e-5, frequencies) for row in h]
    return [np.stack(x) for x in zip(*rows, strict=True)]


def normed(params: Any, h: np.ndarray) -> np.ndarray:
    return llama.rms_norm(h, params["norm"]["weight"], 1e-5)


def product(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`X^T Y` over the tokens of the mask, per row."""
    kept = mask.astype(bool)
    return x[kept].T @ y[kept] / ROWS


def close(got: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("index", [0, 1], ids=["attention", "mlp"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole rows", "padded"])
def test_terms_of_both_stages(setting: Any, index: int, mask: np.ndarray | None) -> None:
    decoder, specs, all_params, states, reference = setting
    spec, params = specs[index], all_params[index]
    rng = np.random.default_rng(4)
    quantized = dict(params)
    for linear in spec.groups[0]:
        kernel = params[linear.name]["kernel"]
        noise = 0.05 * rng.standard_normal(kernel.shape).astype(np.float32)
        quantized[linear.name] = params[linear.name] | {"kernel": kernel + noise}
    kept = np.ones((ROWS, LENGTH), np.int32) if mask is None else mask

    rows, module = rows_of(states, mask), decoder.module(spec)
    streams = (rows, rows.place(states), rows.place(reference))
    task = StageTask(module, spec, 0, params, params, *streams, Strengths(0.5, 0.5))
    (first,), (tokens,), *_ = stage_terms(task)
    assert float(tokens) == kept.sum()
    _, x_q, _ = block(spec.kind, params, states)
    expected_hidden, x_f, y_f = block(spec.kind, params, reference)
    close(first.hessian, product(x_q, x_q, kept))
    close(first.cross, product(x_q, x_f - x_q, kept))
    assert first.owed is None

    ((last,),) = spec.stages[1]
    kernel = params[last.name]["kernel"].astype(np.float64)
    for strengths in (Strengths(0.7, 0.4), Strengths(1.0, 0.0)):
        out = rows.place(reference)
        task = StageTask(module, spec, 1, params, quantized, *streams, strengths)
        (second,), _, tally, kept_inputs = stage_terms(task, out)
        own_hidden, _, y_q = block(spec.kind, quantized, states)
        missing = strengths.inputs * (y_f - y_q) @ kernel + strengths.residual * (reference - states)
        close(second.hessian, product(y_q, y_q, kept))
        close(second.owed, product(y_q, missing, kept))
        assert second.cross is None
        np.testing.assert_allclose(out.array(), expected_hidden, atol=2e-4)
        assert kept_inputs is not None
        np.testing.assert_allclose(kept_inputs[0].array(), y_q, atol=2e-4)
        finished = rows.place(states)
        whole = forward(module, quantized, rows.place(states), rows.place(states))
        tally = finish(module, quantized, finished, kept_inputs, finished, tally)
        np.testing.assert_allclose(finished.array(), own_hidden, atol=2e-4)
        np.testing.assert_allclose(tally[1:], whole[1:], rtol=1e-4)
        x = normed(params, states)
        first = [x @ quantized[i.name]["kernel"] + quantized[i.name].get("bias", 0) for i in spec.groups[0]]
        own = y_q @ kernel + params[last.name].get("bias", 0)
        np.testing.assert_allclose(tally.linear, max(np.abs(y).max() for y in (*first, own)), rtol=1e-3)


def test_inputs_of_the_last_stage_are_kept_only_where_there_is_room(
    setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, specs, all_params, states, reference = setting

    def terms(stage: int) -> StageTerms:
        params, rows = all_params[1], rows_of(states)
        streams = (rows, rows.place(states), rows.place(reference))
        task = StageTask(decoder.module(specs[1]), specs[1], stage, params, params, *streams, Strengths(0.5, 0.5))
        return stage_terms(task)

    kept, room = terms(1), specs[1].linears[-1].rows * states[..., 0].size * 4
    assert terms(0).inputs is None
    assert kept.inputs is not None and kept.inputs[0].array().nbytes == room
    monkeypatch.setattr(propagate, "KEPT_BYTES", room - 1)
    assert terms(1).inputs is None


def test_the_share_of_the_residual(tiny_llama_untied: Path) -> None:
    """A norm behind the linear takes its scale away; a multiplier and a second writer change what it must add."""
    config = open_model(tiny_llama_untied).config
    multiplied = replace(config, scales=replace(config.scales, residual=0.25))
    normed = replace(config, architecture="Gemma2ForCausalLM")

    def share(config: ModelConfig) -> Callable[[str], float]:
        return lambda kind: Module(config, kind).residual_share

    plain, scaled, hidden = map(share, (config, multiplied, normed))
    assert plain("self_attn") == plain("mlp") == plain("block_sparse_moe") == 1
    assert plain("parallel_decoder") == 0.5
    assert scaled("self_attn") == scaled("mlp") == 4
    assert hidden("self_attn") == hidden("mlp") == 0
