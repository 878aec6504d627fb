"""Fisher information of a whole tiny model against finite differences of a float64 Llama."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.errors import NumericalError
from exl2jax.measure.fisher import BackwardStep, Columns, head_gradients
from exl2jax.measure.inputs import ForwardStep, InputStack
from exl2jax.models import Decoder, Model, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.stream.blocks import Block
from exl2jax.stream.forward import embed
from exl2jax.stream.scan import GRADIENT, STATES
from exl2jax.stream.token_classes import CLASSES, TOKENS
from exl2jax.testing.states import rows_of, stream_of
from exl2jax.testing.tiny_model import write_tiny_llama
from tests.oracles.fisher import Llama, Probe, slope
from tests.oracles.llama import plain_frequencies

SEED, ROWS, LENGTH = 3, 2, 5
MASK = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
STEP = 1e-4
PLACE_CLASS = (0, 1, 2, 2, 2)
"""Class of each token: none of these states is loud."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With a head of its own: a tied one of random weights is all but certain of the token it was given."""
    return open_model(write_tiny_llama(tmp_path_factory.mktemp("untied") / "tiny", tie=False, mlp_bias=True))


@pytest.fixture(scope="module")
def specs(model: Model) -> tuple[ModuleSpec, ...]:
    return module_specs(model.config)


@pytest.fixture(scope="module")
def decoder(model: Model) -> Decoder:
    return build_decoder(model.config)


@pytest.fixture(scope="module")
def states(model: Model) -> np.ndarray:
    return embed(model, np.random.default_rng(1).integers(0, 320, (ROWS, LENGTH)).astype(np.int32))


@pytest.fixture(scope="module")
def oracle(model: Model) -> Llama:
    return llama(model)


def llama(model: Model) -> Llama:
    """The float64 Llama with a model's parameters."""
    specs = module_specs(model.config)
    return Llama(
        modules=[(spec.kind, model.module_params(spec)) for spec in specs],
        head=model.head_params(),
        heads=4,
        kv_heads=2,
        eps=1e-5,
        frequencies=plain_frequencies(10000.0, 16),
    )


def traced(model: Model, states: np.ndarray, path: Path) -> InputStack:
    """The full-precision inputs of all modules, from the embedded rows `[R, T, D]`."""
    specs, (rows, length, width) = module_specs(model.config), states.shape
    stack = InputStack(path, specs, (rows, length, width))
    stack.write(0, states)
    carry, forward = {STATES: stream_of(states)}, ForwardStep(decoder=build_decoder(model.config), stack=stack)
    for spec in specs:
        carry, _ = forward(carry, Block(spec, model.module_params(spec)))
    return stack


def walk(
    model: Model,
    decoder: Decoder,
    specs: tuple[ModuleSpec, ...],
    states: np.ndarray,
    mask: np.ndarray,
    path: Path,
    weigh: bool = False,
) -> tuple[dict[str, Columns], np.ndarray, np.ndarray]:
    """Forward, head, backward: the information by module key, the gradients at the embedding, the final states."""
    stack = traced(model, states, path)
    rows = rows_of(states, mask, single=True)
    carry = {GRADIENT: rows.place(head_gradients(decoder, model.head_params(), stack.final(), mask, seed=SEED))}
    backward = BackwardStep(decoder=decoder, stack=stack, rows=rows, tokens=int(mask.sum()), weigh=weigh)
    found = {}
    for spec in reversed(specs):
        carry, found[spec.key] = backward(carry, Block(spec, model.module_params(spec)))
    return found, carry[GRADIENT].array(), np.asarray(stack.final())


def labels(oracle: Llama, states: np.ndarray) -> np.ndarray:
    """The labels that the documented keys draw from the model's distributions, `[R, T]`."""
    tokens = np.concatenate([oracle.log_probabilities(row) for row in states])
    key = jax.random.fold_in(jax.random.key(SEED), 0)
    return np.asarray(jax.random.categorical(key, jnp.asarray(tokens, jnp.float32))).reshape(states.shape[:2])


