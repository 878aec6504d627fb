"""The five tensors of an EXL2 linear: packing codes and scales into words, and back (docs/format.md 1.1)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.errors import FormatError
from exl2jax.ops.bitstream import pack_tiles, unpack_codes
from exl2jax.ops.gptq import QuantizedLinear
from exl2jax.ops.groups import GroupTable, group_table, groups_by_tile
from exl2jax.ops.kernels import PackTiles
from exl2jax.ops.rounding import dequantize, half_scale
from exl2jax.qparams import FORMAT_BITS, ROW_MULTIPLE, Group, padded_columns

TENSOR_NAMES = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLinear:
    """A linear as stored: `q_weight [qrows, N]` int32, `q_scale [G, N/8]` int32, `q_scale_max [G]` float16,
    `q_groups [2G]` int16, `q_invperm [K]` int32, `bias [N]` float16 or None; N padded to a multiple of 32.
    """  # noqa: D205

    q_weight: np.ndarray
    q_scale: np.ndarray
    q_scale_max: np.ndarray
    q_groups: np.ndarray
    q_invperm: np.ndarray
    bias: np.ndarray | None = None

    @classmethod
    def of(cls, read: Callable[[str], np.ndarray], key: str, bias: np.ndarray | None = None) -> "PackedLinear":
        """The linear whose tensors `read` gives by their stored names."""
        return cls(**{name: read(f"{key}.{name}") for name in TENSOR_NAMES}, bias=bias)

    def tensors(self, key: str) -> dict[str, np.ndarray]:
        """The tensors under their stored names, `KEY.q_weight` and so on."""
        out = {f"{key}.{name}": getattr(self, name) for name in TENSOR_NAMES}
        return out if self.bias is None else out | {f"{key}.bias": self.bias}

    @property
    def bits(self) -> int:
        """Stored bits, bias apart: what bits per weight counts."""
        return 8 * sum(getattr(self, name).nbytes for name in TENSOR_NAMES)


def stored_shapes(
    groups: tuple[Group, ...], rows: int, columns: int, *, bias: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, as safetensors spells it, and shape of each tensor that a `[rows, columns]` matrix is stored as."""
    n, count = padded_columns(columns), len(groups)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "q_weight": ("I32", (sum(group.words for group in groups), n)),
        "q_scale": ("I32", (count, n // 8)),
        "q_scale_max": ("F16", (count,)),
        "q_groups": ("I16", (2 * count,)),
        "q_invperm": ("I32", (rows,)),
    }
    return found | {"bias": ("F16", (n,))} if bias else found


@jax.jit
def pack_scales(qs: jax.Array) -> jax.Array:
    """Pack scale indices `qs [G, N]` in 1..16 into `[G, N/8]` int32, minus one, lowest nibble = lowest column."""
    nibbles = (qs.astype(jnp.uint32) - 1).reshape(qs.shape[0], -1, 8)
    words = jnp.sum(nibbles << (4 * jnp.arange(8, dtype=jnp.uint32)), axis=2, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


@jax.jit
def unpack_scales(words: jax.Array) -> jax.Array:
    """Inverse of `pack_scales`: `[G, N/8]` int32 to `[G, N]` uint8 in 1..16."""
    nibbles = lax.bitcast_convert_type(words, jnp.uint32)[:, :, None] >> (4 * jnp.arange(8, dtype=jnp.uint32))
    return ((nibbles & 15) + 1).reshape(words.shape[0], -1).astype(jnp.uint8)


class PackedArrays(NamedTuple):
    """A packed matrix whose shapes do not depend on its groups; only the first rows of the first three count.

    `words [K / 4, N]` int32, `scales [K / 32, N / 8]` int32, `maxima [K / 32]` float16, `invperm [K]` int32, N padded
    to a multiple of 32; `same []` whether they unpack to the quantized weight, bit for bit.
    """

    words: jax.Array
    scales: jax.Array
    maxima: jax.Array
    invperm: jax.Array
    same: jax.Array

    def stored(self, groups: Sequence[Group], bias: np.ndarray | None = None) -> PackedLinear:
        """The tensors to write, read from the device."""
        words = [group.words for group in groups]
        if sum(words) > np.iinfo(np.int16).max:
            raise FormatError(f"q_groups: {sum(words)} word rows do not fit the format's int16 group table")
        starts = [0, *accumulate(words)][:-1]
        columns = self.words.shape[1]
        return PackedLinear(
            q_weight=np.asarray(self.words)[: sum(words)],
            q_scale=np.asarray(self.scales)[: len(groups)],
            q_scale_max=np.asarray(self.maxima)[: len(groups)],
            q_groups=np.asarray([(g.bits, start) for g, start in zip(groups, starts, strict=True)], np.int16).ravel(),
            q_invperm=np.asarray(self.invperm),
            bias=None if bias is None else np.pad(bias.astype(np.float16), (0, columns - len(bias))),
        )


@partial(jax.jit, static_argnames="pack")
def pack_arrays(
    codes: jax.Array,
    qs: jax.Array,
    qscale_max: jax.Array,
    perm: jax.Array,
    weight: jax.Array,
    table: jax.Array,
    *,
    pack: PackTiles = pack_tiles,
) -> PackedArrays:
    """Pack a quantized matrix (the arrays of `QuantizedLinear`, and its `group_table`) and unpack it again.

    Columns are padded to a multiple of 32 with the zero code and the lowest scale. A tile of 32 rows fills whole words
    whatever its group, so that tiles are packed one by one and moved together.
    """
    groups, columns = GroupTable.of(table), codes.shape[1]
    extra = ((0, 0), (0, padded_columns(columns) - columns))
    zero = jnp.repeat(1 << (groups.tile_bits - 1), ROW_MULTIPLE)[:, None].astype(jnp.uint8)
    own = jnp.arange(columns + extra[1][1]) < columns
    tiles = pack(jnp.where(own, jnp.pad(codes, extra), zero), groups.tile_bits)
    scales = pack_scales(jnp.pad(qs, extra, constant_values=1))
    packed = PackedTiles(
        words=_together(tiles, groups.tile_bits),
        scales=scales[groups.tile_group],
        maxima=qscale_max[groups.tile_group],
        bits=groups.tile_bits,
    )
    invperm = jnp.argsort(perm).astype(jnp.int32)
    again = reconstruct(packed, invperm)[:, :columns]
    same = jnp.all(_bits(again) == _bits(weight))
    return PackedArrays(packed.words, scales, qscale_max, invperm, same)


def _bits(weight: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(weight, jnp.uint16)


def _together(tiles: jax.Array, bits: jax.Array) -> jax.Array:
    """The words of all tiles `[T, 8, N]` one after the other, `[8 T, N]` int32; rows beyond the last are zero."""
    count = tiles.shape[0] * tiles.shape[1]
    ends = jnp.cumsum(bits)
    place = jnp.arange(count, dtype=ends.dtype)
    tile = jnp.minimum(jnp.sum(ends <= place[:, None], axis=1, dtype=ends.dtype), len(bits) - 1)
    word = place - (ends - bits)[tile]
    source = tile * tiles.shape[1] + jnp.minimum(word, tiles.shape[1] - 1)
    return jnp.where((place < ends[-1])[:, None], tiles.reshape(count, -1)[source], 0)


def pack_linear(linear: QuantizedLinear, bias: np.ndarray | None = None, pack: PackTiles = pack_tiles) -> PackedLinear:
    """Pack a quantized matrix as it is stored."""
    rows = len(linear.codes)
    table = jnp.asarray(group_table(linear.groups, rows))
    room = rows // ROW_MULTIPLE - len(linear.qs)  # scales may come without the rows beyond the last group
    qs = jnp.pad(linear.qs, ((0, room), (0, 0)), constant_values=1)
    maxima = jnp.pad(linear.qscale_max, (0, room))
    packed = pack_arrays(linear.codes, qs, maxima, linear.perm, linear.weight, table, pack=pack)
    return packed.stored(linear.groups, bias)


def read_groups(packed: PackedLinear) -> tuple[Group, ...]:
    """The groups that `q_groups` describes; `FormatError` where the table contradicts itself or `q_weight`."""
    widths, starts = packed.q_groups[0::2].tolist(), packed.q_groups[1::2].tolist()
    if not widths or len(widths) != len(starts) or starts[0] != 0:
        raise FormatError("q_groups must hold (bits, start) pairs, the first start 0")
    groups, row = [], 0
    for bits, (a, b) in zip(widths, pairwise([*starts, packed.q_weight.shape[0]]), strict=True):
        if bits not in FORMAT_BITS or b <= a or (b - a) * 32 % (bits * ROW_MULTIPLE):
            raise FormatError(f"q_groups: words {a}..{b} at {bits} bits are not whole tiles of 32 rows")
        rows = (b - a) * 32 // bits
        groups.append(Group(bits=bits, start=row, rows=rows))
        row += rows
    if row != packed.q_invperm.shape[0]:
        raise FormatError(f"q_groups cover {row} rows, q_invperm has {packed.q_invperm.shape[0]}")
    return tuple(groups)


class PackedTiles(NamedTuple):
    """The stored tensors of a matrix by tiles of 32 rows, in shapes that depend on the matrix alone: `words [K/4, N]`
    int32, which eight bits would fill, `scales [T, N/8]` int32, `maxima [T]` float16 and the width `bits [T]` int32.
    """  # noqa: D205

    words: jax.Array
    scales: jax.Array
    maxima: jax.Array
    bits: jax.Array

    @classmethod
    def of(
        cls, groups: Sequence[Group], q_weight: np.ndarray, q_scale: np.ndarray, q_scale_max: np.ndarray
    ) -> "PackedTiles":
        """The tiles of a table's groups, still in host memory: a program takes them up as they are."""
        group, bits = groups_by_tile(groups)
        spare = 8 * len(group) - len(q_weight)
        arrays: tuple[Any, ...] = (np.pad(q_weight, ((0, spare), (0, 0))), q_scale[group], q_scale_max[group], bits)
        return cls(*arrays)


def unpack_tiles(tiles: PackedTiles) -> tuple[jax.Array, jax.Array]:
    """Codes `[T, 32, N]` uint8, and working scales `[T, N]` as float32 holding exact half values."""
    codes = unpack_codes(tiles.words, jnp.repeat(tiles.bits, ROW_MULTIPLE))
    scale = half_scale(tiles.maxima[:, None], unpack_scales(tiles.scales))
    return codes.reshape(-1, ROW_MULTIPLE, codes.shape[1]), scale


def unpack_linear(packed: PackedLinear) -> np.ndarray:
    """Dequantized weights `[K, N padded]` float16 in original row order, exactly as the runtime reconstructs them."""
    return np.asarray(unpack_together({"": packed})[""])


def unpack_together(linears: Mapping[str, PackedLinear]) -> dict[str, jax.Array]:
    """`unpack_linear` of several linears by name, on the device and in one program."""
    tiles = {name: PackedTiles.of(read_groups(x), x.q_weight, x.q_scale, x.q_scale_max) for name, x in linears.items()}
    return _reconstructed(tiles, {name: x.q_invperm for name, x in linears.items()})


@jax.jit
def _reconstructed(tiles: Mapping[str, PackedTiles], inv_perms: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {name: reconstruct(linear, inv_perms[name]) for name, linear in tiles.items()}


@jax.jit
def reconstruct(tiles: PackedTiles, inv_perm: jax.Array) -> jax.Array:
    """Dequantized weights `[K, N]` float16 in original row order, row `i` being packed row `inv_perm[i]`."""
    codes, scale = unpack_tiles(tiles)
    weight = dequantize(codes, scale[:, None], tiles.bits[:, None, None]).astype(jnp.float16)
    return weight.reshape(-1, codes.shape[-1])[inv_perm]
