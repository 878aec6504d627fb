"""A module with its parameters as a pass works on it: whole, or a large mixture of experts piece by piece.

The output of a mixture is a sum over its experts. A pass therefore takes one run of experts after the other through its
work (run it, pull a gradient back, try candidates, quantize) and adds up the states. The router is part of every piece,
the residual of the first.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, LinearSpec, Model, Module, ModuleSpec
from exl2jax.models.modules import MOE_KIND
from exl2jax.stream.forward import Tally, forward
from exl2jax.stream.streams import Stream, added

EXPERT_BYTES = 4 << 30
"""Bytes of the experts in memory together: their weights, Hessians, factors and quantized copies."""


class Piece(NamedTuple):
    """A module or some experts of it: its functions, its linears, the parameters on the device, biases on the host."""

    module: Module
    spec: ModuleSpec
    params: dict[str, Any]
    biases: dict[str, np.ndarray]

    @property
    def whole(self) -> bool:
        """Whether this is all of its module."""
        return self.spec.experts is None

    def target(self, states: Stream) -> Stream:
        """The stream that the outputs go to: `states` itself, unless other pieces still have to read it."""
        return states if self.whole else states.like(*states.shape)

    def forward(self, states: Stream, into: Stream) -> Tally:
        """Its part of the module's output on all rows."""
        return forward(self.module, self.params, states, into)


class Block(NamedTuple):
    """A module and its parameters; `load` reads those of a linear that is not among them."""

    spec: ModuleSpec
    params: Mapping[str, Any]
    load: Callable[[LinearSpec], Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, model: Model, spec: ModuleSpec) -> "Block":
        """A module of a model, its weights read, but for the experts of a mixture that comes in pieces.

        Weights come as the source stores them and go up to the device at once, one module ahead of their use where a
        scan loads it in a thread.
        """
        if len(cut(spec)) == 1:
            return cls(spec, _sent(model.module_params(spec, narrow=True)))
        return cls(spec, model.plain_params(spec), partial(model.linear_params, narrow=True))

    def pieces(self, decoder: Decoder, settings: int = 1) -> Iterator[Piece]:
        """The pieces in order, each read when its turn comes; `settings` as in `cut`.

        Consume with `map`, not `for`: the loop variable would keep two pieces in memory.
        """
        for spec in cut(self.spec, settings):
            yield self._piece(decoder, spec)

    def _piece(self, decoder: Decoder, spec: ModuleSpec) -> Piece:
        linears = {linear.name for linear in self.spec.linears}
        params = {name: value for name, value in self.params.items() if name not in linears}
        for linear in spec.linears:
            if self.load is None or linear.name in self.params:
                params[linear.name] = self.params[linear.name]
            else:
                params[linear.name] = self.load(linear)
        biases = {x.name: np.asarray(params[x.name]["bias"]) for x in spec.linears if "bias" in params[x.name]}
        return Piece(decoder.module(spec), spec, _widened(jax.device_put(params)), biases)


def cut(spec: ModuleSpec, settings: int = 1) -> tuple[ModuleSpec, ...]:
    """The module itself, or runs of a mixture's experts as long as `EXPERT_BYTES` allows, one expert at least.

    `settings` counts the quantized copies of each weight, in half precision, that are in memory beside it.
    """
    if spec.kind != MOE_KIND:
        return (spec,)
    experts = len(spec.stages[0])
    count = -(-experts // max(1, EXPERT_BYTES // expert_bytes(spec, settings)))
    if count == 1:
        return (spec,)
    size = -(-experts // count)
    runs = [range(start, min(start + size, experts)) for start in range(0, experts, size)]
    return tuple(
        replace(spec, experts=run, stages=tuple(stage[run.start : run.stop] for stage in spec.stages)) for run in runs
    )


def expert_bytes(spec: ModuleSpec, settings: int = 1) -> int:
    """Bytes of one expert of a mixture: float32 weights, Hessian and factor of each group, `settings` copies."""
    groups = [stage[0] for stage in spec.stages]
    weights = sum(linear.weights for group in groups for linear in group)
    return (4 + 2 * settings) * weights + 8 * sum(group[0].rows ** 2 for group in groups)


def joined[T](first: tuple[Stream, dict[str, T]], then: tuple[Stream, dict[str, T]]) -> tuple[Stream, dict[str, T]]:
    """The results of two pieces: their states add up, their records by linear stand side by side."""
    return added(first[0], then[0]), first[1] | then[1]


def forward_block(decoder: Decoder, block: Block, states: Stream) -> tuple[Stream, Tally]:
    """A module's output on all rows, in place of `states` where it comes whole, and its tally."""

    def run(piece: Piece) -> tuple[Stream, Tally]:
        out = piece.target(states)
        return out, piece.forward(states, out)

    def both(first: tuple[Stream, Tally], then: tuple[Stream, Tally]) -> tuple[Stream, Tally]:
        return added(first[0], then[0]), first[1].joined(then[1])

    return reduce(both, map(run, block.pieces(decoder)))


def _sent(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the kernels on their way to the device; the rest is small."""
    return {
        name: values | {"kernel": jax.device_put(values["kernel"])} if "kernel" in values else values
        for name, values in params.items()
    }


@jax.jit
def _widened(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters in float32, from the 16 bits that they came up in."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


class HeadBlock(NamedTuple):
    """The head and its parameters (final norm included), the last block of the pass."""

    spec: LinearSpec
    params: Mapping[str, Any]

    @classmethod
    def of(cls, model: Model, spec: LinearSpec) -> "HeadBlock":
        """The head of a model, which goes up to the device as the source stores it: no copy stays in host memory."""
        return cls(spec, _sent(model.head_params(narrow=True)))
