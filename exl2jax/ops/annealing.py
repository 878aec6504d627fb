"""Seeded simulated annealing of the bit allocation, as stock ExLlamaV2 describes it (docs/format.md 4)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

HOT, COLD, COOLING = 2.0, 1e-4, 0.995
PROPOSALS = 1000
RUNS = 80
MAX_UNITS = 2**30


class _State(NamedTuple):
    choice: jax.Array
    cost: jax.Array
    loss: jax.Array


def anneal(costs: np.ndarray, losses: np.ndarray, counts: np.ndarray, budget: int, seed: tuple[int, int]) -> np.ndarray:
    """Choices `[runs, slots]` of independent runs, each starting at option 0 everywhere.

    `costs [slots, options]` and `losses [runs, slots, options]` are padded beyond `counts [slots]`. A proposal is a
    uniform slot and option; it is legal when it keeps the cost within `budget` or lowers one that is over it, and is
    taken when it lowers the loss or by `exp(-rise / temperature)`. Costs are counted in units that fit int32: their
    greatest common divisor, or where that is too small a larger unit, costs rounded up so that none is over budget.
    """
    most = int(costs.max(axis=1).sum())
    unit = max(int(np.gcd.reduce(costs[costs > 0])), -(-most // MAX_UNITS))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), len(losses))
    steps = int(np.ceil(np.log(COLD / HOT) / np.log(COOLING)))
    scaled = jnp.asarray(-(-costs // unit), jnp.int32)
    limit = jnp.int32(min(budget // unit, MAX_UNITS))
    found = _runs(keys, scaled, jnp.asarray(losses, jnp.float32), jnp.asarray(counts), limit, steps=steps)
    return np.asarray(found)


@partial(jax.jit, static_argnames="steps")
def _runs(
    keys: jax.Array, costs: jax.Array, losses: jax.Array, counts: jax.Array, budget: jax.Array, *, steps: int
) -> jax.Array:
    run = jax.vmap(partial(_run, steps=steps), in_axes=(0, None, 0, None, None))
    return run(keys, costs, losses, counts, budget)


def _run(
    key: jax.Array, costs: jax.Array, losses: jax.Array, counts: jax.Array, budget: jax.Array, *, steps: int
) -> jax.Array:
    slots = costs.shape[0]

    def cool(step: jax.Array, state: _State) -> _State:
        temperature = HOT * COOLING**step
        draws = jax.random.uniform(jax.random.fold_in(key, step), (3, PROPOSALS))
        slot = jnp.minimum((draws[0] * slots).astype(jnp.int32), slots - 1)
        option = jnp.minimum((draws[1] * counts[slot].astype(jnp.float32)).astype(jnp.int32), counts[slot] - 1)
        # A rise is taken when draw < exp(-rise / temperature): compare rises with the drawn threshold instead.
        threshold = -temperature * jnp.log(draws[2])

        def propose(i: jax.Array, state: _State) -> _State:
            s, o = slot[i], option[i]
            cost = state.cost + costs[s, o] - costs[s, state.choice[s]]
            loss = state.loss + losses[s, o] - losses[s, state.choice[s]]
            legal = (cost <= budget) | ((state.cost > budget) & (cost < state.cost))
            take = legal & (loss - state.loss < threshold[i])
            return _State(
                state.choice.at[s].set(jnp.where(take, o, state.choice[s])),
                jnp.where(take, cost, state.cost),
                jnp.where(take, loss, state.loss),
            )

        return lax.fori_loop(0, PROPOSALS, propose, state)

    start = _State(jnp.zeros(slots, jnp.int32), jnp.sum(costs[:, 0]), jnp.sum(losses[:, 0]))
    return lax.fori_loop(0, steps, cool, start).choice
