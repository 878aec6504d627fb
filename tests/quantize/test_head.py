"""The head: its Hessian against NumPy, GPTQ below a billion weights, round to nearest above."""

from typing import Any

import numpy as np
import pytest

from exl2jax.models import Decoder, LinearSpec, build_decoder, head_spec, open_model
from exl2jax.ops import unpack_linear
from exl2jax.quantize import head
from exl2jax.quantize.head import head_terms, quantize_head
from exl2jax.stock_tables import head_qparams
from exl2jax.testing.states import rows_of
from tests.oracles import gptq as oracle
from tests.oracles.llama import rms_norm


@pytest.fixture(scope="module")
def setting(tiny_llama_untied: Any) -> tuple[Decoder, LinearSpec, dict[str, Any], np.ndarray, np.ndarray]:
    model = open_model(tiny_llama_untied)
    states = np.random.default_rng(0).standard_normal((5, 16, 64)).astype(np.float32)
    mask = np.ones((5, 16), np.int32)
    mask[3:, 9:] = 0
    return build_decoder(model.config), head_spec(model.config), model.head_params(), states, mask


def expected_hessian(params: dict[str, Any], states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    x = rms_norm(states, params["norm"]["weight"], 1e-5)[mask.astype(bool)]
    return x.T @ x / len(states)


def test_hessian_of_what_the_head_reads(setting: Any) -> None:
    decoder, _, params, states, mask = setting
    for m in (mask, np.ones_like(mask)):
        rows = rows_of(states, m)
        got = head_terms(decoder, params, rows, rows.place(states), None)
        expected = expected_hessian(params, states, m)
        np.testing.assert_allclose(got.hessian, expected, rtol=1e-4, atol=1e-5 * expected.max())
        assert got.cross is None


def test_the_head_takes_back_what_the_states_lack(setting: Any) -> None:
    """With the full-precision stream beside it, the head's logits come closer to the full-precision ones."""
    decoder, spec, params, states, mask = setting
    mixing = np.eye(64) + 0.1 * np.random.default_rng(1).standard_normal((64, 64))
    reference = (states @ mixing).astype(np.float32)
    inputs = [rms_norm(s, params["norm"]["weight"], 1e-5)[mask.astype(bool)] for s in (states, reference)]
    rows = rows_of(states, mask)
    terms = head_terms(decoder, params, rows, rows.place(states), rows.place(reference))
    cross = inputs[0].T @ (inputs[1] - inputs[0]) / len(states)
    np.testing.assert_allclose(terms.cross, cross, rtol=1e-3, atol=1e-4 * np.abs(cross).max())

    wanted = inputs[1] @ params["lm_head"]["kernel"].astype(np.float64)

    def error(**correction: Any) -> float:
        packed, _, _ = quantize_head(decoder, spec, params, rows, rows.place(states), head_qparams(8), **correction)
        return float(np.linalg.norm(inputs[0] @ np.asarray(packed.weight, np.float64) - wanted))

    assert (
        error(reference=rows.place(reference), strength=1.0)
        < error(reference=rows.place(reference), strength=0.5)
        < 0.9 * error()
    )
    assert error(reference=rows.place(reference)) == error()


@pytest.mark.parametrize("bits", [3, 6])
def test_gptq_below_the_limit_and_rounding_above(setting: Any, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, spec, params, states, mask = setting
    rows = rows_of(states, mask)
    fed, damping, diagnostics = quantize_head(decoder, spec, params, rows, rows.place(states), head_qparams(bits))
    monkeypatch.setattr(head, "MAX_GPTQ_WEIGHTS", spec.weights - 1)
    rounded, none, _ = quantize_head(decoder, spec, params, rows, rows.place(states), head_qparams(bits))
    assert list(damping) == ["lm_head"] and diagnostics == ()
    assert none == {}
    kernel, hessian = params["lm_head"]["kernel"], expected_hessian(params, states, mask)
    losses = [oracle.proxy_loss(hessian, kernel, np.asarray(x.weight)) for x in (fed, rounded)]
    assert losses[0] < 0.8 * losses[1]
    for packed, weight in (fed, rounded):
        assert packed.bits == head_qparams(bits).total_bits(spec.rows, spec.columns)
        assert np.array_equal(unpack_linear(packed)[:, : spec.columns], np.asarray(weight))
    # Without a Hessian the rows stay where they are.
    assert np.array_equal(rounded.packed.q_invperm, np.arange(spec.rows))


@pytest.mark.parametrize("limit", [0, head.MAX_GPTQ_WEIGHTS])
def test_a_head_in_the_sixteen_bits_of_its_source_gives_the_same(
    setting: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, spec, params, states, mask = setting
    rows = rows_of(states, mask)
    monkeypatch.setattr(head, "MAX_GPTQ_WEIGHTS", limit)
    correction: dict[str, Any] = {"reference": rows.place(1.1 * states), "strength": 0.5}

    def tensors(kernel: np.ndarray) -> dict[str, np.ndarray]:
        given = params | {"lm_head": {"kernel": kernel}}
        done, _, _ = quantize_head(decoder, spec, given, rows, rows.place(states), head_qparams(4), **correction)
        return done.packed.tensors(spec.key)

    narrow = params["lm_head"]["kernel"].astype(np.float16)
    found, expected = tensors(narrow), tensors(narrow.astype(np.float32))
    assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)
