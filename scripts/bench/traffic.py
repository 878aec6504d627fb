"""Count what a conversion asks of its device: programs, calls, blocking reads and bytes that go up, module by module.

    python scripts/bench/traffic.py RESULT.json MODEL [--calls]

runs one conversion by the preset `best` in this process and writes what was counted as JSON. The package that Python
finds first is counted, so PYTHONPATH chooses the checkout; this file imports nothing else of the repository.
JAX reports compilations itself. It does not report calls and reads: they are counted by replacing functions of JAX's
private modules, which is why this is a script and not a part of the package.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from exl2jax import ConversionConfig, convert
from exl2jax.stream.progress import RunControl

PROGRAMS, CALLS, READS, TIME = "programs", "calls", "reads", "seconds"
UP, DOWN = "bytes up", "bytes down"
SECONDS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing seconds",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering seconds",
    "/jax/core/compile/backend_compile_duration": "compiling seconds",
}
"""Events of JAX by their names here; the last one also counts programs, compiled or read from the cache."""


type Counted = tuple[str, str, dict[str, float]]
"""A stage, the key of a module in it (empty for counts that belong to none), and the counts."""


class Meter:
    """Progress that keeps the counts of every module of every stage, in the order of the run.

    With `kept` it writes them to this file after every module, so that an interrupted run leaves its counts.
    """

    def __init__(self, kept: Path | None = None) -> None:
        """Count from nothing."""
        self.modules: list[Counted] = []
        self.names: Counter[str] = Counter()
        self._kept, self._stage, self._begun = kept, "start", time.perf_counter()
        self._here, self._lock = Counter[str](), threading.Lock()

    def note(self, what: str, amount: float = 1) -> None:
        """Add to what is counted of the module that is running."""
        with self._lock:
            self._here[what] += amount  # type: ignore[assignment]

    def start(self, stage: str, total: int, done: int) -> None:
        """Begin a stage; counts before its first module belong to no module."""
        self._close("")
        self._stage = stage

    def step(self, message: str) -> None:
        """Close the counts of a module; its key begins the message."""
        self._close(message.partition(":")[0])

    def finish(self) -> None:
        """End a stage; counts after its last module belong to no module."""
        self._close("")

    def _close(self, module: str) -> None:
        now = time.perf_counter()
        with self._lock:
            self.modules.append((self._stage, module, dict(self._here) | {TIME: round(now - self._begun, 4)}))
            self._here, self._begun = Counter(), now
        if self._kept is not None:
            self._kept.write_text(json.dumps({"modules": self.modules}))


class Outermost(threading.local):
    """Durations of calls that may lie in each other, each without those inside it, which end before it does."""

    def __init__(self) -> None:
        """Nothing has ended yet in this thread."""
        self._ended: list[tuple[float, float]] = []

    def own(self, duration: float, now: float) -> float:
        """The seconds of a call that ends `now` after `duration`, those inside it taken off, which were counted."""
        begun, inside = now - duration, 0.0
        while self._ended and self._ended[-1][0] >= begun:
            inside += self._ended.pop()[1]
        self._ended.append((begun, duration))
        return duration - inside


@contextmanager
def compiling(meter: Meter) -> Iterator[None]:
    """Count programs, and the seconds of tracing, lowering and compiling them."""
    nested = {event: Outermost() for event in SECONDS}

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        what = SECONDS.get(event)
        if what is None:
            return
        meter.note(what, nested[event].own(duration_secs, time.perf_counter()))
        if what == "compiling seconds":
            meter.note(PROGRAMS)
            meter.names[str(about.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by `make(attribute)` within a `with` block."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def traffic(meter: Meter) -> Iterator[None]:
    """Count executable calls, arrays that go up, and reads that wait for the device."""
    from jax._src import pjit
    from jax._src.interpreters import pxla

    def up(values: Any) -> None:
        meter.note(UP, sum(x.nbytes for x in jax.tree.leaves(values) if isinstance(x, np.ndarray)))

    def down(found: Sequence[jax.Array]) -> None:
        meter.note(READS)
        meter.note(DOWN, sum(x.nbytes for x in found))

    def call(before: Any) -> Any:
        def run(self: Any, *args: Any) -> Any:
            meter.note(CALLS)
            up(args)
            return before(self, *args)

        return run

    def put(before: Any) -> Any:
        def run(values: Any, *args: Any, **options: Any) -> Any:
            up(values)
            return before(values, *args, **options)

        return run

    def read(before: Any) -> Any:
        def run(value: Any, *args: Any, **options: Any) -> Any:
            found = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, array)]
            if found:
                down(found)
            return before(value, *args, **options)

        return run

    array = type(jax.numpy.zeros(()))
    with ExitStack() as stack:
        # Without this JAX calls an executable past Python from its second call on.
        stack.enter_context(replaced(pjit, "_get_fastpath_data", lambda _: lambda *args, **options: None))
        stack.enter_context(replaced(pxla.ExecuteReplicated, "__call__", call))
        for name in ("device_put", "device_get"):
            stack.enter_context(replaced(jax, name, put if name == "device_put" else read))
        for name in ("asarray", "array"):
            stack.enter_context(replaced(np, name, read))
        for name in ("__bool__", "__float__", "__int__"):
            stack.enter_context(replaced(array, name, read))
        yield


def counted(config: ConversionConfig, *, calls: bool) -> dict[str, Any]:
    """Run a conversion: what was counted in every module, names of the programs, seconds on the wall and of cores."""
    meter = Meter()
    begun, used = time.perf_counter(), time.process_time()
    with traffic(meter) if calls else ExitStack(), compiling(meter):
        convert(config, RunControl(progress=meter))
    meter.finish()
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": peak_bytes(),
        "modules": meter.modules,
        "names": dict(meter.names.most_common()),
    }


def peak_bytes() -> int:
    """The peak of this process's resident bytes, 0 where the kernel does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def set_up() -> None:
    """Set up the process as the command does; programs are kept in the folder of JAX_COMPILATION_CACHE_DIR."""
    gc.freeze()
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a model and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("model", type=Path, help="model to convert")
    parser.add_argument("--calls", action="store_true", help="count calls and reads too, which slows the run down")
    parser.add_argument("--preset", default="best", help="recipe of the conversion")
    parser.add_argument("--bits", type=float, default=4.0, help="target bits per weight")
    parser.add_argument("--rows", type=int, default=4, help="calibration rows")
    parser.add_argument("--measurement-rows", type=int, default=2, help="measurement rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    given = parser.parse_args(argv)
    set_up()
    with tempfile.TemporaryDirectory() as folder:
        config = ConversionConfig(
            in_dir=given.model,
            out_dir=Path(folder) / "work",
            compile_full=Path(folder) / "exl2",
            bits=given.bits,
            dataset_rows=given.rows,
            measurement_rows=given.measurement_rows,
            length=given.length,
            measurement_length=given.length,
            preset=given.preset,
        )
        found = counted(config, calls=given.calls)
    given.result.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
