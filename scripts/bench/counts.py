"""Measure what a conversion asks of its device, and print the table of docs/performance.md.

    python -m scripts.bench.counts run build/counts                  this checkout, on the demo model
    python -m scripts.bench.counts run build/before --checkout DIR   another one, the same way
    python -m scripts.bench.counts table build/before build/counts   both side by side

`run` measures some parts, each in a process of its own, and writes its results as JSON. `cold` and `warm` are a
conversion with an empty cache of compiled programs and one with the cache that it filled (`scripts/bench/traffic.py`).
`programs` are those of one block of Llama-7B, compiled for an absent H100 (`scripts/bench/programs.py`) with the
interpreter of `.venv-gpu`, `rtx4090` the same for an RTX 4090. `whole` is a conversion of 115 rows, for its CPU seconds
and peak memory, `stock` the same by the preset `stock`. The table has a column for every folder; a part that a folder
lacks stays empty.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
LARGE = ["--rows", "115", "--measurement-rows", "19", "--length", "512"]
PARTS: dict[str, list[str]] = {
    "cold": [],
    "warm": ["--calls"],
    "programs": [],
    "rtx4090": ["--device", "rtx4090"],
    "whole": LARGE,
    "stock": [*LARGE, "--preset", "stock"],
}
"""Parts by name, with the options of the script that measures them."""

STANDARD = ("cold", "warm")
"""Parts that are measured by default; they take minutes."""

COMPILED = {"programs": "an H100", "rtx4090": "an RTX 4090"}
"""Parts that compile for a device that is not there, and which."""

type Found = Mapping[str, Any]
"""The records of a folder's parts, by name."""


def measure(name: str, folder: Path, checkout: Path, model: Path, cuda: str) -> None:
    """Measure one part of a checkout in a process of its own; raises `CalledProcessError` where it fails."""
    # The scripts are always those of this checkout; only the package comes from the other, which Python finds first.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (checkout, ROOT)))}
    if name in COMPILED:
        command = [cuda, "-P", "-m", "scripts.bench.programs", str(folder / f"{name}.json"), *PARTS[name]]
    else:
        cache = folder.resolve() / "cache"
        if name == "cold":
            shutil.rmtree(cache, ignore_errors=True)
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        script = str(ROOT / "scripts" / "bench" / "traffic.py")
        command = [sys.executable, "-P", script, str(folder / f"{name}.json"), str(model), *PARTS[name]]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def read(folder: Path) -> Found:
    """The records that a folder holds."""
    kept = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text()) for name, path in kept.items() if path.exists()}


def total(part: Mapping[str, Any], *what: str) -> float:
    """The sum of a count over all modules."""
    return sum(counts.get(name, 0) for _, _, counts in part["modules"] for name in what)


