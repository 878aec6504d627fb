"""Counted operations against sums written out by hand, and against a walk over every pair and every weight."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2jax.errors import SettingsError
from exl2jax.estimate import DEVICES, Passes, Work, conversion_work, device_estimate, find_device
from exl2jax.estimate.plan import (
    bytes_up,
    conversion_launches,
    device_memory,
    feedback_launches,
    gptq_launches,
)
from exl2jax.estimate.work import attention_work, factor_work, forward_work, gptq_work, hessian_work
from exl2jax.models import LinearSpec, ModelConfig, head_spec, module_specs
from exl2jax.models.config import read_config
from exl2jax.ops.scales import search_columns
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import write_tiny
from exl2jax.variants.recipe import PRESETS, find_recipe

# The tiny Llama: hidden size 64, four heads of 16, keys and values of two, 160 inside, 320 tokens, two layers.
ATTENTION, MLP, HEAD = 64 * (64 + 32 + 32) + 64 * 64, 3 * 64 * 160, 64 * 320
PASSES = Passes(rows=5, measurement_rows=3, length=24)
PAIRS = 24 * 25 // 2


@pytest.fixture
def config(tiny_llama: Path) -> ModelConfig:
    return read_config(tiny_llama)[0]


def test_works_add_up() -> None:
    total = Work(1, 2, 3, 4) + Work(10, 20, 30, 40).times(2)
    assert total == Work(21, 42, 63, 84) and total.products == 126


def test_a_matrix() -> None:
    assert gptq_work(64, 32) == Work(exact=64 * 64 * 32, elementwise=64 * 32 * (97 * 11 + 12))
    assert gptq_work(64, 32, search_columns).elementwise == 64 * 32 * (72 * 11 + 12)
    assert factor_work(30) == Work(exact=18000)


def test_a_row_forward(config: ModelConfig) -> None:
    attention, mlp = module_specs(config)[:2]
    assert forward_work(attention, config, 24) == Work(2 * 24 * ATTENTION + 4 * PAIRS * 64)
    assert forward_work(mlp, config, 24) == Work(2 * 24 * MLP)
    assert hessian_work(attention, 24) == Work(sums=24 * 2 * 64**2)
    assert hessian_work(mlp, 24) == Work(sums=24 * (64**2 + 160**2))


@pytest.mark.parametrize(("length", "window"), [(24, 5), (24, 24), (10, 40)])
def test_a_window_hides_pairs(config: ModelConfig, length: int, window: int) -> None:
    config = replace(config, window=window, sliding=(True, False))
    spec, _, whole, _ = module_specs(config)
    seen = sum(1 for query in range(length) for key in range(length) if query - window < key <= query)
    heads = config.num_heads * config.head_dim
    assert attention_work(spec, config, length) == Work(2 * 2 * seen * heads)
    assert attention_work(whole, config, length) == Work(2 * length * (length + 1) * heads)


def test_all_experts_see_all_tokens(tmp_path: Path) -> None:
    config = read_config(write_tiny(tmp_path, TINY["mixtral"]))[0]
    moe = module_specs(config)[1]
    expert = 3 * config.hidden_size * config.intermediate_size
    assert forward_work(moe, config, 24) == Work(2 * 24 * config.num_experts * expert)


def test_passes_that_find_prices(config: ModelConfig) -> None:
    found = conversion_work(config, find_recipe("max"), PASSES)
    assert list(found) == ["forward", "backward", "price", "trace", "outputs", "quantize", "tune"]
    row = 2 * (2 * 24 * (ATTENTION + MLP) + 4 * PAIRS * 64)
    assert found["forward"] == Work(3 * row)
    assert found["backward"] == Work(3 * (2 * row + 2 * 4 * PAIRS * 64 + 2 * 2 * 24 * HEAD))
    assert found["trace"] == Work(5 * row)
    assert found["outputs"] == Work(5 * (2 * row + 2 * 4 * PAIRS * 64 + 2 * 2 * 24 * HEAD))
    piece = 2 * (2 * 256 * (ATTENTION + MLP) + 4 * (256 * 257 // 2) * 64)
    assert found["tune"] == Work(60 * (5 * piece + 4 * 2 * 256 * HEAD))
    assert found["price"].fast == 3 * row
    factors = 2 / 3 * (3 * 64**3 + 160**3)
    walks = 64 * (ATTENTION + 2 * 64 * 160) + 160 * 160 * 64
    hessians = 3 * 24 * (3 * 64**2 + 160**2)
    assert found["price"].exact == pytest.approx(2 * (factors + 7 * walks))
    assert found["price"].sums == 2 * hessians


def test_quantization_towards_the_weights(config: ModelConfig) -> None:
    found = conversion_work(config, find_recipe("fast"), PASSES)["quantize"]
    row = 2 * (2 * 24 * (ATTENTION + MLP) + 4 * PAIRS * 64)
    # The rows that are quantized twice, those of the check once more, and the check's logits twice.
    assert found.fast == 15 * row + 2 * 5 * 2 * 24 * HEAD


def test_quantization_with_propagation(config: ModelConfig) -> None:
    plain, found = (conversion_work(config, find_recipe(name), PASSES)["quantize"] for name in ("fast", "max"))
    tokens, down, o = 5 * 24, 160 * 64, 64 * 64
    first = 64 * (64 + 32 + 32) + 2 * 64 * 160
    row = 2 * (2 * 24 * (ATTENTION + MLP) + 4 * PAIRS * 64)
    extra = 2 * (2 * 2 * tokens * first + 2 * 5 * 4 * PAIRS * 64)
    assert found.fast == plain.fast - 10 * row + extra
    solved = 2 * 4 * 64**3 + 2 * 64 * first + 6 * (160 * down + 64 * o)
    cross, owed = 2 * 2 * tokens * 64**2, 4 * tokens * (down + o)
    # q and o, k, up, down: a Hessian and a factor of their columns, and as many products as the walk has errors.
    fed = ((64, 64), (64, 64), (64, 32), (64, 160), (160, 64))
    feedback = sum(2 / 3 * n**3 + 2 * k * n * n for k, n in fed)
    assert found.exact == pytest.approx(plain.exact + 2 * (solved + feedback))
    outputs = sum(tokens * n**2 for _, n in fed)
    assert found.sums == plain.sums + 2 * (cross + owed + outputs) + 2 * tokens * 64**2


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_architecture_is_counted_from_its_config_alone(tmp_path: Path, name: str, preset: str) -> None:
    write_tiny(tmp_path, TINY[name])
    for weights in tmp_path.glob("*.safetensors*"):
        weights.unlink()
    config = read_config(tmp_path)[0]
    few, many = (conversion_work(config, find_recipe(preset), Passes(rows=n, length=8)) for n in (20, 40))
    assert all(work.products > 0 for work in few.values())
    assert many["quantize"].fast > few["quantize"].fast and many["quantize"].elementwise == few["quantize"].elementwise
    assert device_memory(config, find_recipe(preset)) > 0


@pytest.mark.parametrize(("rows", "size", "seen"), [(4096, 128, 408), (4096, 32, 1240), (11008, 128, 1297)])
def test_launches(rows: int, size: int, seen: int) -> None:
    """Against the launches in XLA's text of these walks, compiled for an H100."""
    linear = LinearSpec(name="x", key="x", rows=rows, columns=4096)
    assert gptq_launches(linear, size, kernels=True) == pytest.approx(seen, rel=0.07)
    more = gptq_launches(linear, size, kernels=False) - gptq_launches(linear, size, kernels=True)
    assert more == (15 - 9) * (rows // size) + 3 * (rows // 8)


@pytest.mark.parametrize(("rows", "seen"), [(4096, 5621), (11008, 15436)])
def test_launches_without_kernels(rows: int, seen: int) -> None:
    """Against XLA's text of the program that prices such a matrix at seven widths, compiled for an RTX 4090."""
    linear = LinearSpec(name="x", key="x", rows=rows, columns=4096)
    assert sum(gptq_launches(linear, size, kernels=False) for size in (128, 32)) == pytest.approx(seen, rel=0.03)


def test_a_tuning_keeps_the_weights_or_sends_them_up_in_every_step(config: ModelConfig) -> None:
    """They stay where they take half of a device's memory at most, and else go up twice a step."""
    most, weights = find_recipe("max"), 2 * sum(spec.weights for spec in module_specs(config))
    devices = (replace(DEVICES["h100"], memory=weights * times) for times in (2, 1))
    kept, sent = (device_estimate(config, most, PASSES, device) for device in devices)
    assert sent.bytes_up - kept.bytes_up >= 2 * most.tuned_steps * weights
    assert kept.memory >= weights and kept.work["tune"]["fast"] > 0
    assert "tune" not in device_estimate(config, find_recipe("fast"), PASSES, DEVICES["h100"]).work


def test_widths_side_by_side_are_launched_once(config: ModelConfig) -> None:
    best, (h100, a100) = find_recipe("best"), (DEVICES["h100"], DEVICES["a100"])
    linears = [linear for spec in module_specs(config) for linear in spec.linears]
    sizes = (128, 32, 128)  # of the seven widths that are priced, and of the quantization
    for device, kernels in ((h100, True), (a100, False)):
        head = gptq_launches(head_spec(config), 128, kernels=kernels)
        walks = sum(gptq_launches(x, size, kernels=kernels) for x in linears for size in sizes)
        assert conversion_launches(config, best, device) == head + walks


def test_launches_of_feedback_between_columns() -> None:
    """With the kernels every block of a group takes five; without, every row of a block is walked by itself."""
    linear = LinearSpec(name="q_proj", key="x", rows=4096, columns=4096)
    assert feedback_launches(linear, kernels=True) == 32 * 32 * 5
    assert feedback_launches(linear, kernels=False) == 4 * 32 * 5 + 3 * 3 * 4096 // 8
    narrow = LinearSpec(name="k_proj", key="x", rows=64, columns=32)
    assert feedback_launches(narrow, kernels=True) == 2 * 5


def test_what_does_not_fit_crosses_the_bus(config: ModelConfig) -> None:
    best, passes = find_recipe("best").over((), tuned_steps=0), Passes(rows=10, measurement_rows=4, length=256)
    large = find_device("h100")
    streams = 2 * 4 * 10 * 256 * 64
    found = device_estimate(config, best, passes, large)
    assert (found.streams, found.streams_fit, found.fits) == (streams, True, True)
    weights = 2 * (ATTENTION + MLP) + HEAD
    assert found.bytes_up == bytes_up(config, best) == 2 * weights * 4
    small = replace(large, memory=found.memory)
    found = device_estimate(config, best, passes, small)
    assert not found.streams_fit and found.fits and found.bytes_up == 8 * weights + 2 * 4 * streams
    tiny = replace(large, memory=found.memory - 1)
    assert not device_estimate(config, best, passes, tiny).fits


@settings(deadline=None)
@given(st.sampled_from(sorted(DEVICES)))
def test_time_is_the_parts_over_the_rates(name: str) -> None:
    device = DEVICES[name]
    found = device_estimate(LLAMA_7B, find_recipe("best"), Passes(), device)
    total = [sum(each) for each in zip(*(w.values() for w in found.work.values()), strict=True)]
    parts = [(total[0] + total[1]) / device.fast, total[2] / device.exact, total[3] / device.elementwise]
    assert list(found.seconds.values())[:3] == pytest.approx(parts)
    assert found.total == pytest.approx(max(sum(parts) + found.seconds["launches"], found.seconds["bus"]))
    assert found.seconds[found.bound] == max(found.seconds.values())


LLAMA_7B = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    norm_eps=1e-5,
    max_position=4096,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    activation="silu",
    rope=None,
)


