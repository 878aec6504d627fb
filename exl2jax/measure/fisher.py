"""Fisher information of every linear's output columns: how much the model's predictions feel an error there.

For a small error `e` added to the outputs of a linear, the expected KL divergence of the next-token distributions is
`1/2 e^T F e` with `F` the Fisher information, the second moment of the gradient of the log likelihood under labels
sampled from the model itself. Its diagonal needs one forward and one backward pass over a few rows: two scans, the
second one over the modules in reverse, each recomputed from its stored input, so that one module is resident at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.errors import NumericalError
from exl2jax.measure.inputs import InputStack
from exl2jax.models import Decoder, LinearSpec, ModuleSpec
from exl2jax.stream.blocks import Block, Piece, joined
from exl2jax.stream.chunks import full_mask, single_rows, token_chunks
from exl2jax.stream.devices import on_all_devices, to_host
from exl2jax.stream.scan import GRADIENT, Carry
from exl2jax.stream.token_classes import CLASSES, TOKENS, class_weights, squares_by_class, token_classes

type Columns = Mapping[str, np.ndarray]
"""Mean squared gradient at each output column, `[N]` float32 by linear name; where tokens have weights these are
taken out of it, and stand beside it under the name with `TOKENS` after it."""


def columns_by_key(spec: ModuleSpec, columns: Columns) -> dict[str, np.ndarray]:
    """What there is of a module's linears, by their keys: as it is stored."""
    return {x.key + part: columns[x.name + part] for x, part in _parts(spec) if x.name + part in columns}


def columns_by_name(spec: ModuleSpec, known: Mapping[str, np.ndarray]) -> Columns:
    """The columns of a module from those by key of a whole model."""
    return {x.name + part: known[x.key + part] for x, part in _parts(spec) if x.key + part in known}


def _parts(spec: ModuleSpec) -> Iterator[tuple[LinearSpec, str]]:
    return product(spec.linears, ("", TOKENS))


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardStep:
    """The step of the backward scan over `tokens` tokens: gradients at the module's input, Fisher of its linears.

    `weigh` asks for weights of tokens by class; `mask [R, T]` leaves out padding there, whose gradients are zero.
    """

    decoder: Decoder
    stack: InputStack
    tokens: int
    mask: np.ndarray | None = None
    weigh: bool = False

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, Columns]:
        """Pull the gradients `[R, T, D]` back through a module; those through its pieces add up."""
        pull = partial(self._pull, states=self.stack.read(block.spec), gradient=carry[GRADIENT])
        out, found = reduce(joined, map(pull, block.pieces(self.decoder)))
        if not np.isfinite(out).all():
            raise NumericalError(
                f"{block.spec.key}: the gradients hold NaN or infinity; use `preset` stock, which needs none"
            )
        return {GRADIENT: out}, found

    def _pull(self, piece: Piece, states: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The gradients through a piece, row by row, and the Fisher information of its linears."""
        columns = tuple((linear.name, linear.columns) for linear in piece.spec.linears)
        pull = partial(_row_backward, decoder=piece.decoder, kind=piece.spec.kind, columns=columns)
        params, out, mask = on_all_devices(piece.params), np.empty_like(gradient), full_mask(states, self.mask)
        counts, totals = np.zeros(CLASSES), {name: np.zeros((CLASSES, n), np.float64) for name, n in columns}
        for chunk in single_rows(len(states)):
            back, squares, members = pull(params, chunk.take(states), chunk.take(gradient), chunk.take(mask))
            chunk.put(out, back)
            counts += to_host(members)
            for name, value in squares.items():
                totals[name] += to_host(value).astype(np.float64)
        return out, self._columns(piece.spec, totals, counts)

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


def head_gradients(
    decoder: Decoder, params: Any, states: np.ndarray, mask: np.ndarray | None, *, seed: int
) -> np.ndarray:
    """Gradients `[R, T, D]` of the log likelihood of sampled labels at the final states, padding left out.

    Labels are drawn from the model's own distributions, tokens in chunks (`token_chunks`), chunk `i` with the key
    `fold_in(seed, i)`.
    """
    tokens, weights = states.reshape(-1, states.shape[-1]), full_mask(states, mask).reshape(-1)
    params, out = on_all_devices(jax.device_put(params)), np.empty_like(tokens)
    for i, chunk in enumerate(token_chunks(len(tokens), params["lm_head"]["kernel"].shape[1])):
        key = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), i)))
        chunk.put(out, _head_gradient(decoder, params, chunk.take(tokens), chunk.take(weights), key))
    return out.reshape(states.shape)


@partial(jax.jit, static_argnums=0)
def _head_gradient(decoder: Decoder, params: Any, h: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
    """Gradients of a chunk of tokens; `key` as data, which lies on any devices."""

    def likelihood(h: jax.Array) -> jax.Array:
        logits = decoder.logits(params, h[None])[0]
        labels = jax.random.categorical(jax.random.wrap_key_data(key), jax.lax.stop_gradient(logits))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return jnp.sum(picked * mask)

    return jax.grad(likelihood)(h)


@partial(jax.jit, static_argnames=("decoder", "kind", "columns"))
def _row_backward(
    params: Any,
    h: jax.Array,
    gradient: jax.Array,
    mask: jax.Array,
    *,
    decoder: Decoder,
    kind: str,
    columns: tuple[tuple[str, int], ...],
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Pull a row's gradient back through a module; zero probes at the linears' outputs collect theirs.

    Returns the gradient at the input, the squares of those of the linears and the number of tokens, by class of tokens.
    """

    def run(h: jax.Array, probes: dict[str, jax.Array]) -> jax.Array:
        return decoder.forward(kind, params, h, probes).hidden

    probes = {name: jnp.zeros((*h.shape[:2], n), jnp.float32) for name, n in columns}
    _, pull = jax.vjp(run, h, probes)
    back, felt = pull(gradient)
    classes = token_classes(h, mask)
    members = jnp.sum(jax.nn.one_hot(classes, CLASSES) * mask[..., None], axis=(0, 1))
    return back, {name: squares_by_class(g, classes) for name, g in felt.items()}, members
