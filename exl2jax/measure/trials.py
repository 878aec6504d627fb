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

from exl2jax.models import Module, ModuleSpec
from exl2jax.models.layers import apply_linear
from exl2jax.models.modules import MOE_KIND
from exl2jax.ops import relative_frobenius
from exl2jax.stream.devices import on_all_devices
from exl2jax.stream.forward import ErrorOfRows, forward_chunk, row_errors
from exl2jax.stream.streams import Rows, Stream, fold


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
    """Group candidates by shared settings; `first` holds each first-stage linear's setting by candidate."""
    groups: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {}
    for candidate, (*picks, last) in enumerate(zip(*first, strict=True)):
        members = groups.setdefault(tuple(picks), {})
        members[last] = (*members.get(last, ()), candidate)
    return tuple(Shared(picks, last) for picks, last in groups.items())


def candidate_errors(
    module: Module,
    spec: ModuleSpec,
    params: Any,
    stacks: Mapping[str, Stack],
    rows: Rows,
    states: Stream,
    reference: Stream,
    of_rows: ErrorOfRows = relative_frobenius,
) -> list[Stream]:
    """The error `of_rows` of each row `[R]` under each candidate, residual included."""
    params, stacks = on_all_devices(params), _everywhere(stacks)
    outputs = _expert_outputs if spec.kind == MOE_KIND else _outputs
    errors = [Stream.empty(rows.spans, (), resident=True) for _ in stacks[spec.linears[0].name].picks]

    def program(total: None, h: jax.Array, ref: jax.Array, mask: jax.Array) -> tuple[None, list[jax.Array]]:
        trials = outputs(module, spec, params, stacks, h)
        found = {candidate: row_errors(of_rows, out, ref, mask) for candidate, out in trials}
        return total, [found[i] for i in range(len(found))]

    fold(program, None, (states, reference, rows.mask), errors)
    return errors


def expert_outputs(
    module: Module, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], states: Stream
) -> list[Stream]:
    """Output of some experts of a mixture `[R, T, D]` under each candidate."""
    params, stacks = on_all_devices(params), _everywhere(stacks)
    out = [states.like(*states.shape) for _ in stacks[spec.linears[0].name].picks]

    def program(total: None, h: jax.Array) -> tuple[None, list[jax.Array]]:
        return total, [part for _, part in _expert_outputs(module, spec, params, stacks, h)]

    fold(program, None, (states,), out)
    return out


def _everywhere(stacks: Mapping[str, Stack]) -> dict[str, Stack]:
    return {name: Stack(on_all_devices(stack.weights), stack.picks) for name, stack in stacks.items()}


def _expert_outputs(
    module: Module, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], h: jax.Array
) -> Iterator[tuple[int, jax.Array]]:
    """The output of a mixture of experts under each candidate, which sets all experts alike."""
    for candidate in range(len(stacks[spec.linears[0].name].picks)):
        trial = {name: _with_kernel(params[name], stack, candidate) for name, stack in stacks.items()}
        yield candidate, forward_chunk(module, _apart(spec, params) | trial, h)


def _outputs(
    module: Module, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], h: jax.Array
) -> Iterator[tuple[int, jax.Array]]:
    """The module's output under each candidate, in the order of sharing."""
    (last,) = spec.groups[-1]
    for candidate, between in _second_inputs(module, spec, params, stacks, h):
        linear = _with_kernel(params[last.name], stacks[last.name], candidate)
        yield candidate, _output(module, last.name, _apart(spec, params), linear, between, h)


def _second_inputs(
    module: Module, spec: ModuleSpec, params: Any, stacks: Mapping[str, Stack], h: jax.Array
) -> Iterator[tuple[int, jax.Array]]:
    """Input of the second stage under each candidate, as `(candidate, array)` in the order of sharing.

    Outputs of the first stage are computed when first needed and dropped after their last use.
    """
    names = [linear.name for linear in spec.groups[0]]
    groups = plan([stacks[name].picks for name in names])
    rest = _apart(spec, params)
    x = _first_input(module, rest, h)
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
        between = _betweens(module, rest, first, last)
        for y, members in zip(between, group.last.values(), strict=True):
            yield from ((candidate, y) for candidate in members)


def _settings(names: Sequence[str], group: Shared) -> list[tuple[str, int]]:
    """The linears' settings that a group of candidates needs, once each."""
    return [*zip(names[:-1], group.picks, strict=True), *((names[-1], setting) for setting in group.last)]


def _with_kernel(linear: Mapping[str, Any], stack: Stack, candidate: int) -> dict[str, Any]:
    return dict(linear) | {"kernel": stack.weights[stack.picks[candidate]]}


def _apart(spec: ModuleSpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of norms, which are not linears."""
    linears = {linear.name for linear in spec.linears}
    return {name: value for name, value in params.items() if name not in linears}


@partial(jax.jit, static_argnames="module")
def _first_input(module: Module, rest: Any, h: jax.Array) -> jax.Array:
    return module.inputs(0, rest, h, {})[0]


@jax.jit
def _linear(x: jax.Array, linear: Any) -> jax.Array:
    return apply_linear(linear, x)


@partial(jax.jit, static_argnames="module")
def _betweens(module: Module, rest: Any, first: dict[str, jax.Array], last: tuple[jax.Array, ...]) -> list[jax.Array]:
    return module.last_inputs(rest, first, last)


@partial(jax.jit, static_argnames=("module", "last"))
def _output(module: Module, last: str, rest: Any, linear: Any, between: jax.Array, h: jax.Array) -> jax.Array:
    return module.output(rest, h, {last: apply_linear(linear, between)})