def test_a_7b_against_a_count_by_hand() -> None:
    """6.48 thousand million weights and 235,520 tokens: three passes over all, one of them in two thirds twice.

    The preset `max` takes 16,384 tokens more forward three times and back. `best` tunes on 5,120 tokens and `max` on
    15,360: five times forward, four times through the head.
    """
    found, tuned = conversion_work(LLAMA_7B, find_recipe("best"), Passes()), 2 * (5 * 6.48e9 + 4 * 0.131e9)
    assert sum(work.fast for work in found.values()) == pytest.approx(8.9e15 + 5120 * tuned, rel=0.01)
    assert sum(work.sums for work in found.values()) == pytest.approx(3.9e15, rel=0.02)
    # Eight walks of 3.65e13 operations, two factors of 3.3e13, solves of 1.63e14.
    assert sum(work.exact for work in found.values()) == pytest.approx(5.2e14, rel=0.01)
    most = conversion_work(LLAMA_7B, find_recipe("max"), Passes())
    assert sum(work.fast for work in most.values()) == pytest.approx(9.6e15 + 15360 * tuned, rel=0.01)
    assert sum(work.exact for work in most.values()) == pytest.approx(6.1e14, rel=0.01)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(SettingsError, match="`device` is 'h1000'; it must be one of h100, "):
        find_device("h1000")
    assert find_device("cpu").memory > 0
