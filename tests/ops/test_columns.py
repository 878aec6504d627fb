"""Feedback between columns against its definition in float64: a row at a time, with solves in place of factors."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2jax.ops import XLA, HessianFactor, QuantizedLinear, factorize, gptq_arrays, group_table
from exl2jax.ops.columns import BLOCKS, DAMPING, ColumnFeedback, block_columns, column_feedback
from exl2jax.ops.gptq import QuantizedArrays, WalkOptions
from exl2jax.qparams import QParams, q
from tests.ops.test_gptq import check_consistent, problem
from tests.oracles import hessian as hessian_oracle
from tests.oracles.columns import kronecker_loss, walked

SHRINKAGE = 0.3


def gradients(seed: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients that go together, some outputs much louder than others: samples float16, and their scale."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((4 * columns, columns)) @ (np.eye(columns) + rng.standard_normal((columns, columns)) / 4)
    scale = np.exp2(rng.uniform(-2, 2, columns))
    return (g / np.sqrt(np.mean(g**2, axis=0))).astype(np.float16), scale.astype(np.float32)


def shrunk(samples: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The Hessian that rounding goes by, in units of its mean diagonal."""
    correlations = _correlations(samples.astype(np.float64))
    root = scale.astype(np.float64) / np.sqrt(np.mean(scale.astype(np.float64) ** 2))
    together = (1 - SHRINKAGE) * correlations * root * root[:, None]
    return np.where(np.eye(len(root)), np.diag(root**2), together) + DAMPING * np.eye(len(root))


def _correlations(g: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(g, axis=0)
    return g.T @ g / lengths / lengths[:, None]


def run(
    w: np.ndarray, factor: HessianFactor, setting: QParams, columns: ColumnFeedback | None, panel: int | None = None
) -> QuantizedArrays:
    groups = setting.groups(len(w))
    options = WalkOptions(kernels=XLA._replace(panel=panel))
    found = gptq_arrays(jnp.asarray(w), factor, group_table(groups, len(w)), columns, options=options)
    check_consistent(
        QuantizedLinear(found.codes, found.qs, found.qscale_max, factor.perm, groups, found.weight), groups
    )
    return found


@pytest.mark.parametrize("columns", [16, 41, 520])
@pytest.mark.parametrize("panel", [None, 64])
def test_feedback_is_that_of_the_definition(columns: int, panel: int | None) -> None:
    """The same codes but where a tie fell the other way, and the same loss."""
    w, h = problem(3, rows=96, columns=columns)
    outputs = gradients(4, columns)
    factor, feedback = factorize(jnp.asarray(h)), column_feedback(*map(jnp.asarray, outputs), SHRINKAGE)
    found = run(w, factor, q("3", "1", "64"), feedback, panel)
    perm, u = hessian_oracle.factorize(h, float(factor.damping))
    m = shrunk(*outputs)
    order = np.argsort(-np.diagonal(m), kind="stable")
    assert np.array_equal(feedback.perm, order)
    expected = walked(w[:, order], perm, u, m[order][:, order], [(64, 3), (32, 3)], block_columns(columns, BLOCKS))
    back = np.argsort(order)
    assert (np.asarray(found.codes) == expected.codes[:, back]).mean() > 0.95
    ours, theirs = (kronecker_loss(h, m, w, x) for x in (np.asarray(found.weight), expected.weight[:, back]))
    np.testing.assert_allclose(ours, theirs, rtol=0.03)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_what_goes_together_is_made_up_for(seed: int) -> None:
    """The loss of both Hessians is lower than that of the same walk without feedback between columns."""
    w, h = problem(seed, rows=96, columns=48)
    outputs = gradients(seed + 1, 48)
    factor = factorize(jnp.asarray(h))
    feedback = column_feedback(*map(jnp.asarray, outputs), SHRINKAGE)
    with_feedback, without = (run(w, factor, q("3", "1", "32"), x) for x in (feedback, None))
    losses = [kronecker_loss(h, shrunk(*outputs), w, np.asarray(x.weight)) for x in (with_feedback, without)]
    assert losses[0] < 0.97 * losses[1]


@pytest.mark.parametrize("unknown", ["shrunk to nothing", "apart", "no gradients at all"])
def test_outputs_that_do_not_go_together_are_rounded_as_ever(unknown: str) -> None:
    """Code for code: with nothing to feed along, this is the walk over rows alone."""
    w, h = problem(9, rows=96, columns=40)
    samples, scale = gradients(9, 40)
    if unknown == "apart":
        samples = np.eye(40, dtype=np.float16)
    if unknown == "no gradients at all":
        samples, scale = np.zeros((64, 40), np.float16), np.zeros(40, np.float32)
    shrinkage = 1.0 if unknown == "shrunk to nothing" else SHRINKAGE
    feedback = column_feedback(jnp.asarray(samples), jnp.asarray(scale), shrinkage)
    factor = factorize(jnp.asarray(h))
    ours, plain = (run(w, factor, q("4/2", ".5/.5", "32"), x) for x in (feedback, None))
    for got, expected in zip(ours, plain, strict=True):
        assert np.array_equal(got, expected)


def test_fewer_blocks_feed_less() -> None:
    """Two blocks instead of ten: still better than none, and of the same errors."""
    w, h = problem(12, rows=96, columns=160)
    outputs = gradients(13, 160)
    factor, losses = factorize(jnp.asarray(h)), list[float]()
    for blocks in (32, 2, 1):
        feedback = column_feedback(*map(jnp.asarray, outputs), SHRINKAGE, blocks=blocks)
        assert feedback.toward.shape == {32: (10, 160, 16), 2: (2, 160, 80), 1: (1, 160, 160)}[blocks]
        found = run(w, factor, q("3", "1", "32"), feedback)
        losses.append(kronecker_loss(h, shrunk(*outputs), w, np.asarray(found.weight)))
    assert losses[0] < losses[1] < losses[2]


def test_gradients_that_are_no_numbers_feed_nothing() -> None:
    """The rounding goes on as it would without."""
    feedback = column_feedback(jnp.full((64, 16), jnp.nan, jnp.float16), jnp.ones(16), SHRINKAGE)
    assert np.array_equal(feedback.toward, [np.eye(16)])
