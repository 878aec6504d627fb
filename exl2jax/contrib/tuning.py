"""Tuning of what the format leaves free once a module's linears are quantized."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from exl2jax.variants import variant
from exl2jax.variants.tuning import Tunable, Tuned


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """At most `steps` steps of `learning_rate`, falling by a cosine; `held_out` of the rows judge every `every` steps.

    `patience` judgements without a gain end it.
    """

    steps: int = 32
    learning_rate: float = 1e-3
    held_out: float = 0.25
    every: int = 8
    patience: int = 2

    def __post_init__(self) -> None:
        """Refuse what takes no step or holds nothing out."""
        if min(self.steps, self.every, self.patience) < 1 or not self.learning_rate > 0:
            raise ValueError("steps, every, patience and learning_rate must be positive")
        if not 0 < self.held_out < 1:
            raise ValueError("held_out must lie between 0 and 1")


@variant("tuning", "adam", AdamSettings)
def adam(block: Tunable, settings: AdamSettings) -> Tuned:
    """Adam (arXiv:1412.6980) on the block's output error, the best values on held-out rows kept (as norms and scales
    are tuned after quantization in AQLM, arXiv:2401.06118, section 3.4).

    Measured: nothing yet on a whole model.
    """  # noqa: D205
    held = min(max(1, round(settings.held_out * len(block.rows))), len(block.rows) - 1)
    judges, train = block.rows[:held], block.rows[held:]
    batch = min(block.batch, len(train))
    values, best, waited = block.start, None, 0
    before = after = block.error(values, judges)
    state, step = optax.scale_by_adam().init(values), 0
    while step < settings.steps and waited < settings.patience:
        rows = train[(step * batch + np.arange(batch)) % len(train)]
        rate = settings.learning_rate * 0.5 * (1 + np.cos(np.pi * step / settings.steps))
        values, state = _step(values, state, block.gradient(values, rows), np.float32(rate))
        step += 1
        if step % settings.every == 0 or step == settings.steps:
            error = block.error(values, judges)
            waited = 0 if error < after else waited + 1
            best, after = (values, error) if error < after else (best, after)
    return Tuned(best, before, after, step)


@jax.jit
def _step(values: Any, state: Any, gradient: Any, rate: jax.Array) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in integers
        change, state = optax.scale_by_adam().update(gradient, state)
    return jax.tree.map(lambda v, c: v - rate * c, values, change), state
