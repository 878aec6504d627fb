"""Compile every program of a conversion for an absent CUDA device, and count seconds, launches and bytes.

    scripts/setup.sh gpu                                             once: .venv-gpu, 4.4 GB
    .venv-gpu/bin/python -m scripts.bench.programs RESULT.json       one block of Llama-7B by the preset `best`
    .venv-gpu/bin/python -m scripts.bench.programs RESULT.json --device rtx4090

The conversion runs dry: every program is traced and recorded, its results are ones, and nothing is computed. Its size
therefore costs nothing, and the package makes the choices that it makes on the device, its GPU kernels included. All
layers of a model have the same shapes, so one block and the head hold all programs. Each is then compiled for the
device that `h100.txtpb` describes, or another file of that kind. This replaces private modules of JAX, so it is a
script and not part of the package.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Set before JAX looks at them: no driver is needed, and no product may take a path of lower precision than asked.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.core import jaxpr_as_fun
from jax.sharding import SingleDeviceSharding

from exl2jax import ConversionConfig, convert
from exl2jax.stream.progress import RunControl
from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.bench.launches import Launches, launches
from scripts.bench.traffic import Meter, replaced

DEVICES = {"h100": "pallas", "rtx4090": "fused"}
"""Devices that a file beside this one describes, with the inner loops that the package takes on them."""


class Program(NamedTuple):
    """A program that a conversion compiled: what JAX calls it, its jaxpr, and how often it was called."""

    name: str
    jaxpr: Any
    calls: list[int]


@contextmanager
def dry(meter: Meter, device: str = "h100") -> Iterator[list[Program]]:
    """Record every program instead of running it, as on a device; its results are ones."""
    from jax._src import pjit

    from exl2jax.pallas import dispatch

    implementation = DEVICES[device] if DEVICES[device] in dispatch.IMPLEMENTATIONS else "xla"  # of an older checkout
    programs: dict[Any, Program] = {}
    ones: dict[Any, jax.Array] = {}

    def record(run: Any) -> Any:
        def call(*args: Any, jaxpr: Any, name: str, **options: Any) -> Any:
            if any(_is_key(a.dtype) for a in (*jaxpr.in_avals, *jaxpr.out_avals)):
                return run(*args, jaxpr=jaxpr, name=name, **options)  # keys of random numbers are cheap
            program = programs.setdefault(jaxpr, Program(name, jaxpr, [0]))
            program.calls[0] += 1
            meter.note("calls")
            meter.note(f"program {list(programs).index(jaxpr)}")
            meter.note("bytes up", sum(x.nbytes for x in args if isinstance(x, np.ndarray)))
            return [answer(aval) for aval in jaxpr.out_avals], None, None, ()

        return call

    def answer(aval: Any) -> jax.Array:
        key = (aval.shape, aval.dtype)
        if key not in ones:
            ones[key] = jax.device_put(np.ones(aval.shape, aval.dtype))
        return ones[key]

    with ExitStack() as stack:
        stack.enter_context(replaced(pjit, "_pjit_call_impl_python", record))
        stack.enter_context(replaced(pjit, "_get_fastpath_data", lambda _: lambda *args, **options: None))
        stack.enter_context(replaced(jax, "default_backend", lambda _: lambda: "gpu"))
        stack.enter_context(replaced(dispatch, "choose_implementation", lambda _: lambda device=None: implementation))
        stack.enter_context(replaced(dispatch, "_mosaic_device", lambda _: lambda device: implementation == "pallas"))
        found: list[Program] = []
        yield found
        found.extend(programs.values())


def _is_key(dtype: Any) -> bool:
    """Whether arrays hold keys of random numbers, which NumPy has no type for."""
    return not isinstance(dtype, np.dtype)


class Compiled(NamedTuple):
    """A program compiled for the device: CPU seconds of lowering and compiling, temporary bytes, launches."""

    name: str
    lowering: float
    compiling: float
    temporary: int
    launches: Launches
    calls: int
    arguments: str


def compile_for(program: Program, device: Any) -> Compiled:
    """Lower and compile one program for a device that is not there."""
    where = SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for a in program.jaxpr.in_avals]
    begun = cpu_seconds()
    lowered = jax.jit(jaxpr_as_fun(program.jaxpr)).trace(*args).lower()
    between = cpu_seconds()
    compiled = lowered.compile()
    done, memory = cpu_seconds(), compiled.memory_analysis()
    return Compiled(
        name=program.name,
        lowering=between - begun,
        compiling=done - between,
        temporary=memory.temp_size_in_bytes if memory else 0,
        launches=launches(compiled.as_text() or ""),
        calls=program.calls[0],
        arguments=" ".join(a.str_short() for a in program.jaxpr.in_avals)[:200],
    )


def cpu_seconds() -> float:
    """Seconds that this process and the compilers it started have used of the cores."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def recorded(given: argparse.Namespace) -> tuple[list[Program], Meter]:
    """Convert a model of random weights dry: its programs, and what was counted in every module."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder, dry(meter, given.device) as programs:
        model = write_tiny_llama(
            Path(folder) / "model",
            hidden_size=given.width,
            intermediate_size=given.inner,
            num_layers=given.layers,
            num_heads=given.heads,
            num_kv_heads=given.heads,
            vocab_size=given.vocabulary,
            max_position_embeddings=given.length,
            dtype="bfloat16",
        )
        config = ConversionConfig(
            in_dir=model,
            out_dir=Path(folder) / "work",
            compile_full=Path(folder) / "exl2",
            cal_dataset="random",
            bits=4.0,
            dataset_rows=given.rows,
            measurement_rows=given.rows,
            length=given.length,
            measurement_length=given.length,
        )
        convert(config, RunControl(progress=meter))
    return programs, meter


def main(argv: Sequence[str] | None = None) -> int:
    """Record, compile and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="h100", choices=DEVICES, help="device to compile for")
    parser.add_argument("--width", type=int, default=4096, help="hidden size")
    parser.add_argument("--inner", type=int, default=11008, help="hidden size of the MLP")
    parser.add_argument("--heads", type=int, default=32, help="attention heads")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens of the vocabulary")
    parser.add_argument("--layers", type=int, default=1, help="blocks")
    parser.add_argument("--rows", type=int, default=2, help="rows of both calibrations")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--only-record", action="store_true", help="compile nothing")
    given = parser.parse_args(argv)
    begun = time.perf_counter()
    programs, meter = recorded(given)
    found: dict[str, Any] = {
        "programs": len(programs),
        "recording seconds": time.perf_counter() - begun,
        "modules": meter.modules,
    }
    print(f"{len(programs)} programs recorded in {found['recording seconds']:.0f} s", flush=True)
    if not given.only_record:
        target = (Path(__file__).parent / f"{given.device}.txtpb").read_text()
        topology = topologies.get_topology_desc(given.device, "cuda", target_config=target, topology="1x1x1")
        compiled = []
        for program in programs:
            try:
                compiled.append(compile_for(program, topology.devices[0])._asdict())
            except Exception as e:  # a program that does not compile is a result too, and the others are still compiled
                compiled.append({"name": program.name, "failed": str(e)[:500]})
            given.result.write_text(json.dumps(found | {"compiled": compiled}, indent=1))
        good = [c for c in compiled if "failed" not in c]
        total = sum(c["lowering"] + c["compiling"] for c in good)
        kind = topology.devices[0].device_kind
        print(f"{len(good)} of {len(programs)} programs compiled for {kind} in {total:.0f} CPU s")
        return int(len(good) < len(programs))
    given.result.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
