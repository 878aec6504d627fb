"""Fisher information of every linear's output columns: the effect of an error there on the model's predictions.

For a small error `e` added to the outputs of a linear, the expected KL divergence of the next-token distributions is
`1/2 e^T F e` with `F` the Fisher information, the second moment of the gradient of the log likelihood under labels
sampled from the model itself. Its diagonal needs one forward and one backward pass over a few rows: two scans, the
second one over the modules in reverse, each recomputed from its stored input, so that one module is resident at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.errors import NumericalError
from exl2jax.measure.inputs import InputStack
from exl2jax.models import Decoder, LinearSpec, Module, ModuleSpec
from exl2jax.stream.blocks import Block, Piece, joined
from exl2jax.stream.chunks import Chunk, full_mask, token_spans
from exl2jax.stream.devices import on_all_devices
from exl2jax.stream.scan import GRADIENT, Carry
from exl2jax.stream.streams import Rows, Stream, fold, read
from exl2jax.stream.token_classes import CLASSES, TOKENS, class_weights, squares_by_class, token_classes

type Columns = Mapping[str, np.ndarray]
"""Mean squared gradient at each output column, `[N]` float32 by linear name; where tokens have weights these are
taken out of it, and stand beside it under the name with `TOKENS` after it."""


def columns_by_key(spec: ModuleSpec, columns: Columns) -> dict[str, np.ndarray]:
    """The known columns of a module's linears by their keys, as they are stored."""
    return {x.key + part: columns[x.name + part] for x, part in _parts(spec) if x.name + part in columns}


def columns_by_name(spec: ModuleSpec, known: Mapping[str, np.ndarray]) -> Columns:
    """The columns of a module from those by key of a whole model."""
    return {x.name + part: known[x.key + part] for x, part in _parts(spec) if x.key + part in known}


def _parts(spec: ModuleSpec) -> Iterator[tuple[LinearSpec, str]]:
    return product(spec.linears, ("", TOKENS))


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientStep:
    """The step of a backward scan: gradients at the module's input, and what a pass keeps of those at its linears."""

    decoder: Decoder
    stack: InputStack
    rows: Rows

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, Columns]:
        """Pull the gradients `[R, T, D]` back through a module; those through its pieces add up."""
        states = self.rows.place(self.stack.read(block.spec))
        pull = partial(self._pull, states=states, gradient=carry[GRADIENT])
        out, found = reduce(joined, map(pull, block.pieces(self.decoder)))
        return {GRADIENT: out}, found

    def _pull(self, piece: Piece, states: Stream, gradient: Stream) -> tuple[Stream, dict[str, Any]]:
        """The gradients through a piece, row by row, and what is kept of them by linear."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardStep(GradientStep):
    """The step over `tokens` tokens that finds the Fisher information of each linear's columns.

    `weigh` asks for weights of tokens by class; padding, whose gradients are zero, is left out of them.
    """

    tokens: int
    weigh: bool = False

    def _pull(self, piece: Piece, states: Stream, gradient: Stream) -> tuple[Stream, dict[str, Any]]:
        columns = tuple((linear.name, linear.columns) for linear in piece.spec.linears)
        program = partial(_row_backward, module=piece.module, columns=columns)
        params, out = on_all_devices(piece.params), piece.target(gradient)

        def pull(
            felt: tuple[Felt, ...], h: jax.Array, mask: jax.Array, back: jax.Array
        ) -> tuple[tuple[Felt, ...], tuple[jax.Array]]:
            moved, new = program(params, Chunk(h, mask), back)
            return (*felt, new), (moved,)

        felt = read(fold(pull, (), (states, self.rows.mask, gradient), (out,)))
        require_finite_gradients([row.finite for row in felt], piece.spec)
        wide = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *felt)
        return out, self._columns(piece.spec, wide.squares, wide.tokens)

    def _columns(self, spec: ModuleSpec, totals: Mapping[str, np.ndarray], counts: np.ndarray) -> dict[str, np.ndarray]:
        """From sums of squares by class: means over tokens, each token's square over its weight, and the weights."""
        found: dict[str, np.ndarray] = {}
        for group in spec.groups:
            weights = class_weights([totals[x.name] for x in group], counts) if self.weigh else np.ones(CLASSES)
            for x in group:
                found[x.name] = ((1 / weights) @ totals[x.name] / self.tokens).astype(np.float32)
                if self.weigh:
                    found[x.name + TOKENS] = weights.astype(np.float32)
        return found


