"""Measure the rates of the machine, and time a run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.estimate import Work
from exl2jax.testing.compilations import compilations

CHAIN = 64
"""Length of the chain of products and sums by which the element-wise rate is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Seconds of one run, on the wall and of the process's cores, and those that XLA compiled before it."""

    seconds: float
    cpu_seconds: float
    compile_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates of one core, or of a whole GPU: operations per second of float32 matrix products and element-wise work,
    and bytes per second of a copy.
    """  # noqa: D205

    products: float
    elementwise: float
    bandwidth: float

    def limit(self, products: float, elementwise: float = 0.0, moved: float = 0.0) -> float:
        """Seconds that work takes at these rates: products and element-wise work one after the other, at least the
        time of moving the bytes.
        """  # noqa: D205
        return max(products / self.products + elementwise / self.elementwise, moved / self.bandwidth)

    def limit_of(self, work: Work, moved: float = 0.0) -> float:
        """Seconds that counted work takes, all its products being float32 ones."""
        return self.limit(work.products, work.elementwise, moved)


def timed(run: Callable[[], Any], repeat: int, first: Callable[[], Any] | None = None) -> Spent:
    """The fastest of `repeat` runs, after one run of `first` (default: `run`), which compiles."""
    with compilations() as compiling:
        jax.block_until_ready((first or run)())
    wall, cpu = [], []
    for _ in range(repeat):
        begun, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    return Spent(seconds=min(wall), cpu_seconds=min(cpu), compile_seconds=sum(compiling))


def plain_seconds(run: Callable[[], Any]) -> float:
    """Core seconds of one run of a plain loop, which compiles nothing."""
    return timed(run, 1, first=lambda: None).cpu_seconds


def cost(spent: Spent) -> float:
    """The seconds that count: those of the cores, so that other load matters less; on a GPU those on the wall."""
    return spent.seconds if jax.default_backend() == "gpu" else spent.cpu_seconds


def measure_rates(repeat: int = 5) -> Rates:
    """Measure the three rates; the products take the faster of XLA and NumPy's library.

    The element-wise chain runs on a block that a core keeps in its cache; on a GPU on one that fills the device.
    """
    size, block, steps = (8192, (8192, 8192), 10) if jax.default_backend() == "gpu" else (2048, (97, 192), 200)
    a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), jnp.float32)
    times = [cost(timed(lambda: _product(a, a), repeat))]
    if jax.default_backend() == "cpu":
        host = np.asarray(a)
        times.append(cost(timed(lambda: host @ host, repeat)))
    chained = jnp.ones(block, jnp.float32)
    chain = cost(timed(lambda: _chain(chained, steps), repeat))
    large = jnp.ones((64 << 20,), jnp.float32)
    copy = cost(timed(lambda: _copy(large), repeat))
    return Rates(
        products=2 * size**3 / min(times),
        elementwise=2 * CHAIN * steps * chained.size / chain,
        bandwidth=2 * large.nbytes / copy,
    )


@jax.jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return x + 1


@jax.jit
def _chain(x: jax.Array, steps: int | jax.Array) -> jax.Array:
    """A product and a sum on cached data, `CHAIN` times over in registers, `steps` times."""

    def step(_: Any, x: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x = x * 0.999 + 0.001
        return x

    return lax.fori_loop(0, steps, step, x)
