"""One linear: what stands between computing it and trusting it."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.errors import FormatError, HessianError, NumericalError, SettingsError
from exl2jax.models import LinearSpec
from exl2jax.ops import QuantizedLinear, factorize, unpack_linear
from exl2jax.qparams import q
from exl2jax.quantize.linear import factor_hessian, in_threads, pack_checked
from tests.quantize.sound import quantize_soundly

SPEC = LinearSpec(name="up_proj", key="model.layers.7.mlp.up_proj", rows=64, columns=40)
SETTING = q("4/3", ".4/.6", "32")


def kernel(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((64, 40)).astype(np.float32)


def hessian(seed: int = 1) -> jnp.ndarray:
    x = np.random.default_rng(seed).standard_normal((200, 64))
    return jnp.asarray(x.T @ x, jnp.float32)


@pytest.fixture(scope="module")
def quantized() -> QuantizedLinear:
    return quantize_soundly(kernel(), factor_hessian(hessian(), SPEC.key), SETTING, SPEC)


def test_a_sound_linear_packs_to_the_weight_that_goes_on(quantized: QuantizedLinear) -> None:
    bias = np.linspace(-1, 1, 40).astype(np.float32)
    packed, weight = pack_checked(quantized, SPEC, bias)
    assert np.array_equal(unpack_linear(packed)[:, :40], np.asarray(weight))
    assert packed.bits == SETTING.total_bits(64, 40)
    assert packed.bias is not None
    assert np.array_equal(packed.bias[:40], bias.astype(np.float16))


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x._replace(codes=x.codes.at[17, 3].set(x.codes[17, 3] ^ 1)),
        lambda x: x._replace(qs=x.qs.at[1, 0].set(17 - x.qs[1, 0])),
        lambda x: x._replace(qscale_max=x.qscale_max.at[0].multiply(jnp.float16(1.01))),
        lambda x: x._replace(perm=x.perm[::-1]),
        lambda x: x._replace(weight=x.weight.at[0, 0].add(jnp.float16(1e-3))),
        lambda x: x._replace(weight=x.weight.at[0, 0].set(-x.weight[0, 0])),
    ],
    ids=["code", "scale index", "maximum", "permutation", "weight", "sign"],
)
def test_a_corrupted_pack_is_an_error_that_names_the_linear(
    quantized: QuantizedLinear, damage: Callable[[QuantizedLinear], QuantizedLinear]
) -> None:
    with pytest.raises(FormatError, match=r"model\.layers\.7\.mlp\.up_proj: the packed tensors do not dequantize"):
        pack_checked(damage(quantized), SPEC, None)


def test_a_hessian_that_stays_indefinite_is_named() -> None:
    with pytest.raises(HessianError, match=r"up_proj: .* not positive definite after 10 dampings"):
        factor_hessian(hessian() - 1e6 * jnp.eye(64), SPEC.key)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(HessianError, match=r"up_proj: the Hessian holds NaN or infinity"):
        factor_hessian(hessian().at[2].set(bad).at[:, 2].set(bad), SPEC.key)


def test_weights_beyond_half_precision_are_named() -> None:
    weights = kernel()
    weights[5, 7] = np.inf
    with pytest.raises(NumericalError, match=r"up_proj: a weight of magnitude inf"):
        quantize_soundly(weights, factor_hessian(hessian(), SPEC.key), SETTING, SPEC)


def test_rows_that_the_format_cannot_hold_are_named() -> None:
    spec = LinearSpec(name="up_proj", key=SPEC.key, rows=48, columns=40)
    with pytest.raises(SettingsError, match=r"up_proj: in_features is 48, EXL2 needs a multiple of 32"):
        quantize_soundly(kernel()[:48], factorize(jnp.eye(48)), SETTING, spec)


def test_side_by_side_is_one_after_the_other() -> None:
    factor = factor_hessian(hessian(), SPEC.key)
    settings = [q(str(bits), "1", "32") for bits in (2, 3, 4, 5, 6, 8)]
    tasks = list(enumerate(settings))
    together = in_threads(lambda task: quantize_soundly(kernel(task[0]), factor, task[1], SPEC), tasks)
    for (i, setting), got in zip(tasks, together, strict=True):
        alone = quantize_soundly(kernel(i), factor, setting, SPEC)
        assert np.array_equal(np.asarray(got.weight), np.asarray(alone.weight))
