"""Measure the machine, then operations, parts of a block and both passes, against the limit that their shapes set.

The limit is what the counted work takes at the measured rates. Ratios are of core seconds, so that they hold on a busy
machine; on a GPU they are of seconds on the wall. Beside each stands a plain NumPy loop of the stock algorithm.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from exl2jax.estimate.work import factor_work, gptq_work
from exl2jax.models import HFModel, open_model
from exl2jax.ops import HessianFactor, Kernels, accumulate_hessian, factorize, gptq, pack_codes
from exl2jax.pallas import kernels_for
from exl2jax.qparams import q
from scripts.bench.parts import parts
from scripts.bench.plain import plain_gptq, plain_pack
from scripts.bench.rates import Rates, Spent, cost, measure_rates, plain_seconds, timed
from scripts.bench.stages import PLAIN_COLUMNS, PassSizes, measurement, plain_pass, quantization

SIZES = ((576, 576), (576, 1536), (1536, 576), (4096, 4096), (4096, 11008), (11008, 4096))
GPU_SIZES = (*SIZES[3:], (8192, 8192), (8192, 28672), (28672, 8192))
WIDTHS = {"3/2": q("3/2", ".1/.9", "64"), "4": q("4", "1", "128"), "8": q("8", "1", "128")}
TOKENS = 2048

BLOCK = 2
"""Modules of a block: attention and MLP. The first block compiles what all of them need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the table. `limit_seconds` and `ratio` are of the seconds that count (core seconds on a CPU)."""

    name: str
    seconds: float
    cpu_seconds: float
    limit_seconds: float
    ratio: float
    plain_seconds: float | None
    compile_seconds: float


def row(name: str, spent: Spent, limit: float, plain: float | None = None) -> Row:
    """The line of a timed run."""
    return Row(
        name=name,
        seconds=spent.seconds,
        cpu_seconds=spent.cpu_seconds,
        limit_seconds=limit,
        ratio=cost(spent) / limit,
        plain_seconds=plain,
        compile_seconds=spent.compile_seconds,
    )


def operations(
    rates: Rates, sizes: Sequence[tuple[int, int]], plain: bool, kernels: dict[str, Kernels]
) -> Iterator[Row]:
    """Hessian, factor, GPTQ and packing at every size."""
    rng = np.random.default_rng(0)
    for k in dict.fromkeys(k for k, _ in sizes):
        x = jnp.asarray(rng.standard_normal((TOKENS, k)), jnp.float32)
        zero = jnp.zeros((k, k), jnp.float32)
        add = jax.jit(accumulate_hessian)
        spent = timed(lambda add=add, z=zero, x=x: add(z, x), 3)
        host = np.asarray(x)
        slow = plain_seconds(lambda h=host: h.T @ h) if plain else None
        yield row(f"hessian {k}", spent, rates.limit(TOKENS * k * k, moved=8 * k * k), slow)
        h = add(zero, x)
        spent = timed(lambda h=h: factorize(h), 2)
        yield row(
            f"factorize {k}", spent, rates.limit_of(factor_work(k)), _plain_factor(np.asarray(h)) if plain else None
        )
        factor = factorize(h)
        for n in (n for size, n in sizes if size == k):
            w = jnp.asarray(0.05 * rng.standard_normal((k, n)), jnp.float32)
            yield from _matrix(rates, w, factor, plain, kernels)


def _matrix(
    rates: Rates, w: jax.Array, factor: HessianFactor, plain: bool, kernels: dict[str, Kernels]
) -> Iterator[Row]:
    """GPTQ and packing of one matrix."""
    k, n = w.shape
    work = gptq_work(k, n)
    for width, setting in WIDTHS.items():
        slow = _plain_matrix(w, factor, setting.group_size[-1], setting.bits[-1]) if plain else None
        for name, chosen in kernels.items():
            run = partial(gptq, w, factor, setting.groups(k), chosen)
            label = f"gptq {k}x{n} {width} bits" + (f" {name}" if len(kernels) > 1 else "")
            yield row(label, timed(lambda run=run: run().weight, 2), rates.limit_of(work), slow)
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 16, (k, n)), jnp.uint8)
    spent = timed(lambda: pack_codes(codes, bits=4), 3)
    host = np.asarray(codes)
    slow = plain_seconds(lambda: plain_pack(host, 4)) if plain else None
    yield row(f"pack {k}x{n} 4 bits", spent, rates.limit(0.0, moved=1.5 * k * n), slow)


def _plain_factor(h: np.ndarray) -> float:
    """Core seconds of an inverse and two Cholesky factorizations."""
    damped = h + 0.12 * np.mean(np.diagonal(h)) * np.eye(len(h), dtype=np.float32)

    def run() -> np.ndarray:
        half = np.linalg.inv(np.linalg.cholesky(damped))
        return np.linalg.cholesky((half.T @ half)[::-1, ::-1])

    return plain_seconds(run)


def _plain_matrix(w: jax.Array, factor: HessianFactor, size: int, bits: int) -> float:
    """Core seconds of the plain loop, timed on some columns and scaled to all."""
    part, u = np.asarray(w[factor.perm][:, :PLAIN_COLUMNS]), np.asarray(factor.u)
    return plain_seconds(lambda: plain_gptq(part, u, size, bits)) * w.shape[1] / part.shape[1]


def stages(rates: Rates, model: HFModel, modules: int, sizes: PassSizes, plain: bool) -> Iterator[Row]:
    """Both passes over the first `modules` modules, against the products of a forward pass and against all work."""
    for name, build in {"measure": measurement, "quantize": quantization}.items():
        stage = build(model, modules, sizes)
        spent = timed(lambda stage=stage: stage.run(modules), 1, first=lambda stage=stage: stage.run(BLOCK))
        slow = plain_pass(model, modules, sizes, measure=name == "measure") if plain else None
        yield row(name, spent, rates.limit_of(stage.forward), slow)
        yield row(f"{name}, all its work", spent, rates.limit_of(stage.whole), slow)


def profile(rates: Rates, model: HFModel, sizes: PassSizes) -> Iterator[Row]:
    """The first block's parts of the quantization pass."""
    for part in parts(model, sizes):
        yield row(part.name, timed(part.run, 5), rates.limit_of(part.work, part.moved))


