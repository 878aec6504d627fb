"""One suite for every implementation of the inner loops, against float64 oracles.

The interpreted kernels pay for every load, so a run serves all widths at once where the contract allows it: a width
for each column. Walks of long groups are slow for the same reason.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.errors import SettingsError
from exl2jax.ops import XLA, Kernels, factorize, gptq, pack_linear, search_columns, search_scales, unpack_linear
from exl2jax.ops.fused import FUSED
from exl2jax.ops.groups import Begin
from exl2jax.ops.scales import GroupContext, ScaleSearch
from exl2jax.pallas import IMPLEMENTATIONS, choose_implementation, kernels_for
from exl2jax.pallas.dispatch import pallas_kernels
from exl2jax.pallas.scale_losses import scale_losses
from exl2jax.pallas.tiles import Tiles
from exl2jax.qparams import FORMAT_BITS, GROUP_SIZES, q
from tests.oracles import packing as packing_oracle
from tests.oracles import scales as scales_oracle
from tests.oracles.rounding import dequantize, half_scale, quantize

ON_GPU = pytest.param("pallas", marks=pytest.mark.gpu)
NAMES = ["xla", "fused", "pallas_interpret", ON_GPU]
COLUMNS = 45
COMPILED = Tiles()
INTERPRETED = Tiles(interpret=True)


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Every implementation; the compiled one only where a GPU is."""
    if request.param == "pallas" and choose_implementation() != "pallas":
        pytest.skip("no CUDA device for Mosaic GPU")
    return kernels_for(request.param)


def widths(columns: int) -> np.ndarray:
    """A width for each column, all of them in turn."""
    return np.resize(np.asarray(FORMAT_BITS, np.float32), columns)


def weights(rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.05 * rng.standard_normal((rows, columns)) * np.exp2(rng.uniform(-3, 0, columns))).astype(np.float32)


def upper_factor(rows: int, seed: int) -> np.ndarray:
    """The factor of a well-conditioned Hessian with correlated channels."""
    x = np.random.default_rng(seed).standard_normal((3 * rows, rows)) @ np.tril(
        np.full((rows, rows), 0.1) + np.eye(rows)
    )
    return np.linalg.cholesky(np.linalg.inv(x.T @ x)).T


def around(u: np.ndarray) -> jnp.ndarray:
    """`u` as a part of a larger matrix, from its second tile of 32 rows on."""
    return jnp.asarray(np.pad(u, ((32, 0), (32, 0)), constant_values=np.nan), jnp.float32)


