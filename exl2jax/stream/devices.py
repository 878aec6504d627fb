"""Several devices: rows of a chunk spread over them, and independent pieces of work dealt out among them.

`spread` opens a scope; within it `row_sharding` says how rows lie, and everything that streams states follows: a
chunk's rows are cut over the devices, parameters are on all of them, and XLA sums Hessians across. Over several
processes (`jax.distributed`) every process holds all states and takes part in every sum. Outside the scope, or with
one device, nothing is placed at all.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from exl2jax.errors import JobError, SettingsError
from exl2jax.ops import Products

ROWS = "rows"
"""Name of the mesh's one axis."""

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Variables that make a command one of several processes; JAX finds the last two by itself on a known cluster."""

PROCESSOR = Path("/proc/cpuinfo")
"""Linux lists what the processor can do here."""

_FAST_BFLOAT16 = "amx_bf16"
"""Flag of processors that multiply matrices of bfloat16 several times as fast as those of float32."""

_rows: ContextVar[NamedSharding | None] = ContextVar("rows", default=None)


def join_processes() -> None:
    """Become one of several processes where the environment says so; `SettingsError` where that fails."""
    if COORDINATOR not in os.environ or jax.distributed.is_initialized():
        return
    try:
        count, index = (int(os.environ[name]) if name in os.environ else None for name in (COUNT, INDEX))
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, RuntimeError) as e:
        raise SettingsError(
            f"{COORDINATOR} is {os.environ[COORDINATOR]!r}, but the processes do not come together: it must be "
            f"HOST:PORT of the first one, {COUNT} and {INDEX} numbers ({e})"
        ) from e


@contextmanager
def spread(count: int | None = None) -> Iterator[None]:
    """Use `count` devices, all of them where it is None; `SettingsError` where there are fewer.

    With several processes only all devices will do: each process has to take part.
    """
    there = jax.devices()
    wanted = len(there) if count is None else count
    if not 1 <= wanted <= len(there):
        raise SettingsError(f"`devices` is {wanted}; this machine shows {len(there)} ({there[0].platform})")
    if jax.process_count() > 1 and wanted != len(there):
        raise SettingsError(f"`devices` is {wanted}; a run over {jax.process_count()} processes takes all {len(there)}")
    mesh = Mesh(np.asarray(there[:wanted]), (ROWS,))
    token = _rows.set(NamedSharding(mesh, PartitionSpec(ROWS)) if wanted > 1 else None)
    try:
        yield
    finally:
        _rows.reset(token)


def row_sharding() -> NamedSharding | None:
    """How the rows of a chunk lie on the devices; None for one device."""
    return _rows.get()


def row_devices() -> int:
    """How many devices the rows of a chunk are cut over."""
    sharding = _rows.get()
    return 1 if sharding is None else sharding.mesh.size


def local_devices() -> Sequence[Any]:
    """The devices of this process to deal independent work to; the default one where rows are not cut."""
    sharding = _rows.get()
    return [jax.config.jax_default_device] if sharding is None else list(sharding.mesh.local_devices or ())


def place_rows(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Rows `[R, ...]` cut over the devices, R a multiple of their number; the other axes whole."""
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def on_all_devices[T](tree: T) -> T:
    """Arrays as they are on one device; on several, each of them whole on every one."""
    sharding = _rows.get()
    if sharding is None:
        return tree
    whole = _replicated(sharding.mesh)

    def place(leaf: Any) -> jax.Array:
        host = to_host(leaf)
        return jax.make_array_from_callback(host.shape, whole, lambda index: host[index])

    return jax.tree.map(place, tree)


def on_one_device[T](tree: T) -> T:
    """Arrays as they are on one device; those that lie on several, free to be used on any one of them."""
    return tree if _rows.get() is None else jax.tree.map(lambda leaf: jax.device_put(to_host(leaf)), tree)


def to_host(value: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array, wherever its parts lie."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    assert isinstance(value.sharding, NamedSharding)  # `place_rows` makes them, and results keep the kind
    return np.asarray(_gather(_replicated(value.sharding.mesh))(value))


def natural_products() -> Products:
    """The products that the default device is made for: bfloat16 on a processor with AMX, else float32.

    On a GPU float32 stands for the device's default precision, which is TF32 on NVIDIA's.
    """
    if jax.default_backend() != "cpu" or not PROCESSOR.exists():
        return Products.FLOAT32
    flags = PROCESSOR.read_text(encoding="utf-8", errors="replace")
    return Products.BFLOAT16 if _FAST_BFLOAT16 in flags.split() else Products.FLOAT32


def require_agreement(what: str) -> None:
    """Raise `JobError` unless every process says the same, as they must before they compute together."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(what.encode()[:256].ljust(256), np.uint8)
    others = multihost_utils.process_allgather(own)
    if (others != own).any():
        lines = " and ".join(dict.fromkeys(bytes(line).decode(errors="replace").strip() for line in others))
        raise JobError(
            f"the processes of this run stand at different places ({lines}); start all of them over with `no_resume`"
        )


def as_first_process(flag: bool) -> bool:
    """The first process's answer, so that all of them save and stop at the same block."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def _replicated(mesh: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@cache
def _gather(whole: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=whole)