def require_finite_gradients(finite: Iterable[Any], spec: ModuleSpec) -> None:
    """Raise `NumericalError` where gradients of a module are not finite."""
    if not all(finite):
        raise NumericalError(f"{spec.key}: the gradients hold NaN or infinity; use `preset` stock, which needs none")


def head_gradients(decoder: Decoder, params: Any, states: np.ndarray, mask: np.ndarray, *, seed: int) -> np.ndarray:
    """Gradients `[R, T, D]` of the log likelihood of sampled labels at the final states, padding left out.

    Labels are drawn from the model's own distributions, tokens in chunks (`token_spans`), chunk `i` with the key
    `fold_in(key(seed), i)`; of the seed the lower 32 bits count.
    """
    tokens, weights = states.reshape(-1, states.shape[-1]), full_mask(states.shape, mask).reshape(-1)
    spans = token_spans(len(tokens), params["lm_head"]["kernel"].shape[1])
    out = Stream.empty(spans, tokens.shape[1:], resident=False)
    streams = [Stream.of(x, spans, resident=False) for x in (tokens, weights)]
    head, low = on_all_devices(jax.device_put(params)), np.uint32(seed % 2**32)
    fold(partial(_head_gradient, decoder, head, low), np.int32(0), streams, (out,))
    return out.array().reshape(states.shape)


@partial(jax.jit, static_argnames="decoder")
def _head_gradient(
    decoder: Decoder, params: Any, seed: jax.Array, index: jax.Array, h: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array]]:
    """Gradients of chunk `index` of tokens, and the next index."""
    own = jax.random.fold_in(jax.random.key(seed), index)

    def likelihood(h: jax.Array) -> jax.Array:
        logits = decoder.logits(params, h[None])[0]
        labels = jax.random.categorical(own, jax.lax.stop_gradient(logits))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return jnp.sum(picked * mask)

    return index + 1, (jax.grad(likelihood)(h),)


class Felt(NamedTuple):
    """Of some rows: squares of the gradients at each linear's outputs and tokens, both by class of tokens, and whether
    the gradients at the module's input are finite.
    """  # noqa: D205

    squares: dict[str, Any]
    tokens: Any
    finite: Any


@partial(jax.jit, static_argnames=("module", "columns"))
def _row_backward(
    params: Any, chunk: Chunk, gradient: jax.Array, *, module: Module, columns: tuple[tuple[str, int], ...]
) -> tuple[jax.Array, Felt]:
    """Pull rows' gradients back through a module.

    Returns the gradient at the input, and the gradients at the linears by class of tokens.
    """
    h, mask, _ = chunk
    back, felt = pulled(params, h, gradient, module, columns)
    classes = token_classes(h, mask)
    members = jnp.sum(jax.nn.one_hot(classes, CLASSES) * mask[..., None], axis=(0, 1))
    squares = {name: squares_by_class(g, classes) for name, g in felt.items()}
    return back, Felt(squares, members, jnp.all(jnp.isfinite(back)))


def pulled(
    params: Any, h: jax.Array, gradient: jax.Array, module: Module, columns: tuple[tuple[str, int], ...]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gradients at a module's input, and at the outputs `[B, T, N]` of each linear, where zero probes collect them."""

    def run(h: jax.Array, probes: dict[str, jax.Array]) -> jax.Array:
        return module.forward(params, h, probes).hidden

    probes = {name: jnp.zeros((*h.shape[:2], n), jnp.float32) for name, n in columns}
    _, pull = jax.vjp(run, h, probes)
    return pull(gradient)
