"""Packed bytes: literal words, an independent packer on big integers, and round trips."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2jax.errors import FormatError
from exl2jax.ops import PackedLinear, QuantizedLinear, pack_codes, pack_linear, pack_scales, unpack_linear
from exl2jax.ops.packing import read_groups, unpack_codes, unpack_scales
from exl2jax.qparams import FORMAT_BITS, Group, QParams, q
from tests.oracles import packing as oracle
from tests.oracles.rounding import dequantize, half_scale


def words(packed: jax.Array) -> list[int]:
    """First column as unsigned words."""
    return np.asarray(packed)[:, 0].view(np.uint32).tolist()


def column(*pattern: int) -> jax.Array:
    """32 codes of one column that repeat a pattern."""
    return jnp.asarray(np.resize(np.asarray(pattern, np.uint8), 32)[:, None])


@pytest.mark.parametrize(
    ("bits", "pattern", "expected"),
    [
        (2, (0, 1, 2, 3), [0xE4E4E4E4] * 2),
        (3, (0, 1, 2, 3, 4, 5, 6, 7), [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (4, (0, 1, 2, 3, 4, 5, 6, 7), [0x76543210] * 4),
        (4, (15, 0, 0, 0, 0, 0, 0, 8), [0x8000000F] * 4),
        (5, (1, 2, 3, 4, 5, 6, 7, 8), [0xCC520C41, 0x520C4141, 0x0C4141CC, 0x4141CC52, 0x41CC520C]),
        (6, (1, 2, 3, 4), [0x81103081, 0x30811030, 0x10308110] * 2),
        (8, (0, 1, 2, 3), [0x03020100] * 8),
        (8, (255, 128, 127, 254), [0xFE7F80FF] * 8),
    ],
)
def test_literal_words(bits: int, pattern: tuple[int, ...], expected: list[int]) -> None:
    packed = pack_codes(column(*pattern), bits=bits)
    assert packed.dtype == jnp.int32
    assert words(packed) == expected


def test_columns_keep_to_themselves() -> None:
    codes = jnp.concatenate([column(0), column(15), column(0)], axis=1)
    assert np.asarray(pack_codes(codes, bits=4)).tolist() == [[0, -1, 0]] * 4


def test_literal_scale_words() -> None:
    packed = pack_scales(jnp.arange(1, 17, dtype=jnp.uint8)[None, :])
    assert packed.dtype == jnp.int32
    assert np.asarray(packed)[0].view(np.uint32).tolist() == [0x76543210, 0xFEDCBA98]


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_codes_against_big_integers(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (96, 5)).astype(np.uint8)
    packed = np.asarray(pack_codes(jnp.asarray(codes), bits=bits))
    assert np.array_equal(packed, oracle.pack_codes(codes, bits))
    assert np.array_equal(oracle.unpack_codes(packed, bits), codes)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMAT_BITS), st.integers(0, 2**32 - 1))
def test_codes_round_trip(bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (96, 5)).astype(np.uint8)
    back = unpack_codes(pack_codes(jnp.asarray(codes), bits=bits), jnp.full(96, bits))
    assert back.dtype == jnp.uint8
    assert np.array_equal(np.asarray(back), codes)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMAT_BITS), st.integers(0, 2**32 - 1))
def test_words_round_trip(bits: int, seed: int) -> None:
    stored = np.random.default_rng(seed).integers(-(2**31), 2**31, (3 * bits, 5)).astype(np.int32)
    codes = unpack_codes(jnp.asarray(stored), jnp.full(96, bits))
    assert np.array_equal(pack_codes(codes, bits=bits), stored)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(FORMAT_BITS), min_size=3, max_size=3), st.booleans(), st.integers(0, 2**32 - 1))
def test_tiles_of_several_widths_one_after_the_other(widths: list[int], spare: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 2**bits, (32, 5)).astype(np.uint8) for bits in widths]
    words = np.concatenate([oracle.pack_codes(tile, bits) for tile, bits in zip(codes, widths, strict=True)])
    words = np.pad(words, ((0, 24 - len(words) if spare else 0), (0, 0)))
    back = unpack_codes(jnp.asarray(words), jnp.repeat(jnp.asarray(widths), 32))
    assert np.array_equal(back, np.concatenate(codes))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(1, 8), (3, 32)]), st.integers(0, 2**32 - 1))
def test_scales_round_trip(shape: tuple[int, int], seed: int) -> None:
    index = np.random.default_rng(seed).integers(1, 17, shape).astype(np.uint8)
    packed = pack_scales(jnp.asarray(index))
    assert np.array_equal(packed, oracle.pack_scales(index))
    back = unpack_scales(packed)
    assert back.dtype == jnp.uint8
    assert np.array_equal(np.asarray(back), index)


def test_packing_maps_over_a_leading_axis() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (3, 64, 4)).astype(np.uint8)
    packed = jax.vmap(lambda c: pack_codes(c, bits=3))(jnp.asarray(codes))
    assert np.array_equal(packed, np.stack([oracle.pack_codes(c, 3) for c in codes]))


def quantized(setting: QParams, rows: int, columns: int, seed: int) -> QuantizedLinear:
    """Random codes and scales under a setting."""
    rng = np.random.default_rng(seed)
    groups = setting.groups(rows)
    codes = np.concatenate([rng.integers(0, 2**g.bits, (g.rows, columns)) for g in groups]).astype(np.uint8)
    qs = rng.integers(1, 17, (len(groups), columns)).astype(np.uint8)
    maxima = (rng.random(len(groups)) * 0.01).astype(np.float16)
    perm = rng.permutation(rows).astype(np.int32)
    weight = np.zeros(codes.shape, np.float16)
    for g, group in enumerate(groups):
        part = slice(group.start, group.start + group.rows)
        weight[perm[part]] = dequantize(codes[part], half_scale(maxima[g], qs[g]), group.bits)
    arrays = (jnp.asarray(x) for x in (codes, qs, maxima, perm))
    return QuantizedLinear(*arrays, groups, jnp.asarray(weight))


SETTINGS = [q(str(bits), "1", "64") for bits in FORMAT_BITS] + [
    q("8/4/3", ".05/.1/.85", "32/128/128"),
    q("6/3/2", ".05/.2/.75", "32/64/64"),
    q("5/3", ".05/.95", "32"),
]


CASES = [pytest.param(s, 41, id="/".join(map(str, s.bits))) for s in SETTINGS] + [
    pytest.param(SETTINGS[2], 64, id="whole")
]


@pytest.mark.parametrize(("setting", "columns"), CASES)
def test_a_linear_as_stored(setting: QParams, columns: int) -> None:
    rows, padded = 192 if len(setting.bits) == 1 else 224, 64
    linear = quantized(setting, rows, columns, 1)
    packed = pack_linear(linear)
    dtypes = {n.removeprefix("k."): (t.dtype, t.shape) for n, t in packed.tensors("k").items()}
    words_of = [g.words for g in linear.groups]
    assert dtypes == {
        "q_weight": (np.int32, (sum(words_of), padded)),
        "q_scale": (np.int32, (len(linear.groups), padded // 8)),
        "q_scale_max": (np.float16, (len(linear.groups),)),
        "q_groups": (np.int16, (2 * len(linear.groups),)),
        "q_invperm": (np.int32, (rows,)),
    }
    assert packed.q_groups[0::2].tolist() == [g.bits for g in linear.groups]
    assert packed.q_groups[1::2].tolist() == [sum(words_of[:i]) for i in range(len(words_of))]
    assert np.array_equal(packed.q_invperm[np.asarray(linear.perm)], np.arange(rows))
    assert packed.bits == setting.total_bits(rows, columns)
    assert packed.bits == 8 * sum(t.nbytes for t in packed.tensors("k").values())
    assert read_groups(packed) == linear.groups
    fields = (packed.q_weight, packed.q_scale, packed.q_scale_max, packed.q_groups, packed.q_invperm)
    reconstructed = oracle.reconstruct(fields[0], fields[1], fields[2], fields[3].tolist(), fields[4])
    unpacked = unpack_linear(packed)
    assert unpacked.dtype == np.float16
    assert np.array_equal(unpacked, reconstructed)
    assert np.array_equal(unpacked[:, :columns], np.asarray(linear.weight))
    assert not unpacked[:, columns:].any(), "padded columns dequantize to zero"


def test_padding_is_the_zero_code_and_the_lowest_scale() -> None:
    packed = pack_linear(quantized(q("4", "1", "32"), 32, 9, 2))
    assert np.array_equal(packed.q_weight[:, 9:].view(np.uint32), np.full((4, 23), 0x88888888))
    assert packed.q_scale[0, 2:].tolist() == [0, 0]
    assert packed.q_scale[0, 1].view(np.uint32) < 16, "only the ninth column has a scale in the second word"


def test_bias_is_stored_in_half_precision_and_not_counted() -> None:
    linear = quantized(q("4", "1", "32"), 32, 41, 3)
    bias = np.linspace(-2, 2, 41, dtype=np.float32)
    packed = pack_linear(linear, bias)
    stored = packed.tensors("k")["k.bias"]
    assert stored.dtype == np.float16
    assert np.array_equal(stored[:41], bias.astype(np.float16))
    assert stored.shape == (64,)
    assert not stored[41:].any()
    assert packed.bits == pack_linear(linear).bits
    assert "k.bias" not in pack_linear(linear).tensors("k")


def test_more_words_than_the_group_table_can_number() -> None:
    """The widest code over the most rows fills 16384 words: only a matrix beyond the format's limit overflows."""
    one = quantized(q("8", "1", "128"), 128, 1, 4)
    groups = tuple(Group(bits=8, start=128 * i, rows=128) for i in range(1024))
    with pytest.raises(FormatError, match="32768 word rows do not fit"):
        pack_linear(one._replace(codes=jnp.zeros((131072, 1), jnp.uint8), groups=groups))


def damaged(**changes: Any) -> PackedLinear:
    """A good linear of two groups (4 and 3 bits, 32 rows each: 4 + 3 word rows) with some fields replaced."""
    good = pack_linear(quantized(q("4/3", ".5/.5", "32"), 64, 32, 5))
    return dataclasses.replace(good, **changes)


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ([], "pairs"),
        ([4, 0, 3], "pairs"),
        ([4, 1, 3, 4], "first start 0"),
        ([7, 0, 3, 4], "at 7 bits"),
        ([4, 0, 3, 0], "words 0..0"),
        ([4, 0, 3, 12], "words 12..7"),
        ([4, 0, 3, 3], "words 0..3 at 4 bits"),
        ([2, 0, 3, 4], "cover 96 rows, q_invperm has 64"),
    ],
)
def test_a_group_table_that_contradicts_itself(table: list[int], what: str) -> None:
    packed = damaged(q_groups=np.asarray(table, np.int16))
    with pytest.raises(FormatError, match=what):
        unpack_linear(packed)
