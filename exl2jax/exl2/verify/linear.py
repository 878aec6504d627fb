"""The tensors of one linear, checked against each other and against the shape it must have (docs/format.md 1.1)."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.exl2.verify.files import Shards
from exl2jax.exl2.verify.groups import Table, table_faults, table_groups, word_rows_fault
from exl2jax.exl2.verify.report import Fault
from exl2jax.models import LinearSpec
from exl2jax.ops import dequantize
from exl2jax.ops.packing import TENSOR_NAMES, PackedTiles, unpack_tiles
from exl2jax.qparams import MAX_ROWS, ROW_MULTIPLE, Group, padded_columns

DTYPES = {"q_weight": "I32", "q_scale": "I32", "q_scale_max": "F16", "q_groups": "I16", "q_invperm": "I32"}
ITEM_BYTES = {"I32": 4, "F16": 2, "I16": 2}


def is_quantized(shards: Shards, key: str) -> bool:
    """Whether any of the five tensors of a linear is stored."""
    return any(f"{key}.{name}" in shards for name in TENSOR_NAMES)


def stored_bits(shards: Shards, key: str) -> int | None:
    """Bits that the five tensors of a linear take, from the headers; None where one is missing or mistyped."""
    names = [f"{key}.{name}" for name in TENSOR_NAMES]
    if any(name not in shards or shards.dtype(name) != DTYPES[name.rpartition(".")[2]] for name in names):
        return None
    return 8 * sum(math.prod(shards.shape(name)) * ITEM_BYTES[shards.dtype(name)] for name in names)


def linear_faults(shards: Shards, spec: LinearSpec, widths: Sequence[int] | None = None) -> list[Fault]:
    """All faults of a linear that has stored tensors, except those of its bias.

    `widths` are the only bit widths it may use, where that is known.
    """
    present = [name for name in TENSOR_NAMES if f"{spec.key}.{name}" in shards]
    faults = [_fault(spec, name, "is missing") for name in TENSOR_NAMES if name not in present]
    if spec.rows % ROW_MULTIPLE or spec.rows > MAX_ROWS:
        message = f"has {spec.rows} rows; EXL2 needs a multiple of {ROW_MULTIPLE} of at most {MAX_ROWS}"
        faults.append(Fault(tensor=spec.key, message=message))
    wrong = _header_faults(shards, spec, present)
    faults += [_fault(spec, name, message) for name, message in wrong.items()]
    return faults + list(_content_faults(shards, spec, frozenset(present) - frozenset(wrong), widths))


def _header_faults(shards: Shards, spec: LinearSpec, present: Sequence[str]) -> dict[str, str]:
    """Faults of dtypes and shapes, by tensor."""
    groups, columns = _group_count(shards, spec, present), padded_columns(spec.columns)
    expected: dict[str, tuple[int | None, ...]] = {
        "q_weight": (None, columns),
        "q_scale": (groups, columns // 8),
        "q_scale_max": (groups,),
        "q_groups": (2 * groups,),
        "q_invperm": (spec.rows,),
    }
    found = {}
    for name in present:
        dtype, shape = shards.dtype(f"{spec.key}.{name}"), shards.shape(f"{spec.key}.{name}")
        want = expected[name]
        fits = len(shape) == len(want) and all(b in (None, a) for a, b in zip(shape, want, strict=True))
        messages = [f"is {dtype}, must be {DTYPES[name]}"] if dtype != DTYPES[name] else []
        if not fits or 0 in shape:
            spelled = ", ".join("any" if n is None else str(n) for n in want)
            messages.append(f"has shape {list(shape)}, must be [{spelled}]")
        if messages:
            found[name] = "; ".join(messages)
    return found


def _group_count(shards: Shards, spec: LinearSpec, present: Sequence[str]) -> int:
    """Number of groups that most of the three tensors with one entry per group agree on, within what the rows allow."""
    counts = []
    for name, per_group in (("q_groups", 2), ("q_scale_max", 1), ("q_scale", 1)):
        shape = shards.shape(f"{spec.key}.{name}") if name in present else ()
        if shape and shape[0] >= per_group and shape[0] % per_group == 0:
            counts.append(shape[0] // per_group)
    agreed = Counter(counts).most_common(1)[0][0] if counts else 1
    return min(agreed, max(1, spec.rows // ROW_MULTIPLE))


def _content_faults(
    shards: Shards, spec: LinearSpec, sound: frozenset[str], widths: Sequence[int] | None
) -> Iterator[Fault]:
    """Faults of the values, of as many tensors as have a sound header."""

    def read(name: str) -> np.ndarray:
        return shards.read(f"{spec.key}.{name}")

    if "q_invperm" in sound:
        yield from (_fault(spec, "q_invperm", m) for m in _permutation_faults(read("q_invperm")))
    if "q_scale_max" in sound:
        yield from (_fault(spec, "q_scale_max", m) for m in _maximum_faults(read("q_scale_max")))
    if not {"q_groups", "q_weight"} <= sound:
        return
    table = Table.of(read("q_groups"), shards.shape(f"{spec.key}.q_weight")[0], spec.rows)
    broken = table_faults(table)
    yield from (_fault(spec, "q_groups", message) for message in broken)
    short = word_rows_fault(table)
    if short:
        yield _fault(spec, "q_weight", short)
    if widths is not None and not set(table.widths) <= set(widths):
        stray = sorted(set(table.widths) - set(widths))
        yield _fault(spec, "q_groups", f"bit widths {stray} are not those that head_bits stands for, {sorted(widths)}")
    if not broken and {"q_scale", "q_scale_max"} <= sound:
        yield from _code_faults(spec, table_groups(table), read("q_weight"), read("q_scale"), read("q_scale_max"))


def _permutation_faults(invperm: np.ndarray) -> Iterator[str]:
    rows = invperm.shape[0]
    outside = invperm[(invperm < 0) | (invperm >= rows)]
    if outside.size:
        yield f"{outside.size} entries such as {outside[0]} lie outside 0..{rows - 1}"
    values, counts = np.unique(invperm, return_counts=True)
    if (counts > 1).any():
        value, count = values[np.argmax(counts)], counts.max()
        yield f"is no permutation: {value} stands {count} times, {rows - values.size} entries repeat another"


def _maximum_faults(maxima: np.ndarray) -> Iterator[str]:
    broken = np.flatnonzero(~np.isfinite(maxima))
    if broken.size:
        yield f"holds NaN or infinity in {broken.size} groups, the first is group {broken[0]}"
    negative = np.flatnonzero(maxima < 0)
    if negative.size:
        yield f"is negative in {negative.size} groups, the first is group {negative[0]} with {maxima[negative[0]]}"


def _code_faults(
    spec: LinearSpec, groups: Sequence[Group], words: np.ndarray, scales: np.ndarray, maxima: np.ndarray
) -> Iterator[Fault]:
    """Faults of codes and of the weights they stand for."""
    truths = np.asarray(_judge(PackedTiles.of(groups, words, scales, maxima), columns=spec.columns))
    first = [group.start // ROW_MULTIPLE for group in groups]
    padded, zero, finite = np.logical_and.reduceat(truths, first, axis=1)
    unpadded = np.flatnonzero(~padded)
    scaleless = np.flatnonzero((maxima == 0) & ~zero)
    infinite = np.flatnonzero(np.isfinite(maxima) & ~finite)
    if unpadded.size:
        message = f"padded columns from {spec.columns} on must hold 2^(bits-1); group {unpadded[0]} has other codes"
        yield _fault(spec, "q_weight", message)
    if scaleless.size:
        message = f"is 0 in {scaleless.size} groups whose codes are not zero, the first is group {scaleless[0]}"
        yield _fault(spec, "q_scale_max", message)
    if infinite.size:
        message = f"makes weights beyond half precision in {infinite.size} groups, the first is group {infinite[0]}"
        yield _fault(spec, "q_scale_max", message)


@partial(jax.jit, static_argnames=("columns",))
def _judge(tiles: PackedTiles, *, columns: int) -> jax.Array:
    """Three truths of every tile `[3, T]`: padded codes are zero codes, all codes are zero codes, weights are finite.

    A weight grows with the distance of its code from the zero code, so the farthest code of each column tells whether
    the column is finite.
    """
    codes, scale = unpack_tiles(tiles)
    zero = (1 << (tiles.bits - 1))[:, None]
    steps = jnp.max(jnp.abs(codes.astype(jnp.int32) - zero[:, None]), axis=1)
    extreme = dequantize(zero - steps, scale, tiles.bits[:, None])
    padded = jnp.all(steps[:, columns:] == 0, axis=1)
    return jnp.stack([padded, jnp.all(steps == 0, axis=1), jnp.all(jnp.isfinite(extreme), axis=1)])


def _fault(spec: LinearSpec, name: str, message: str) -> Fault:
    return Fault(tensor=f"{spec.key}.{name}", message=message)
