"""Trying candidates: a module's output under each of its candidates' weights, against its full-precision output.

Nearly all the work is matrix products, and two candidates repeat each other's wherever they agree: each distinct
setting of a linear of the first stage is multiplied once, candidates that agree in all but the last linear of that
stage (q and k of an attention) share what comes before it, and only the second stage is each candidate's own.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, ModuleSpec
from exl2jax.models.layers import apply_linear
from exl2jax.models.modules import MOE_KIND
from exl2jax.ops import relative_frobenius
from exl2jax.stream.chunks import full_mask, row_chunks
from exl2jax.stream.devices import on_all_devices
from exl2jax.stream.forward import ErrorOfRows, forward_chunk, row_errors


class Stack(NamedTuple):
    """Distinct settings of a linear: their dequantized weights `[K, N]` float16, and each candidate's choice."""

    weights: Sequence[jax.Array]
    picks: Sequence[int]


class Shared(NamedTuple):
    """Candidates with the same settings of the first stage but for its last linear.

    `picks` are the setting of each linear before the last; `last` maps a setting of the last linear to the candidates
    that take it.
    """

    picks: tuple[int, ...]
    last: Mapping[int, tuple[int, ...]]


def plan(first: Sequence[Sequence[int]]) -> tuple[Shared, ...]:
    """Group candidates by what they share; `first` holds each linear's setting by candidate, first stage only."""
    groups: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {}
    for candidate, (*picks, last) in enumerate(zip(*first, strict=True)):
        members = groups.setdefault(tuple(picks), {})
        members[last] = (*members.get(last, ()), candidate)
    return tuple(Shared(picks, last) for picks, last in groups.items())


def candidate_errors(
    decoder: Decoder,
    spec: ModuleSpec,
    params: Any,
    stacks: Mapping[str, Stack],
    states: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray | None,
    of_rows: ErrorOfRows = relative_frobenius,
) -> np.ndarray:
    """Mean over rows of the error `of_rows` for each candidate, residual included: `[candidates]` float64."""
    mask = full_mask(states, mask)
    params, stacks = on_all_devices(params), _everywhere(stacks)
    outputs = _expert_outputs if spec.kind == MOE_KIND else _outputs
    parts = []
    for chunk in row_chunks(states):
        h, ref, weight = (jnp.asarray(chunk.take(x)) for x in (states, reference, mask))
        errors: dict[int, jax.Array] = {}
        for candidate, out in outputs(decoder, spec, params, stacks, h):
            errors[candidate] = row_errors(of_rows, out, ref, weight)
        parts.append(np.stack([chunk.read(errors[i]) for i in range(len(errors))]))
    return np.concatenate(parts, axis=1).astype(np.float64).mean(axis=1)


def expert_outputs(
    decoder: Decoder, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], states: np.ndarray
) -> np.ndarray:
    """What some experts of a mixture add to its output under each candidate, `[candidates, R, T, D]`."""
    out = np.empty((len(stacks[spec.linears[0].name].picks), *states.shape), np.float32)
    params, stacks = on_all_devices(params), _everywhere(stacks)
    for chunk in row_chunks(states):
        for candidate, part in _expert_outputs(decoder, spec, params, stacks, jnp.asarray(chunk.take(states))):
            chunk.put(out[candidate], part)
    return out


def _everywhere(stacks: Mapping[str, Stack]) -> dict[str, Stack]:
    return {name: Stack(on_all_devices(stack.weights), stack.picks) for name, stack in stacks.items()}


def _expert_outputs(
    decoder: Decoder, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], h: jax.Array
) -> Iterator[tuple[int, jax.Array]]:
    """The output of a mixture of experts under each candidate, which sets all experts alike."""
    for candidate in range(len(stacks[spec.linears[0].name].picks)):
        trial = {name: _with_kernel(params[name], stack, candidate) for name, stack in stacks.items()}
        yield candidate, forward_chunk(decoder, spec.kind, _apart(spec, params) | trial, h)


def _outputs(
    decoder: Decoder, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], h: jax.Array
) -> Iterator[tuple[int, jax.Array]]:
    """The module's output under each candidate, in the order of sharing."""
    (last,) = spec.groups[-1]
    for candidate, between in _second_inputs(decoder, spec, params, stacks, h):
        linear = _with_kernel(params[last.name], stacks[last.name], candidate)
        yield candidate, _output(decoder, spec.kind, last.name, _apart(spec, params), linear, between, h)


def _second_inputs(
    decoder: Decoder, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], h: jax.Array
) -> Iterator[tuple[int, jax.Array]]:
    """What the second stage reads under each candidate, as `(candidate, array)` in the order of sharing.

    Outputs of the first stage are computed when first needed and dropped after their last use.
    """
    names = [linear.name for linear in spec.groups[0]]
    groups = plan([stacks[name].picks for name in names])
    rest = _apart(spec, params)
    x = _first_input(decoder, spec.kind, rest, h)
    uses = Counter(use for group in groups for use in _settings(names, group))
    held: dict[tuple[str, int], jax.Array] = {}

    def output(name: str, setting: int) -> jax.Array:
        use = (name, setting)
        if use not in held:
            held[use] = _linear(x, dict(params[name]) | {"kernel": stacks[name].weights[setting]})
        uses[use] -= 1
        return held[use] if uses[use] else held.pop(use)

    for group in groups:
        first = {name: output(name, pick) for name, pick in zip(names[:-1], group.picks, strict=True)}
        last = tuple(output(names[-1], setting) for setting in group.last)
        between = _betweens(decoder, spec.kind, rest, first, last)
        for y, members in zip(between, group.last.values(), strict=True):
            yield from ((candidate, y) for candidate in members)


def _settings(names: Sequence[str], group: Shared) -> list[tuple[str, int]]:
    """The linears' settings that a group of candidates needs, once each."""
    return [*zip(names[:-1], group.picks, strict=True), *((names[-1], setting) for setting in group.last)]


def _with_kernel(linear: Mapping[str, Any], stack: Stack, candidate: int) -> dict[str, Any]:
    return dict(linear) | {"kernel": stack.weights[stack.picks[candidate]]}


def _apart(spec: ModuleSpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are not linears: norms."""
    linears = {linear.name for linear in spec.linears}
    return {name: value for name, value in params.items() if name not in linears}


@partial(jax.jit, static_argnums=(0, 1))
def _first_input(decoder: Decoder, kind: str, rest: Any, h: jax.Array) -> jax.Array:
    return decoder.inputs(kind, 0, rest, h, {})[0]


@jax.jit
def _linear(x: jax.Array, linear: Any) -> jax.Array:
    return apply_linear(linear, x)


@partial(jax.jit, static_argnums=(0, 1))
def _betweens(
    decoder: Decoder, kind: str, rest: Any, first: dict[str, jax.Array], last: tuple[jax.Array, ...]
) -> list[jax.Array]:
    return decoder.last_inputs(kind, rest, first, last)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _output(
    decoder: Decoder, kind: str, last: str, rest: Any, linear: Any, between: jax.Array, h: jax.Array
) -> jax.Array:
    return decoder.output(kind, rest, h, {last: apply_linear(linear, between)})