def against_plain(found: Row) -> tuple[str, str]:
    """Seconds of the plain loop, and their ratio to the seconds that count."""
    if found.plain_seconds is None:
        return "", ""
    return f"{found.plain_seconds:.3g}", f"{found.plain_seconds / (found.limit_seconds * found.ratio):.1f}"


def show(rates: Rates, rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(
        title=f"{jax.local_devices()[0].device_kind}: {rates.products / 1e9:.0f} GFLOP/s of products, "
        f"{rates.elementwise / 1e9:.0f} G element-wise operations/s, {rates.bandwidth / 1e9:.1f} GB/s"
    )
    for column in ("", "seconds", "core seconds", "limit", "ratio", "plain loop", "times faster", "compiling"):
        table.add_column(column, justify="left" if not column else "right")
    for r in rows:
        table.add_row(
            r.name,
            *(f"{v:.3g}" for v in (r.seconds, r.cpu_seconds, r.limit_seconds, r.ratio)),
            *against_plain(r),
            f"{r.compile_seconds:.1f}",
        )
    Console(width=130).print(table)


def as_json(rates: Rates, rows: Sequence[Row]) -> str:
    """The rates of the machine and the lines of the table."""
    return json.dumps({"rates": dataclasses.asdict(rates), "rows": [dataclasses.asdict(r) for r in rows]}, indent=1)


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/performance.md."""
    head = ("", "seconds", "core seconds", "limit", "ratio", "plain loop", "times faster")
    lines = [head, ("---",) * len(head)]
    for r in rows:
        numbers = (f"{v:.3g}" for v in (r.seconds, r.cpu_seconds, r.limit_seconds))
        lines.append((r.name, *numbers, f"{r.ratio:.2f}", *against_plain(r)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    standard = PassSizes()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="model of the passes")
    parser.add_argument("--quick", action="store_true", help="the operations at the model's sizes, and one block")
    parser.add_argument("--sizes", default="", help="sizes to take, such as 576x1536,4096x4096; all if not given")
    parser.add_argument("--only", choices=("operations", "stages", "parts"), help="leave the others out")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain loops out")
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="cpu", help="where to run; on gpu kernels are compared"
    )
    parser.add_argument("--rows", default=f"{standard.measured},{standard.quantized}", help="rows of the two passes")
    parser.add_argument("--length", type=int, default=standard.length, help="tokens of a row")
    parser.add_argument("--kernels", choices=("xla", "pallas"), help="on gpu: only these, not both side by side")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--keep", type=Path, help="also write the JSON to this file, after every line of the table")
    parser.add_argument("--markdown", type=Path, help="run nothing; print what a run with --json left here as Markdown")
    return parser.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    """`KxN` as numbers."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    given = arguments(argv)
    if given.markdown:
        print(markdown([Row(**found) for found in json.loads(given.markdown.read_text())["rows"]]))
        return 0
    jax.config.update("jax_platforms", "cuda" if given.device == "gpu" else "cpu")
    both = (given.kernels,) if given.kernels else ("xla", "pallas")
    kernels = {n: kernels_for(n) for n in (both if given.device == "gpu" else ("xla",))}
    every = GPU_SIZES if given.device == "gpu" else SIZES[:3] if given.quick else SIZES
    sizes = [_size(s) for s in given.sizes.split(",")] if given.sizes else every
    runs: list[Callable[[Rates], Iterator[Row]]] = []
    if given.only in (None, "operations"):
        runs.append(lambda rates: operations(rates, sizes, not given.no_plain, kernels))
    if given.only != "operations":
        model: Any = open_model(given.model)
        modules = BLOCK if given.quick else BLOCK * model.config.num_layers
        measured, quantized = (int(n) for n in given.rows.split(","))
        passes = PassSizes(measured=measured, quantized=quantized, length=given.length)
        if given.only != "stages":
            runs.append(lambda rates: profile(rates, model, passes))
        if given.only != "parts":
            runs.append(lambda rates: stages(rates, model, modules, passes, not given.no_plain))
    rates = measure_rates()
    rows: list[Row] = []
    for found in chain.from_iterable(run(rates) for run in runs):
        rows.append(found)
        if given.keep:
            given.keep.write_text(as_json(rates, rows))
    if given.json:
        print(as_json(rates, rows))
    else:
        show(rates, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
