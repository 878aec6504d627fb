"""Fisher information of every linear's output columns: how much the model's predictions feel an error there.

For a small error `e` added to the outputs of a linear, the expected KL divergence of the next-token distributions is
`1/2 e^T F e` with `F` the Fisher information, the second moment of the gradient of the log likelihood under labels
sampled from the model itself. Its diagonal needs one forward and one backward pass over a few rows; the backward pass
walks the modules in reverse and recomputes each from its stored input, so one module is resident at a time.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, Model, ModuleSpec
from exl2jax.pipeline.progress import Control
from exl2jax.pipeline.stream import embed, forward

FISHER_ROWS = 8
"""Calibration rows of the backward pass."""

type Fisher = dict[str, np.ndarray]
"""Mean squared gradient at each output column, `[N]` float32 by linear key."""


def fisher_information(
    model: Model, decoder: Decoder, specs: Sequence[ModuleSpec], input_ids: np.ndarray, *, seed: int, control: Control
) -> Fisher:
    """Diagonal Fisher information at the outputs of all linears, over tokens of `input_ids [R, T]`.

    Labels are drawn from the model's own distributions with keys from `seed`.
    """
    control.progress.start("sensitivity", 2 * len(specs), 0)
    states, inputs = embed(model, input_ids), []
    for spec in specs:
        inputs.append(states)
        states = forward(decoder, spec.kind, model.module_params(spec), states)
        control.progress.step(f"{spec.key}: forward")
    gradient = _head_gradients(decoder, model.head_params(), states, seed)
    out: Fisher = {}
    for spec, states in zip(reversed(specs), reversed(inputs), strict=True):
        gradient, squares = _module_backward(decoder, spec, model.module_params(spec), states, gradient)
        out |= {f"{spec.key}.{name}": value / input_ids.size for name, value in squares.items()}
        control.progress.step(f"{spec.key}: backward")
    control.progress.finish()
    return out


def _head_gradients(decoder: Decoder, params: Any, states: np.ndarray, seed: int) -> np.ndarray:
    """Gradients of the sampled log likelihood at the final states, row by row."""
    out = np.empty_like(states)
    for i in range(len(states)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        out[i] = _head_gradient(decoder, params, states[i : i + 1], key)[0]
    return out


@partial(jax.jit, static_argnums=0)
def _head_gradient(decoder: Decoder, params: Any, h: jax.Array, key: jax.Array) -> jax.Array:
    def likelihood(h: jax.Array) -> jax.Array:
        logits = decoder.logits(params, h)
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1))

    return jax.grad(likelihood)(h)


def _module_backward(
    decoder: Decoder, spec: ModuleSpec, params: Any, states: np.ndarray, gradient: np.ndarray
) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """Gradients at the module's input, and the sums of squared gradients at its linears' outputs."""
    columns = {linear.name: linear.columns for linear in spec.linears}
    totals = {name: np.zeros(n, np.float64) for name, n in columns.items()}
    out = np.empty_like(states)
    params = jax.device_put(params)
    for i in range(len(states)):
        back, squares = _row_backward(
            params,
            states[i : i + 1],
            gradient[i : i + 1],
            decoder=decoder,
            kind=spec.kind,
            columns=tuple(columns.items()),
        )
        out[i] = back[0]
        for name, value in squares.items():
            totals[name] += np.asarray(value, np.float64)
    return out, {name: value.astype(np.float32) for name, value in totals.items()}


@partial(jax.jit, static_argnames=("decoder", "kind", "columns"))
def _row_backward(
    params: Any, h: jax.Array, gradient: jax.Array, *, decoder: Decoder, kind: str, columns: tuple[tuple[str, int], ...]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pull a row's gradient back through a module; zero probes at the linears' outputs collect theirs."""
    second = columns[-1][0]

    def run(h: jax.Array, probes: dict[str, jax.Array]) -> jax.Array:
        outputs = decoder.first(kind, params, decoder.first_input(kind, params, h))
        between = decoder.second_input(kind, params, {name: y + probes[name] for name, y in outputs.items()})
        return decoder.residual(kind, params, h, decoder.second(kind, params, between) + probes[second])

    probes = {name: jnp.zeros((*h.shape[:2], n), jnp.float32) for name, n in columns}
    _, pull = jax.vjp(run, h, probes)
    back, felt = pull(gradient)
    return back, {name: jnp.sum(jnp.square(g), axis=(0, 1)) for name, g in felt.items()}