def modules(part: Mapping[str, Any], *stages: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Key and counts of every module of the stages, the head left out; all stages where none is named."""
    for stage, key, counts in part["modules"]:
        if ".layers." in key and (not stages or stage in stages):
            yield key, counts


def late_programs(part: Mapping[str, Any]) -> int:
    """Programs compiled after the second block that a stage met."""
    late = 0
    for stage in {stage for stage, _, _ in part["modules"]}:
        met: dict[str, int] = defaultdict(int)
        for key, counts in modules(part, stage):
            kind = key.rpartition(".")[2]
            late += int(counts.get("programs", 0)) if met[kind] >= 2 else 0
            met[kind] += 1
    return late


def mean_reads(part: Mapping[str, Any]) -> float:
    """Mean blocking reads of a module, in the pass that has most; threads that write files read as well."""
    stages = {stage for stage, key, _ in part["modules"] if ".layers." in key}
    return max(_mean([counts.get("reads", 0) for _, counts in modules(part, stage)]) for stage in stages)


def priced_launches(part: Mapping[str, Any]) -> str:
    """Launches of pricing the attention of the block by its linears, `forward` and factors included."""
    compiled = {f"program {i}": c for i, c in enumerate(part.get("compiled", ())) if "failed" not in c}
    (counts,) = [counts for key, counts in modules(part, "price") if key.endswith("self_attn")]
    called = [(times, compiled[name]["launches"]) for name, times in counts.items() if name in compiled]
    count = sum(times * launched[0] for times, launched in called) / 4
    open_loops = sum(launched[1] for _, launched in called)
    return f"{count:.0f}" + (", loops of unknown length counted once" if open_loops else "")


def _whole(unit: Callable[[Mapping[str, Any]], str], name: str = "whole") -> Callable[[Found], str]:
    return lambda found: unit(found[name])


type Row = tuple[Callable[[Found], str], str]
"""The figure of a folder, and the most that it should be."""


def _compiled_rows(name: str, seconds: str, launched: str) -> dict[str, Row]:
    """The lines of a part that compiles for a device, with the most that two of them should be."""
    where = COMPILED[name]
    return {
        f"programs of a Llama-7B block for {where}": (lambda f: str(f[name]["programs"]), ""),
        f"lowering and compiling them for {where}, CPU seconds": (
            lambda f: f"{sum(c.get('lowering', 0) + c.get('compiling', 0) for c in f[name]['compiled']):.0f}",
            seconds,
        ),
        f"launches on {where} to price a 4096x4096 linear at seven widths": (
            lambda f: priced_launches(f[name]),
            launched,
        ),
    }


ROWS: dict[str, Row] = {
    "programs compiled, cold": (lambda f: f"{total(f['cold'], 'programs'):.0f}", "70"),
    "programs compiled after the second block of a kind": (lambda f: str(late_programs(f["cold"])), "0"),
    "tracing and lowering, seconds, warm cache": (
        lambda f: f"{total(f['warm'], 'tracing seconds', 'lowering seconds'):.1f}",
        "8",
    ),
    "executable calls a priced module, at most": (
        lambda f: f"{max(c.get('calls', 0) for _, c in modules(f['warm'], 'price')):.0f}",
        "40",
    ),
    "executable calls a quantized module, at most": (
        lambda f: f"{max(c.get('calls', 0) for _, c in modules(f['warm'], 'quantize')):.0f}",
        "",
    ),
    "reads that wait, a module, mean of a pass, at most": (lambda f: f"{mean_reads(f['warm']):.1f}", "3"),
    "megabytes up a quantized module, mean": (
        lambda f: f"{_mean([c.get('bytes up', 0) for _, c in modules(f['warm'], 'quantize')]) / 1e6:.1f}",
        "weights only",
    ),
    **_compiled_rows("programs", "80", "1500"),
    **_compiled_rows("rtx4090", "", ""),
    "CPU seconds of a whole conversion, 115 rows": (_whole(lambda w: f"{w['cpu_seconds']:.0f}"), "0.8 of before"),
    "the same by the preset stock": (_whole(lambda w: f"{w['cpu_seconds']:.0f}", "stock"), ""),
    "peak memory of a whole conversion, GB": (_whole(lambda w: f"{w['peak_bytes'] / 1e9:.2f}"), "1.05 of before"),
}
"""Lines of the table by the words for a figure."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def lines(folders: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    """The table, a column for every folder."""
    kept = [read(folder) for folder in folders]
    for label, (say, target) in ROWS.items():
        cells = []
        for found in kept:
            try:
                cells.append(say(found))
            except KeyError:  # a part that was not measured
                cells.append("")
        if any(cells):
            yield (label, *cells, target)


def show(folders: Sequence[Path], markdown: bool) -> None:
    """Print the table."""
    head = ("", *(folder.name for folder in folders), "at most")
    if markdown:
        print("\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *lines(folders))))
        return
    table = Table(*head, title="What a conversion asks of its device")
    for line in lines(folders):
        table.add_row(*line)
    Console(width=130).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("folder", type=Path, help="folder to keep the figures in")
    run.add_argument("--checkout", type=Path, default=ROOT, help="whose package is measured")
    run.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="model that is converted")
    run.add_argument("--parts", default=",".join(STANDARD), help=f"of {', '.join(PARTS)}")
    run.add_argument("--cuda", default=str(ROOT / ".venv-gpu" / "bin" / "python"), help="interpreter with JAX for CUDA")
    table = commands.add_parser("table", help="print what was measured")
    table.add_argument("folders", type=Path, nargs="+")
    table.add_argument("--markdown", action="store_true", help="as Markdown")
    given = parser.parse_args(argv)
    if given.command == "table":
        show(given.folders, given.markdown)
        return 0
    parts = given.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in parts:
        measure(name, given.folder.resolve(), given.checkout.resolve(), given.model.resolve(), given.cuda)
    show([given.folder], markdown=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