def walked(
    w: np.ndarray, u: np.ndarray, scale: np.ndarray, bits: np.ndarray, shift: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The walk in float64 with immediate feedback, column by column; a `shift` moves what is rounded."""
    shift = np.zeros(w.shape) if shift is None else shift.astype(np.float64)
    errors, codes = np.zeros(w.shape), np.zeros(w.shape, np.int64)
    for n in range(w.shape[1]):
        column = w[:, n].astype(np.float64)
        for c in range(len(column)):
            codes[c, n] = quantize(column[c] - shift[c, n], scale[n], int(bits[n]))
            errors[c, n] = (column[c] - float(dequantize(codes[c, n], scale[n], int(bits[n])))) / u[c, c]
            column[c + 1 :] -= u[c, c + 1 :] * errors[c, n]
    return errors, codes


@pytest.mark.parametrize("rows", [32, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (64, 96, 128))])
def test_walk(kernels: Kernels, rows: int) -> None:
    bits, w, u = widths(COLUMNS), weights(rows, COLUMNS, rows), upper_factor(rows, rows)
    base = np.abs(w).max(axis=0) / (np.exp2(bits) / 2 - 0.5)
    scale = half_scale(np.float16(base.max() * 0.9), np.clip(np.rint(np.sqrt(base / base.max()) * 16), 1, 16))
    scale[7] = 0  # a column without a scale
    errors, codes = kernels.walk_group(
        jnp.asarray(w), around(u), Begin(jnp.int32(1)), jnp.asarray(scale, jnp.float32), jnp.asarray(bits)
    )
    expected_errors, expected = walked(w, u, scale, bits)
    assert (errors.dtype, codes.dtype) == (jnp.float32, jnp.uint8)
    same = (np.asarray(codes) == expected).all(axis=0)
    assert same.mean() > 0.9  # a tie that falls the other way changes the rest of its column
    np.testing.assert_allclose(
        np.asarray(errors)[:, same], expected_errors[:, same], rtol=1e-3, atol=1e-4 * np.abs(expected_errors).max()
    )


def test_a_shifted_walk(kernels: Kernels) -> None:
    """What is rounded moves, the error that later rows take up is still that of the weight itself."""
    bits, w, u = widths(COLUMNS), weights(64, COLUMNS, 6), upper_factor(64, 6)
    scale = np.float16(1.1 * np.abs(w).max(axis=0) / np.exp2(bits - 1)).astype(np.float32)
    shift = (scale * np.random.default_rng(7).standard_normal(w.shape)).astype(np.float32)
    operands = (jnp.asarray(w), around(u), Begin(jnp.int32(1)), jnp.asarray(scale), jnp.asarray(bits))
    errors, codes = kernels.walk_group(*operands, shift=jnp.asarray(shift))
    expected_errors, expected = walked(w, u, scale, bits, shift)
    same = (np.asarray(codes) == expected).all(axis=0)
    assert same.mean() > 0.9
    atol = 1e-4 * np.abs(expected_errors).max()
    np.testing.assert_allclose(np.asarray(errors)[:, same], expected_errors[:, same], rtol=1e-3, atol=atol)
    fewer = kernels.walk_group(*operands, jnp.int32(32), jnp.asarray(shift))
    for got, whole in zip(fewer, (errors, codes), strict=True):
        assert np.array_equal(got[:32], whole[:32]) and not np.asarray(got[32:]).any()


def test_a_group_of_fewer_rows_than_its_operands(kernels: Kernels) -> None:
    """The first rows are walked as they would be alone, the others come back as zeros, whatever they held."""
    bits, w, u = widths(COLUMNS), weights(64, COLUMNS, 5), upper_factor(64, 5)
    scale = jnp.asarray(np.abs(w).max(axis=0) / np.exp2(bits - 1))
    whole = kernels.walk_group(jnp.asarray(w), around(u), Begin(jnp.int32(1)), scale, jnp.asarray(bits), jnp.int32(32))
    alone = kernels.walk_group(jnp.asarray(w[:32]), around(u), Begin(jnp.int32(1)), scale, jnp.asarray(bits))
    for ours, expected in zip(whole, alone, strict=True):
        assert np.array_equal(ours[:32], expected)
        assert not np.asarray(ours[32:]).any()


def rounding_errors(x: np.ndarray, scales: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """`|clamp(rint(x / s)) s - x|` in float64, `[S, rows, N]`, for `scales [S, N]`."""
    half, s = np.exp2(bits - 1), scales.astype(np.float64)[:, None]
    return np.abs(np.clip(np.rint(x / s), -half, half - 1) * s - x)


def loss_of(errors: np.ndarray, importance: Any) -> np.ndarray:
    """Loss `[S, N]` of errors `[S, rows, N]`: their weighted squares, or stock's power."""
    if importance is None:
        return (errors**3.5).sum(axis=1)
    return np.einsum("srn,r->sn", errors**2, np.asarray(importance, np.float64))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("rows", GROUP_SIZES)
@pytest.mark.parametrize("tiles", [INTERPRETED, pytest.param(COMPILED, marks=pytest.mark.gpu)])
def test_losses_of_all_widths_side_by_side(tiles: Tiles, rows: int, squared: bool) -> None:
    if not tiles.interpret and choose_implementation() != "pallas":
        pytest.skip("no CUDA device for Mosaic GPU")
    bits = widths(COLUMNS)
    w = weights(rows, COLUMNS, rows)
    steps = (w / (np.abs(w).max(axis=0) / (np.exp2(bits) / 2 - 0.5))).astype(np.float32)
    scales = np.random.default_rng(rows).uniform(0.5, 1.2, (23, COLUMNS if squared else 1)).astype(np.float32)
    importance = np.linspace(0.1, 3, rows).astype(np.float32) if squared else None
    operands = (steps, scales, np.exp2(bits), importance)
    losses = scale_losses(*(None if x is None else jnp.asarray(x) for x in operands), tiles=tiles)
    expected = loss_of(rounding_errors(steps, scales, bits), importance)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


@pytest.mark.parametrize("rows", [32, 96])
@pytest.mark.parametrize("columns", [5, 45, 400])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("loops", [XLA, FUSED])
def test_losses_of_one_width(rows: int, columns: int, own: bool, loops: Kernels) -> None:
    """In blocks of columns, whose number does not divide theirs, or at once; the first rows of more alike."""
    w = 20 * weights(rows, columns, columns)
    scales = np.random.default_rng(rows).uniform(0.1, 0.9, (11, columns if own else 1)).astype(np.float32)
    errors = rounding_errors(w, scales, np.full(columns, 3))
    for importance in (None, jnp.linspace(0.1, 3, rows)):
        losses = loops.scale_losses(jnp.asarray(w), jnp.asarray(scales), jnp.float32(8), importance)
        np.testing.assert_allclose(losses, loss_of(errors, importance), rtol=1e-3)
        more = None if importance is None else jnp.pad(importance, (0, 32))
        padded = jnp.pad(jnp.asarray(w), ((0, 32), (0, 0)), constant_values=0.3)
        first = loops.scale_losses(padded, jnp.asarray(scales), jnp.float32(8), more, jnp.int32(rows))
        np.testing.assert_allclose(first, losses, rtol=1e-5)


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_scale_search(kernels: Kernels, bits: int) -> None:
    w = weights(32, 33, bits)
    choice = search_scales(jnp.asarray(w), jnp.float32(bits), GroupContext(kernels=kernels))
    index, _, _, multiplier = scales_oracle.search(w, bits)
    assert np.array_equal(np.asarray(choice.qs), index)
    reached, best = (scales_oracle.grid_loss(w, bits, float(p)) for p in (choice.multiplier, multiplier))
    np.testing.assert_allclose(reached, best, rtol=1e-5)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_search_by_column(kernels: Kernels, bits: int) -> None:
    w = weights(32, 33, bits)
    importance = jnp.linspace(1, 40, 32)
    contexts = (GroupContext(importance, k) for k in (kernels, XLA))
    choice, reference = (search_columns(jnp.asarray(w), jnp.float32(bits), context) for context in contexts)
    multipliers = np.asarray([choice.multiplier, reference.multiplier])
    losses = scales_oracle.index_losses(w, bits, multipliers, np.asarray(importance))
    reached, best = (losses[i, np.asarray(c.qs) - 1, range(33)].sum() for i, c in enumerate((choice, reference)))
    np.testing.assert_allclose(reached, best, rtol=1e-5)


def test_packing(kernels: Kernels) -> None:
    """Tiles of every width, in an order that is none."""
    rng, bits = np.random.default_rng(0), np.asarray([3, 8, 2, 6, 5, 4, 2])
    tiles = [rng.integers(0, 2**b, (32, 131)).astype(np.uint8) for b in bits]
    words = kernels.pack_tiles(jnp.asarray(np.concatenate(tiles)), jnp.asarray(bits))
    assert (words.dtype, words.shape) == (jnp.int32, (len(bits), 8, 131))
    for b, tile, found in zip(bits.tolist(), tiles, np.asarray(words), strict=True):
        assert np.array_equal(found[:b], packing_oracle.pack_codes(tile, b))
        assert not found[b:].any()


@pytest.mark.parametrize("search", [search_scales, search_columns])
def test_gptq_of_a_matrix(kernels: Kernels, search: ScaleSearch) -> None:
    """Whole matrices agree with the XLA path: scales, losses, and bytes that unpack to the weight."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((128, 64)).astype(np.float32), jnp.asarray(weights(64, 39, 1))
    factor, groups = factorize(jnp.asarray(x.T @ x)), q("5/3", ".4/.6", "32").groups(64)
    result, reference = gptq(w, factor, groups, kernels, search), gptq(w, factor, groups, search=search)
    assert np.array_equal(result.qs, reference.qs)
    np.testing.assert_allclose(result.qscale_max, reference.qscale_max, rtol=2e-2)
    assert (np.asarray(result.codes) == np.asarray(reference.codes)).mean() > 0.98
    again = unpack_linear(pack_linear(result, pack=kernels.pack_tiles))[:, :39]
    assert np.array_equal(again.view(np.uint16), np.asarray(result.weight).view(np.uint16))


def lowered(f: Callable[..., Any], *shapes: Any) -> str:
    """The module for CUDA, lowered without a device; only the steps of a `Begin` are traced."""

    def run(*operands: Any) -> Any:
        return f(*(Begin(x) if isinstance(shape, Begin) else x for x, shape in zip(operands, shapes, strict=True)))

    traced = (shape.steps if isinstance(shape, Begin) else shape for shape in shapes)
    return jax.jit(run).trace(*traced).lower(lowering_platforms=("cuda",)).as_text()


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


ONE = shape(dtype=jnp.int32)

LOWERED = {
    "walk_group shifted": (shape(128, 261), shape(256, 256), Begin(ONE), shape(261), shape(261), ONE, shape(128, 261)),
    "walk_group": (shape(128, 261), shape(256, 256), Begin(ONE), shape(261), shape(261), ONE),
    "scale_losses": (shape(128, 261), shape(97, 1), shape(), None, ONE),
    "index_losses": (shape(128, 261), shape(261), shape(1), shape(261), shape(256), Begin(ONE), ONE),
    "pack_tiles": (shape(64, 261, dtype=jnp.uint8), shape(2, dtype=jnp.int32)),
}
"""Operands of every kernel, the number of rows traced."""


@pytest.mark.parametrize("name", LOWERED)
def test_kernels_lower_to_mosaic_in_little_time(name: str) -> None:
    """Lowering holds a lock in every process; by the default semantics each of these took seconds."""
    began = time.process_time()
    text = lowered(getattr(pallas_kernels(COMPILED), name.split()[0]), *LOWERED[name])
    assert "mosaic_gpu" in text
    assert time.process_time() - began < 2.0


def test_a_kernel_is_the_same_object_each_time() -> None:
    assert pallas_kernels(Tiles()) is pallas_kernels(Tiles())
    assert hash(kernels_for("pallas_interpret")) == hash(kernels_for("pallas_interpret"))


def test_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        device_kind = "made up"

        def __init__(self, platform: str, capability: str) -> None:
            self.platform, self.compute_capability = platform, capability

    for platform, capability, expected in (
        ("cpu", "", "xla"),
        ("gpu", "8.6", "fused"),
        ("gpu", "gfx942", "fused"),
        ("gpu", "9.0", "pallas"),
        ("gpu", "10.0", "pallas"),
    ):
        monkeypatch.setattr(jax, "local_devices", partial(list, [Device(platform, capability)]))
        assert choose_implementation() == expected
        assert (kernels_for() is XLA) == (expected == "xla") and (kernels_for() is FUSED) == (expected == "fused")
        if expected != "pallas":
            with pytest.raises(NotImplementedError, match="made up"):
                kernels_for("pallas")
    with pytest.raises(SettingsError, match=", ".join(IMPLEMENTATIONS)):
        kernels_for("triton")