@pytest.mark.parametrize("weigh", [False, True], ids=["all tokens alike", "tokens weighed"])
@pytest.mark.parametrize("mask", [np.ones_like(MASK), MASK], ids=["whole rows", "padded"])
def test_information_of_every_linear(
    model: Model,
    decoder: Decoder,
    specs: tuple[ModuleSpec, ...],
    states: np.ndarray,
    oracle: Llama,
    mask: np.ndarray,
    weigh: bool,
    tmp_path: Path,
) -> None:
    """The mean over tokens of the squared slope over the token's weight, at two columns of every linear."""
    found, _, _ = walk(model, decoder, specs, states, mask, tmp_path / "inputs", weigh)
    drawn = labels(oracle, states)
    rng = np.random.default_rng(0)
    for index, spec in enumerate(specs):
        for linear in spec.linears:
            got = found[spec.key][linear.name]
            assert got.shape == (linear.columns,)
            assert got.max() > 1e-4
            for column in rng.integers(0, linear.columns, 2):
                weights = found[spec.key].get(linear.name + TOKENS, np.ones(CLASSES))
                squares = [
                    slope(oracle, states[r], drawn[r], mask[r], Probe(index, linear.name, t, int(column), STEP)) ** 2
                    / weights[PLACE_CLASS[t]]
                    for r in range(ROWS)
                    for t in range(LENGTH)
                ]
                expected = sum(squares) / mask.sum()
                np.testing.assert_allclose(got[column], expected, rtol=5e-3, atol=1e-4 * got.max(), err_msg=linear.key)


def test_weights_of_tokens_follow_the_squared_slopes(
    model: Model, decoder: Decoder, specs: tuple[ModuleSpec, ...], states: np.ndarray, oracle: Llama, tmp_path: Path
) -> None:
    """At the last linear, over all its columns: the mean of each class over that of all tokens."""
    found, _, _ = walk(model, decoder, specs, states, MASK, tmp_path / "inputs", weigh=True)
    drawn, linear = labels(oracle, states), specs[-1].linears[-1]
    energy = np.zeros((ROWS, LENGTH))
    for r, t, n in np.ndindex(ROWS, LENGTH, linear.columns):
        if MASK[r, t]:
            probe = Probe(len(specs) - 1, linear.name, t, n, STEP)
            energy[r, t] += slope(oracle, states[r], drawn[r], MASK[r], probe) ** 2
    weights, places = found[specs[-1].key][linear.name + TOKENS], np.broadcast_to(PLACE_CLASS, MASK.shape)
    for c in set(PLACE_CLASS):
        mine = (places == c) & (MASK > 0)
        np.testing.assert_allclose(weights[c], energy[mine].mean() / energy[MASK > 0].mean(), rtol=5e-3)
    assert (weights[len(set(PLACE_CLASS)) :] == 1).all()  # no such tokens


def test_gradients_reach_the_embedding(
    model: Model, decoder: Decoder, specs: tuple[ModuleSpec, ...], states: np.ndarray, oracle: Llama, tmp_path: Path
) -> None:
    _, gradient, final = walk(model, decoder, specs, states, MASK, tmp_path / "inputs")
    drawn = labels(oracle, states)
    rng = np.random.default_rng(1)
    for r, t, d in zip(rng.integers(0, ROWS, 8), rng.integers(0, LENGTH, 8), rng.integers(0, 64, 8), strict=True):
        values = []
        for sign in (1, -1):
            moved = states[r].astype(np.float64)
            moved[t, d] += sign * STEP
            log_p = oracle.log_probabilities(moved)
            values.append(sum(MASK[r, i] * log_p[i, drawn[r, i]] for i in range(LENGTH)))
        np.testing.assert_allclose(gradient[r, t, d], (values[0] - values[1]) / (2 * STEP), rtol=5e-3, atol=1e-4)
    assert np.isfinite(final).all()


def test_the_seed_decides_the_labels(model: Model, decoder: Decoder, states: np.ndarray) -> None:
    def gradients(seed: int) -> np.ndarray:
        return head_gradients(decoder, model.head_params(), states, np.ones_like(MASK), seed=seed)

    assert np.array_equal(gradients(0), gradients(0))
    assert not np.array_equal(gradients(0), gradients(1))


def test_rows_have_labels_of_their_own(model: Model, decoder: Decoder, states: np.ndarray) -> None:
    twice = np.stack([states[0], states[0]])
    first, second = head_gradients(decoder, model.head_params(), twice, np.ones_like(MASK), seed=0)
    assert not np.array_equal(first, second)


def test_gradients_that_are_not_finite_are_named(
    model: Model, decoder: Decoder, specs: tuple[ModuleSpec, ...], states: np.ndarray, tmp_path: Path
) -> None:
    stack = InputStack(tmp_path / "inputs", specs, (ROWS, LENGTH, 64))
    stack.write(len(specs) - 1, states)
    rows = rows_of(states, single=True)
    step = BackwardStep(decoder=decoder, stack=stack, rows=rows, tokens=10)
    carry: dict[str, Any] = {GRADIENT: rows.place(np.full_like(states, np.nan))}
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp: the gradients hold NaN or infinity"):
        step(carry, Block(specs[-1], model.module_params(specs[-1])))
