"""The decoder's blocks against a float64 Llama, and the properties that the pipeline relies on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.models import Decoder, ModelConfig, Module, build_decoder
from exl2jax.models.attention import QUERY_BLOCK
from exl2jax.models.rope import RopeConfig
from tests.oracles import llama as oracle

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=48,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=50,
    norm_eps=1e-5,
    max_position=512,
    tie_word_embeddings=False,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    activation="silu",
    rope=RopeConfig(theta=1000.0),
)
FREQUENCIES = oracle.plain_frequencies(1000.0, 16)
SIZES = {
    "self_attn": {"q_proj": (48, 64), "k_proj": (48, 32), "v_proj": (48, 32), "o_proj": (64, 48)},
    "mlp": {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)},
}

forward = jax.jit(Module.forward, static_argnames="self")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return build_decoder(CONFIG)


def params_of(kind: str, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {"norm": {"weight": (1 + 0.2 * rng.standard_normal(48)).astype(np.float32)}}
    for name, (rows, columns) in SIZES[kind].items():
        kernel = rng.standard_normal((rows, columns)).astype(np.float32) * 1.5 * rows**-0.5
        params[name] = {"kernel": kernel, "bias": rng.standard_normal(columns).astype(np.float32) * 0.2}
    return params


def states_of(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, length, 48)).astype(np.float32)


def close(got: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize(("rows", "length"), [(2, 20), (1, 1), (1, QUERY_BLOCK + 30)])
def test_attention(decoder: Decoder, rows: int, length: int) -> None:
    """The last length crosses the border between two blocks of queries."""
    params, h = params_of("self_attn"), states_of(rows, length)
    trace = forward(Module(CONFIG, "self_attn"), params, h)
    for row in range(rows):
        hidden, first, second = oracle.attention_block(params, h[row], 4, 2, 1e-5, FREQUENCIES)
        close(trace.hidden[row], hidden)
        close(trace.inputs[0][0][row], first)
        close(trace.inputs[1][0][row], second)


def test_mlp(decoder: Decoder) -> None:
    params, h = params_of("mlp"), states_of(2, 20)
    trace = forward(Module(CONFIG, "mlp"), params, h)
    hidden, first, second = oracle.mlp_block(params, h, 1e-5)
    close(trace.hidden, hidden)
    close(trace.inputs[0][0], first)
    close(trace.inputs[1][0], second)


def test_head(decoder: Decoder) -> None:
    rng = np.random.default_rng(3)
    params = {
        "norm": {"weight": rng.random(48).astype(np.float32)},
        "lm_head": {"kernel": rng.standard_normal((48, 50)).astype(np.float32)},
    }
    h = states_of(2, 9)
    x = oracle.rms_norm(h, params["norm"]["weight"], 1e-5)
    close(decoder.head_input(params, jnp.asarray(h)), x)
    close(decoder.logits(params, jnp.asarray(h)), x @ params["lm_head"]["kernel"].astype(np.float64))


@pytest.mark.parametrize("kind", SIZES)
def test_kernels_may_be_stored_in_half_precision(decoder: Decoder, kind: str) -> None:
    params, h = params_of(kind), states_of(2, 20)
    halves = {n: p if n == "norm" else p | {"kernel": p["kernel"].astype(np.float16)} for n, p in params.items()}
    rounded = {n: p if n == "norm" else p | {"kernel": p["kernel"].astype(np.float32)} for n, p in halves.items()}
    got = forward(Module(CONFIG, kind), halves, h)
    assert got.hidden.dtype == jnp.float32
    close(got.hidden, np.asarray(forward(Module(CONFIG, kind), rounded, h).hidden))


@pytest.mark.parametrize("kind", SIZES)
def test_the_steps_make_up_the_whole(decoder: Decoder, kind: str) -> None:
    """Measurement swaps linears between the steps: they must give what `forward` gives."""
    params, h, module = params_of(kind), jnp.asarray(states_of(2, 20)), Module(CONFIG, kind)
    trace = forward(Module(CONFIG, kind), params, h)
    outputs = module.linears(0, params, module.inputs(0, params, h, {}))
    assert set(outputs) == set(SIZES[kind]) - {"o_proj", "down_proj"}
    second = module.inputs(1, params, h, outputs)
    close(second[0], np.asarray(trace.inputs[1][0]))
    outputs |= module.linears(1, params, second)
    close(module.output(params, h, outputs), np.asarray(trace.hidden))


def test_later_tokens_do_not_reach_earlier_ones(decoder: Decoder) -> None:
    params, h = params_of("self_attn"), states_of(2, 20)
    changed = h.copy()
    changed[:, 12:] += 3
    before, after = (np.asarray(forward(Module(CONFIG, "self_attn"), params, x).hidden) for x in (h, changed))
    assert np.array_equal(before[:, :12], after[:, :12])
    assert not np.allclose(before[:, 12:] + 3, after[:, 12:], atol=1e-2)


def test_rows_do_not_reach_each_other(decoder: Decoder) -> None:
    params, h = params_of("self_attn"), states_of(2, 20)
    changed = h.copy()
    changed[1] = 0
    before, after = (np.asarray(forward(Module(CONFIG, "self_attn"), params, x).hidden) for x in (h, changed))
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)


def test_a_decoder_is_a_static_value(decoder: Decoder) -> None:
    assert hash(decoder) == hash(build_decoder(CONFIG))
    assert decoder == build_decoder(CONFIG)
    assert hash(Module(CONFIG, "mlp")) == hash(Module(CONFIG, "mlp")) != hash(Module(CONFIG, "self_attn"))
