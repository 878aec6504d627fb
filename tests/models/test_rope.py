"""Rotary tables against the published formulas in float64, and the spellings of the settings."""

import math
from typing import Any

import numpy as np
import pytest

from exl2jax.errors import ModelError, UnsupportedModelError
from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.models.rope import RopeConfig, read_rope, rope_tables
from exl2jax.models.spelling import stock_spelling
from tests.oracles import llama as oracle

DIM, LENGTH, TRAINED = 32, 80, 64


def check(config: RopeConfig, frequencies: np.ndarray, amplitude: float = 1.0, length: int = LENGTH) -> None:
    """The tables hold `amplitude * cos` and `sin` of `position * frequency`."""
    cos, sin = rope_tables(config, DIM, length)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (length, DIM // 2)
    angles = np.arange(length)[:, None] * frequencies[None, :]
    np.testing.assert_allclose(cos, amplitude * np.cos(angles), atol=5e-5)
    np.testing.assert_allclose(sin, amplitude * np.sin(angles), atol=5e-5)


def scaled(max_position: int = 256, theta: float = 10000.0, **scaling: Any) -> RopeConfig:
    return read_rope({"rope_theta": theta, "rope_scaling": scaling}, max_position, "here")


def test_plain() -> None:
    check(read_rope({"rope_theta": 5e5}, 256, "here"), oracle.plain_frequencies(5e5, DIM))


def test_linear_slows_every_frequency() -> None:
    check(scaled(type="linear", factor=2.5), oracle.plain_frequencies(1e4, DIM) / 2.5)


@pytest.mark.parametrize("length", [8, TRAINED, TRAINED + 1, 200])
def test_dynamic_grows_with_the_length(length: int) -> None:
    config = scaled(TRAINED, type="dynamic", factor=4.0)
    check(config, oracle.dynamic_frequencies(1e4, DIM, 4.0, TRAINED, length), length=length)
    if length <= TRAINED:
        check(config, oracle.plain_frequencies(1e4, DIM), length=length)


def test_llama3() -> None:
    config = scaled(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=TRAINED,
    )
    frequencies = oracle.llama3_frequencies(1e4, DIM, 8.0, 1.0, 4.0, TRAINED)
    plain = oracle.plain_frequencies(1e4, DIM)
    kept = np.isclose(frequencies, plain).sum()
    slowed = np.isclose(frequencies, plain / 8).sum()
    assert 0 < kept < kept + slowed < DIM // 2, "all three bands should be met"
    check(config, frequencies)


def test_yarn() -> None:
    config = scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=TRAINED)
    check(config, oracle.yarn_frequencies(1e4, DIM, 4.0, TRAINED), 0.1 * math.log(4) + 1)


def test_yarn_with_its_own_corners_and_attention_factor() -> None:
    config = scaled(
        rope_type="yarn",
        factor=2.0,
        original_max_position_embeddings=TRAINED,
        beta_fast=8.0,
        beta_slow=2.0,
        attention_factor=1.25,
    )
    check(config, oracle.yarn_frequencies(1e4, DIM, 2.0, TRAINED, 8, 2), 1.25)


def test_yarn_with_two_scales() -> None:
    options = {"original_max_position_embeddings": TRAINED, "mscale": 1.0, "mscale_all_dim": 0.5}
    amplitude = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    config = scaled(rope_type="yarn", factor=4.0, **options)
    check(config, oracle.yarn_frequencies(1e4, DIM, 4.0, TRAINED), amplitude)


def test_scale_and_alpha_of_the_command_line() -> None:
    check(RopeConfig(scale=4.0), oracle.plain_frequencies(1e4, DIM) / 4)
    check(RopeConfig(alpha=2.5), oracle.plain_frequencies(1e4 * 2.5 ** (DIM / (DIM - 2)), DIM))


def test_old_and_new_spelling_are_the_same() -> None:
    old = read_rope({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 256, "here")
    respelled = stock_spelling(
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ARCHITECTURES["LlamaForCausalLM"],
    )
    new = read_rope(respelled, 256, "here")
    assert (old.theta, old.kind, old.factor()) == (new.theta, new.kind, new.factor()) == (5e5, "linear", 2.0)


def test_nothing_given() -> None:
    for record in ({}, {"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}}):
        config = read_rope(record, 256, "here")
        assert (config.theta, config.kind, config.factor(), config.original_max_position) == (1e4, "default", 1.0, 256)


def test_two_dimensions_have_one_frequency() -> None:
    cos, _ = rope_tables(RopeConfig(alpha=2.0), 2, 5)
    np.testing.assert_allclose(cos[:, 0], np.cos(np.arange(5)), atol=1e-6)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"rope_scaling": 4}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "type linear needs a positive factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "needs a positive factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "needs a positive factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs a positive low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1.0}}, "needs a positive factor"),
        ({"rope_theta": "big"}, "rope_theta must be a number above 1"),
        ({"rope_theta": 0}, "rope_theta must be a number above 1"),
    ],
)
def test_faulty_settings_name_file_and_key(record: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=rf"x/config\.json: .*{what}"):
        read_rope(record, 256, "x/config.json")


@pytest.mark.parametrize("scaling", [{"type": "su2", "factor": 2.0}, {"rope_type": 3}, {"rope_type": ["linear"]}])
def test_unknown_types_are_refused_by_name(scaling: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"x/config\.json: rope_scaling type .* is not supported"):
        read_rope({"rope_scaling": scaling}, 256, "x/config.json")
