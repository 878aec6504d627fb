"""A module with its parameters as a pass works on it: whole, or a large mixture of experts piece by piece.

The output of a mixture is a sum over its experts, so what a pass does to a module (run it, pull a gradient back, try
candidates, quantize) it does to one run of experts after the other, and adds up the states. The router is part of every
piece, the residual of the first.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import numpy as np

from exl2jax.models import Decoder, LinearSpec, Model, ModuleSpec
from exl2jax.models.modules import MOE_KIND
from exl2jax.stream.forward import forward

EXPERT_BYTES = 4 << 30
"""Experts in memory together: their weights, Hessians and factors, and what they are quantized to."""


class Piece(NamedTuple):
    """What is worked on at a time: a module or some experts of it, its decoder, and the parameters on the device."""

    decoder: Decoder
    spec: ModuleSpec
    params: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether this is all of its module."""
        return self.spec.experts is None

    def forward(self, states: np.ndarray) -> np.ndarray:
        """Its part of the module's output on all rows `[R, T, D]`."""
        return forward(self.decoder, self.spec.kind, self.params, states)


class Block(NamedTuple):
    """A module and its parameters; `load` reads those of a linear that is not among them."""

    spec: ModuleSpec
    params: Mapping[str, Any]
    load: Callable[[LinearSpec], Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, model: Model, spec: ModuleSpec) -> "Block":
        """A module of a model, its weights read, but for the experts of a mixture that comes in pieces."""
        if len(cut(spec)) == 1:
            return cls(spec, model.module_params(spec))
        return cls(spec, model.plain_params(spec), model.linear_params)

    def pieces(self, decoder: Decoder, settings: int = 1) -> Iterator[Piece]:
        """The pieces in order, each read when its turn comes; `settings` as in `cut`.

        Take them through `map`, which lets go of one before it asks for the next: a loop's variable would keep it.
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
        return Piece(decoder.of(spec), spec, jax.device_put(params))


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


def joined[T](
    first: tuple[np.ndarray, dict[str, T]], then: tuple[np.ndarray, dict[str, T]]
) -> tuple[np.ndarray, dict[str, T]]:
    """What two pieces gave: their states add up, their findings by linear stand side by side."""
    return first[0] + then[0], first[1] | then[1]


def forward_block(decoder: Decoder, block: Block, states: np.ndarray) -> np.ndarray:
    """A module's output on all rows `[R, T, D]`."""
    return reduce(np.add, map(partial(Piece.forward, states=states), block.pieces(decoder)))


class HeadBlock(NamedTuple):
    """The head and its parameters (final norm included), the last block of the pass."""

    spec: LinearSpec
    params: Mapping[str, Any]
