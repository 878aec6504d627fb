"""Classes of tokens and their weights against plain loops in float64, and the Hessians that are weighed by them."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2jax.models import Decoder, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.quantize.propagate import StageTask, Strengths, stage_terms
from exl2jax.stream import chunks as stream
from exl2jax.stream.hessians import collect
from exl2jax.stream.token_classes import (
    CLASSES,
    LEAST,
    class_weights,
    group_tables,
    squares_by_class,
    token_classes,
    token_factors,
)
from exl2jax.testing.states import rows_of
from tests.oracles import llama

ROWS, LENGTH = 3, 40
MASK = (np.arange(LENGTH) < np.asarray([40, 40, 17])[:, None]).astype(np.int32)


def class_of(place: int, loud: bool) -> int:
    """The class that the module's documentation gives a token."""
    return (place >= 1) + (place >= 2) + (place >= 8) + (place >= 32) + (5 if loud else 0)


def classes_of(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Classes of all tokens, `[R, T]`, in float64."""
    out = np.zeros(mask.shape, int)
    for r, row in enumerate(np.asarray(states, np.float64)):
        norms = np.sqrt((row**2).sum(axis=1))
        typical = np.median(norms[mask[r] > 0])
        out[r] = [class_of(t, norm > 4 * typical) for t, norm in enumerate(norms)]
    return out


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    """Rows with a loud first token, and some loud ones further on."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((ROWS, LENGTH, 64)).astype(np.float32)
    states[:2, 0] *= 50
    states[1, [5, 33]] *= 6
    return states


@pytest.mark.parametrize("mask", [np.ones_like(MASK), MASK], ids=["whole rows", "padded"])
def test_classes_of_tokens(states: np.ndarray, mask: np.ndarray) -> None:
    got = np.asarray(token_classes(jnp.asarray(states), jnp.asarray(mask, jnp.float32)))
    assert np.array_equal(got, classes_of(states, mask))
    assert set(got[1]) == {5, 1, 2, 7, 3, 4, 9}


def test_a_row_of_padding_has_no_loud_token() -> None:
    got = np.asarray(token_classes(jnp.zeros((1, 3, 8)), jnp.zeros((1, 3))))
    assert got.tolist() == [[0, 1, 2]]


def test_squares_are_summed_by_class(states: np.ndarray) -> None:
    classes = classes_of(states, MASK)
    got = np.asarray(squares_by_class(jnp.asarray(states), jnp.asarray(classes)))
    assert got.shape == (CLASSES, 64)
    for c in range(CLASSES):
        expected = (states[classes == c].astype(np.float64) ** 2).sum(axis=0)
        np.testing.assert_allclose(got[c], expected, rtol=1e-5)


COUNTS = st.lists(st.integers(0, 50), min_size=CLASSES, max_size=CLASSES).filter(any)


@given(counts=COUNTS, seed=st.integers(0, 999), linears=st.integers(1, 3))
def test_weights_are_one_in_the_mean_and_follow_the_squares(counts: list[int], seed: int, linears: int) -> None:
    rng, tokens = np.random.default_rng(seed), np.asarray(counts, float)
    squares = [rng.exponential(size=(CLASSES, 4)) * tokens[:, None] for _ in range(linears)]
    weights = class_weights(squares, tokens)
    np.testing.assert_allclose(weights @ tokens, tokens.sum(), rtol=1e-9)
    assert (weights[tokens == 0] == 1).all()
    shares = [sum(s[c].sum() / s.sum() for s in squares) / linears for c in range(CLASSES)]
    felt = [share / n for share, n in zip(shares, tokens, strict=True) if n]
    np.testing.assert_allclose(weights[tokens > 0], np.asarray(felt) * tokens.sum(), rtol=1e-9)


def test_a_class_that_is_not_felt_keeps_a_little_weight() -> None:
    squares = np.zeros((CLASSES, 3))
    squares[4] = 7.0
    counts = np.full(CLASSES, 10.0)
    weights = class_weights([squares, np.zeros_like(squares)], counts)
    assert weights[4] == pytest.approx(CLASSES, rel=1e-4)
    assert weights[0] == pytest.approx(LEAST, rel=1e-4)
    assert (class_weights([np.zeros_like(squares)], counts) == 1).all()


def test_factors_leave_out_what_does_not_reach_a_group(states: np.ndarray) -> None:
    tables = np.random.default_rng(1).exponential(size=(2, CLASSES)).astype(np.float32)
    reach = [jnp.asarray(MASK, jnp.float32), jnp.asarray(MASK[::-1], jnp.float32)]
    got = token_factors(reach, tables, jnp.asarray(states), jnp.asarray(MASK, jnp.float32))
    classes = classes_of(states, MASK)
    for g, (found, mask) in enumerate(zip(got, (MASK, MASK[::-1]), strict=True)):
        np.testing.assert_allclose(np.asarray(found) ** 2, tables[g][classes] * mask, rtol=1e-5)
    assert token_factors(reach, None, jnp.asarray(states), jnp.asarray(MASK, jnp.float32)) == reach


@pytest.fixture(scope="module")
def setting(tiny_llama_untied: Path) -> tuple[Decoder, tuple[ModuleSpec, ...], list[Any]]:
    model = open_model(tiny_llama_untied)
    specs = module_specs(model.config)[:2]
    return build_decoder(model.config), specs, [model.module_params(s) for s in specs]


def inputs_of(kind: str, params: Any, h: np.ndarray) -> list[np.ndarray]:
    """The inputs of both stages of a module, in float64."""
    if kind == "mlp":
        return list(llama.mlp_block(params, h, 1e-5))[1:]
    frequencies = llama.plain_frequencies(10000.0, 16)
    rows = [llama.attention_block(params, row, 4, 2, 1e-5, frequencies) for row in h]
    return [np.stack(x) for x in list(zip(*rows, strict=True))[1:]]


def weighed(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`sum_t w_t x_t y_t^T`, per row."""
    return np.einsum("rtk,rt,rtn->kn", x, weights, y) / ROWS


def close(got: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("index", [0, 1], ids=["attention", "mlp"])
def test_hessians_and_cross_terms_weigh_tokens(
    setting: Any, states: np.ndarray, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK_TOKENS", 2 * LENGTH)  # two chunks, the last one padded
    decoder, specs, all_params = setting
    spec, params = specs[index], all_params[index]
    rng = np.random.default_rng(2)
    tables = {x.key: rng.exponential(size=CLASSES) for x in spec.linears}
    quantized_states = states + 0.1 * rng.standard_normal(states.shape).astype(np.float32)
    kinds = classes_of(states, MASK)  # those of the full-precision stream

    rows, module = rows_of(states, MASK), decoder.module(spec)
    streams = (rows.place(states), rows.place(states))
    found = collect(module, spec, params, rows, *streams, tables=group_tables(spec.groups, tables))
    full, own = (inputs_of(spec.kind, params, h) for h in (states, quantized_states))
    for stage, (group,) in enumerate(spec.stages):
        weights = np.asarray(tables[group[0].key], np.float32)[kinds] * MASK
        close(found.hessians[stage], weighed(full[stage], full[stage], weights))
        assert float(found.tokens[stage]) == MASK.sum()
        task = StageTask(
            module=module,
            spec=spec,
            stage=stage,
            params=params,
            quantized=params,
            rows=rows,
            states=rows.place(quantized_states),
            reference=rows.place(states),
            strengths=Strengths(0.6, 0.3),
            tables=group_tables(spec.stages[stage], tables),
        )
        (terms,), (tokens,), *_ = stage_terms(task)
        assert float(tokens) == MASK.sum()
        close(terms.hessian, weighed(own[stage], own[stage], weights))
        if terms.cross is not None:
            close(terms.cross, weighed(own[stage], full[stage] - own[stage], weights))
        else:
            kernel = params[group[0].name]["kernel"].astype(np.float64)
            missing = 0.6 * (full[stage] - own[stage]) @ kernel + 0.3 * (states - quantized_states)
            close(terms.owed, weighed(own[stage], missing, weights))
