"""Shapes and dtypes of the public operations: what their docstrings say, checked by jaxtyping and beartype.

A signature below is a statement about an operation. Letters are dimensions; one letter is one size within a call. The
operations are traced only (`jax.eval_shape`), so that many sizes are tried in seconds.
"""

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Bool, Float16, Float32, Int32, TypeCheckError, UInt8, jaxtyped

from exl2jax import ops
from exl2jax.ops.scales import GroupContext
from exl2jax.qparams import Group

checked = jaxtyped(typechecker=beartype)


@checked
def gram(tokens: Float32[Array, "T K"]) -> Float32[Array, "K K"]:
    return ops.gram(tokens)


@checked
def accumulate_hessian(h: Float32[Array, "K K"], x: Float32[Array, "*tokens K"]) -> Float32[Array, "K K"]:
    return ops.accumulate_hessian(h, x)


@checked
def factorize(
    h: Float32[Array, "K K"],
) -> tuple[
    Int32[Array, " K"],
    Int32[Array, " K"],
    Float32[Array, "K K"],
    Float32[Array, ""],
    Int32[Array, ""],
    Bool[Array, ""],
    Bool[Array, ""],
    Int32[Array, ""],
]:
    return tuple(ops.factorize(h))  # type: ignore[return-value]


@checked
def gptq(
    w: Float32[Array, "K N"], h: Float32[Array, "K K"], groups: tuple[Group, ...]
) -> tuple[UInt8[Array, "K N"], UInt8[Array, "G N"], Float16[Array, " G"], Int32[Array, " K"], Float16[Array, "K N"]]:
    found = ops.gptq(w, ops.factorize(h), groups)
    assert found.qs.shape[0] == len(found.groups) == len(groups)
    return found.codes, found.qs, found.qscale_max, found.perm, found.weight


@checked
def round_to_nearest(
    w: Float32[Array, "K N"], perm: Int32[Array, " K"], groups: tuple[Group, ...]
) -> tuple[UInt8[Array, "K N"], UInt8[Array, "G N"], Float16[Array, " G"], Float16[Array, "K N"]]:
    found = ops.round_to_nearest(w, perm, groups)
    return found.codes, found.qs, found.qscale_max, found.weight


@checked
def gptq_tile_losses(
    w: Float32[Array, "K N"], h: Float32[Array, "K K"], c: Float32[Array, " N"], groups: tuple[Group, ...]
) -> Float32[Array, "1 {len(groups)}"]:
    return ops.gptq_tile_losses(w, ops.factorize(h), (groups,), c)


@checked
def search_scales(
    w: Float32[Array, "rows N"], bits: Int32[Array, ""], importance: Float32[Array, " rows"]
) -> tuple[UInt8[Array, " N"], Float16[Array, ""], Float32[Array, " N"], Float32[Array, ""]]:
    return tuple(ops.search_scales(w, bits, GroupContext(importance)))  # type: ignore[return-value]


@checked
def search_columns(
    w: Float32[Array, "rows N"], bits: Int32[Array, ""], importance: Float32[Array, " rows"]
) -> tuple[UInt8[Array, " N"], Float16[Array, ""], Float32[Array, " N"], Float32[Array, ""]]:
    return tuple(ops.search_columns(w, bits, GroupContext(importance)))  # type: ignore[return-value]


@checked
def proxy_loss(h: Float32[Array, "K K"], error: Float32[Array, "K N"]) -> Float32[Array, ""]:
    return ops.proxy_loss(h, error)


@checked
def relative_frobenius(out: Float32[Array, "*rows T D"], ref: Float32[Array, "*rows T D"]) -> Float32[Array, "*rows"]:
    return ops.relative_frobenius(out, ref)


@checked
def pack_codes(codes: UInt8[Array, "K N"], bits: int) -> Int32[Array, "K*{bits}//32 N"]:
    return ops.pack_codes(codes, bits=bits)


@checked
def pack_scales(qs: UInt8[Array, "G N"]) -> Int32[Array, "G N//8"]:
    return ops.pack_scales(qs)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


tiles = st.integers(1, 6)
columns = st.integers(1, 70)
tokens = st.integers(1, 9)


@settings(max_examples=6, deadline=None)
@given(k=tiles, n=columns, t=tokens)
def test_hessians(k: int, n: int, t: int) -> None:
    k *= 32
    jax.eval_shape(gram, floats(t, k))
    jax.eval_shape(accumulate_hessian, floats(k, k), floats(2, t, k))
    jax.eval_shape(factorize, floats(k, k))
    jax.eval_shape(proxy_loss, floats(k, k), floats(k, n))
    jax.eval_shape(relative_frobenius, floats(3, t, n), floats(3, t, n))


@settings(max_examples=6, deadline=None)
@given(k=tiles, n=columns)
def test_gptq(k: int, n: int) -> None:
    groups = tuple(Group(bits=8 if i == 0 else 3, start=32 * i, rows=32) for i in range(k))
    k *= 32
    jax.eval_shape(lambda w, h: gptq(w, h, groups), floats(k, n), floats(k, k))
    jax.eval_shape(lambda w, perm: round_to_nearest(w, perm, groups), floats(k, n), ints(k))
    jax.eval_shape(lambda w, h, c: gptq_tile_losses(w, h, c, groups), floats(k, n), floats(k, k), floats(n))


@settings(max_examples=6, deadline=None)
@given(rows=tiles, n=columns)
def test_scale_searches(rows: int, n: int) -> None:
    for search in (search_scales, search_columns):
        jax.eval_shape(search, floats(32 * rows, n), ints(), floats(32 * rows))


@settings(max_examples=6, deadline=None)
@given(rows=tiles, words=st.integers(1, 8), bits=st.sampled_from([2, 3, 4, 5, 6, 8]))
def test_packing(rows: int, words: int, bits: int) -> None:
    k, n = 32 * rows, 8 * words
    jax.eval_shape(lambda codes: pack_codes(codes, bits), jax.ShapeDtypeStruct((k, n), jnp.uint8))
    jax.eval_shape(pack_scales, jax.ShapeDtypeStruct((rows, n), jnp.uint8))


@checked
def transposed(x: Float32[Array, "A B"]) -> Float32[Array, "B A"]:
    return x


def test_a_wrong_shape_is_seen() -> None:
    jax.eval_shape(transposed, floats(4, 4))
    with pytest.raises(TypeCheckError):
        jax.eval_shape(transposed, floats(4, 8))
    with pytest.raises(TypeCheckError):
        jax.eval_shape(proxy_loss, floats(32, 64), floats(32, 8))
    with pytest.raises(TypeCheckError):
        jax.eval_shape(proxy_loss, floats(32, 32), jax.ShapeDtypeStruct((32, 8), jnp.float16))
