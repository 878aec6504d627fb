"""Tuning of a whole quantized model by its predictions: maxima of scales, norms and biases, module after module.

The loss is the KL divergence of the full-precision model's next-token distributions from the quantized model's. What a
step holds is one module's parameters, the states before every module on one piece of text, and all changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from exl2jax.models import Decoder, Module, ModuleSpec
from exl2jax.models.modules import NormSpec
from exl2jax.qparams import padded_columns
from exl2jax.quantize.changes import (
    Changes,
    moved,
    no_changes,
    stored_biases,
    stored_maxima,
    stored_norms,
)
from exl2jax.quantize.store import stored_norm

PIECE = 256
"""Tokens of a piece of text, of which a step takes one."""

LEARNING_RATE = 3e-3
"""The rate at three bits per weight. With every bit errors halve, and so does what making up for them takes."""

WARM_UP = 4
"""Steps until the learning rate is reached, from which it falls by a cosine."""

SQUARES = 0.95
"""How long Adam remembers squared gradients: a run has few steps."""

HEAD = "lm_head"
"""The place of the final norm's changes among those of the modules."""


class StoredModule(NamedTuple):
    """A quantized module as its tensors are stored.

    `params` with the kernels `[K, N]` dequantized, `maxima [K / 32]` float16 by linear, zero beyond its groups, and the
    group `of_row [K]` int32 of each row of a linear, rows as in the model.
    """

    params: Mapping[str, Any]
    maxima: Mapping[str, np.ndarray]
    of_row: Mapping[str, np.ndarray]


class Passage(NamedTuple):
    """Text to tune or to judge on: embedded states `[1, T, D]`, the mask of its tokens `[1, T]`, and the final
    full-precision states `[1, T, D]`.
    """  # noqa: D205

    states: np.ndarray
    mask: np.ndarray
    reference: np.ndarray


type ModelChanges = dict[str, Changes]
"""Changes by key of a module, those of the final norm under `HEAD`."""


class TuningState(NamedTuple):
    """How far a tuning has come: changes and Adam's moments, the best changes so far, and their divergence and that
    before the first step, both infinite until judged.
    """  # noqa: D205

    values: ModelChanges
    moments: Any
    best: ModelChanges
    least: Any
    before: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedModel:
    """A quantized model to tune.

    `load` reads a module as it is stored; `head` are the parameters of the quantized head, `full_head` those of the
    full-precision one, `head_norm` is the spec of the norm in both. `bits` are those of a weight, on average.
    """

    decoder: Decoder
    specs: Sequence[ModuleSpec]
    load: Callable[[ModuleSpec], StoredModule]
    head: Mapping[str, Any]
    full_head: Mapping[str, Any]
    head_norm: NormSpec
    bits: float

    def start(self) -> TuningState:
        """The state before the first step."""
        values = {spec.key: no_changes(spec.linears, spec.norms, self.load(spec).params) for spec in self.specs}
        values[HEAD] = no_changes((), (self.head_norm,), self.head)
        moments = jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(_adam(1, LEARNING_RATE).init, values)
        )
        return TuningState(values, moments, values, np.float32(np.inf), np.float32(np.inf))

    def step(self, state: TuningState, piece: Passage, steps: int) -> tuple[TuningState, float]:
        """One of so many steps of Adam on a piece: the state after it, and the divergence before it."""
        loss, gradients = self.gradients(state.values, piece)
        values, moments = _adam_step(gradients, state.moments, state.values, steps=steps, rate=learning_rate(self.bits))
        return state._replace(values=values, moments=moments), loss

    def judged(self, state: TuningState, pieces: Sequence[Passage]) -> tuple[TuningState, float]:
        """The state with its changes as the best ones if they are, and their divergence on pieces kept apart."""
        found = self.divergence(state.values, pieces)
        if np.isinf(state.before):
            state = state._replace(before=np.float32(found))
        better = found < state.least
        return (state._replace(best=state.values, least=np.float32(found)) if better else state), found

    def gradients(self, values: ModelChanges, piece: Passage) -> tuple[float, ModelChanges]:
        """The mean divergence over the tokens of a piece, and its gradients at the changes, unrounded."""
        before, h = [], piece.states
        for spec in self.specs:
            module, stored = self.decoder.module(spec), self.load(spec)
            before.append(h)
            h = _forward(values[spec.key], stored.params, stored.of_row, h, module=module)
        loss, (gradient, back) = _head_gradients(
            values[HEAD], self.head, self.full_head, h, piece, decoder=self.decoder
        )
        found = {HEAD: gradient}
        for spec, h in zip(self.specs[::-1], before[::-1], strict=True):
            module, stored = self.decoder.module(spec), self.load(spec)
            found[spec.key], back = _pull(values[spec.key], stored.params, stored.of_row, h, back, module=module)
        return float(loss), found

    def divergence(self, values: ModelChanges, pieces: Sequence[Passage]) -> float:
        """The mean divergence over the tokens of all pieces, with the changes rounded as they will be stored."""
        values, states = jax.device_get(values), [piece.states for piece in pieces]
        for spec in self.specs:
            module, stored = self.decoder.module(spec), self.load(spec)
            params, ratios = as_stored(stored, spec.norms, values[spec.key])
            states = [_forward(ratios, params, stored.of_row, h, module=module) for h in states]
        head = {**self.head, **stored_norms(self.head, (self.head_norm,), values[HEAD])}
        parts = zip(states, pieces, strict=True)
        sums = jax.device_get([_divergence(head, self.full_head, h, x, decoder=self.decoder) for h, x in parts])
        return float(np.sum(sums)) / max(float(sum(piece.mask.sum() for piece in pieces)), 1.0)

    def tensors(self, values: ModelChanges) -> dict[str, np.ndarray]:
        """The changed tensors as they are stored, by name."""
        values, out = jax.device_get(values), dict[str, np.ndarray]()
        for spec in self.specs:
            changes, stored = values[spec.key], self.load(spec)
            for x in spec.linears:
                maxima = stored_maxima(stored.maxima[x.name], np.asarray(changes.maxima[x.name]))
                out[f"{x.key}.q_scale_max"] = maxima[: 1 + int(np.max(stored.of_row[x.name]))]
            biases, columns = stored_biases(stored.params, changes), {x.name: x for x in spec.linears}
            for name, bias in biases.items():
                padded = np.zeros(padded_columns(len(bias)), np.float16)
                padded[: len(bias)] = bias
                out[f"{columns[name].key}.bias"] = padded
            out |= _norm_tensors(spec.norms, stored.params, changes)
        return out | _norm_tensors((self.head_norm,), self.head, values[HEAD])


