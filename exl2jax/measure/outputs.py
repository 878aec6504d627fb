"""Gradients at the linears' outputs on some tokens: they tell which outputs go together.

Few tokens outweigh all others, the first of a row above all (`exl2jax.stream.token_classes`): the weights of tokens
take care of them in the Hessians of inputs. Here only ordinary tokens are kept, and no more of them than a Hessian of
outputs needs: the Hessians themselves would take more room than the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from exl2jax.measure.fisher import GradientStep, pulled, require_finite_gradients
from exl2jax.models import LinearSpec, Module
from exl2jax.quantize.outputs import SAMPLES, OutputGradients
from exl2jax.stream.blocks import Piece
from exl2jax.stream.devices import on_all_devices, on_one_device
from exl2jax.stream.streams import Stream, fold, read, whole
from exl2jax.stream.token_classes import ordinary_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputStep(GradientStep):
    """The step that hands the gradients at the outputs of each linear to `write`; `wanted` says of which."""

    write: Callable[[LinearSpec, OutputGradients], None]
    wanted: Callable[[LinearSpec], bool]

    def _pull(self, piece: Piece, states: Stream, gradient: Stream) -> tuple[Stream, dict[str, Any]]:
        length, linears = states.shape[0], [x for x in piece.spec.linears if self.wanted(x)]
        stride = -(-states.count * length // SAMPLES)
        columns = tuple((x.name, x.columns) for x in piece.spec.linears)
        names = tuple(x.name for x in linears)
        program = partial(_row_samples, module=piece.module, columns=columns, names=names, stride=stride)
        params, out = on_all_devices(piece.params), piece.target(gradient)
        kept = [states.like(-(-length // stride), x.columns) for x in linears]

        def pull(
            finite: jax.Array, h: jax.Array, mask: jax.Array, back: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            moved, fine, samples = program(params, h, mask, back)
            return finite & fine, (moved, *samples)

        start = on_all_devices(jnp.bool_(True))
        finite = on_one_device(fold(pull, start, (states, self.rows.mask, gradient), (out, *kept)))
        finite, parts = read((finite, [x.parts() if x.resident else [] for x in kept]))
        require_finite_gradients([finite], piece.spec)
        for linear, stream, of_rows in zip(linears, kept, parts, strict=True):
            samples = whole(stream.spans, of_rows) if of_rows else stream.array()
            self.write(linear, OutputGradients.of(samples.reshape(-1, linear.columns)))
        return out, {}


@partial(jax.jit, static_argnames=("module", "columns", "names", "stride"))
def _row_samples(
    params: Any,
    h: jax.Array,
    mask: jax.Array,
    gradient: jax.Array,
    *,
    module: Module,
    columns: tuple[tuple[str, int], ...],
    names: tuple[str, ...],
    stride: int,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Pull rows' gradients back through a module: those at its input, whether they are finite, and at its linears.

    Of the linears `names` every `stride`-th token, zero where it is not an ordinary one.
    """
    back, felt = pulled(params, h, gradient, module, columns)
    chosen = ordinary_tokens(h, mask)[:, ::stride, None]
    return back, jnp.all(jnp.isfinite(back)), [felt[name][:, ::stride] * chosen for name in names]