def as_stored(stored: StoredModule, norms: tuple[NormSpec, ...], values: Changes) -> tuple[dict[str, Any], Changes]:
    """A module's parameters with norms and biases rounded to half, and what its maxima really change by.

    The other changes come back as none, so that what is judged runs as one program with what is tuned.
    """
    ratios = {}
    for name, delta in values.maxima.items():
        old, new = stored.maxima[name], stored_maxima(stored.maxima[name], np.asarray(delta))
        ratios[name] = np.where(old > 0, new.astype(np.float32) / np.where(old > 0, old, 1), 1) - 1
    params = {**stored.params, **stored_norms(stored.params, norms, values)}
    for name, bias in stored_biases(stored.params, values).items():
        params[name] = {**params[name], "bias": bias}
    none = jax.tree.map(np.zeros_like, values)
    return params, none._replace(maxima=ratios)


def _norm_tensors(norms: tuple[NormSpec, ...], params: Mapping[str, Any], values: Changes) -> dict[str, np.ndarray]:
    """The changed norms as they are stored."""
    found = stored_norms(params, norms, values)
    changed = (stored_norm(norm, found[norm.name]) for norm in norms if norm.name in found)
    return {name: tensor for tensors in changed for name, tensor in tensors.items()}


def learning_rate(bits: float) -> float:
    """The rate that a tuning at so many bits per weight reaches."""
    return LEARNING_RATE * 2 ** (3 - bits)


def _adam(steps: int, rate: float) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980) whose rate rises over `WARM_UP` steps and falls to nothing by a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, WARM_UP, max(steps, WARM_UP + 1))
    return optax.adam(schedule, b2=SQUARES)


@partial(jax.jit, static_argnames=("steps", "rate"))
def _adam_step(gradients: Any, moments: Any, values: Any, *, steps: int, rate: float) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in integers
        updates, moments = _adam(steps, rate).update(gradients, moments, values)
        return optax.apply_updates(values, updates), moments


def _run(module: Module, params: Any, of_row: Mapping[str, jax.Array], values: Changes, h: jax.Array) -> jax.Array:
    return module.forward(moved(params, of_row, values), h).hidden


@partial(jax.jit, static_argnames="module")
def _forward(
    values: Changes, params: Any, of_row: Mapping[str, jax.Array], h: jax.Array, *, module: Module
) -> jax.Array:
    return _run(module, params, of_row, values, h)


@partial(jax.jit, static_argnames="module")
def _pull(
    values: Changes, params: Any, of_row: Mapping[str, jax.Array], h: jax.Array, back: jax.Array, *, module: Module
) -> tuple[Changes, jax.Array]:
    """Gradients at a module's changes and at its input, from those at its output."""
    _, pull = jax.vjp(partial(_run, module, params, of_row), values, h)
    return pull(back)


@partial(jax.jit, static_argnames="decoder")
def _head_gradients(
    values: Changes, head: Any, full: Any, h: jax.Array, piece: Passage, *, decoder: Decoder
) -> tuple[jax.Array, tuple[Changes, jax.Array]]:
    """The mean divergence, and its gradients at the changes of the final norm and at the final states."""

    def loss(values: Changes, h: jax.Array) -> jax.Array:
        total = _sum_of_divergences(decoder, moved(head, {}, values), full, h, piece)
        return total / jnp.maximum(jnp.sum(piece.mask), 1)

    return jax.value_and_grad(loss, argnums=(0, 1))(values, h)


@partial(jax.jit, static_argnames="decoder")
def _divergence(head: Any, full: Any, h: jax.Array, piece: Passage, *, decoder: Decoder) -> jax.Array:
    return _sum_of_divergences(decoder, head, full, h, piece)


def _sum_of_divergences(decoder: Decoder, head: Any, full: Any, h: jax.Array, piece: Passage) -> jax.Array:
    """Sum over tokens of the divergence at final states `h` from that at the piece's own."""
    wanted = jax.nn.log_softmax(decoder.logits(full, jnp.asarray(piece.reference)))
    found = jax.nn.log_softmax(decoder.logits(head, h))
    return jnp.sum(jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1) * piece.mask)
