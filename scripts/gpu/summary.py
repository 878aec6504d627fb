"""Print the results of `scripts/gpu_check.sh` in a folder, in a few lines."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def summary(folder: Path) -> Iterator[str]:
    """A line for every result in the folder; steps without a result are left out."""
    for name, describe in DESCRIBED.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        try:
            yield from describe(name, found)
        except KeyError as missing:
            yield f"{name}: cut off before {missing} was known, see {path}"


def _whole(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found["stages"].items())
    total = ", ".join(f"{what} {amount:.4g}" for what, amount in found["total"].items())
    yield f"{name} conversion on {found['device']}: {found['seconds']:.1f} s ({stages}); {total}"
    yield f"{name} conversion: perplexity {found['perplexity']:.4f}, full precision {found['perplexity_full']:.4f}"


def _block(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    for run in ("cold", "warm"):
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found[run]["stages"].items())
        peak = found[run]["peak_device_bytes"]
        yield f"{name}, {run}, two blocks: {stages}" + (f"; {peak / 1e9:.1f} GB on the device" if peak else "")
    model = found["model"]
    yield (
        f"{name}: compiling {model['compiling']} s, a block {model['block']} s, head and between "
        f"{model['head and between']} s; a model of {model['layers']} blocks {model['whole']} s"
    )


def _stock(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{name}: perplexity {found['stock']:.4f} in stock, {found['exl2jax']:.4f} here ({found['tokens']} tokens), "
        f"{100 * found['difference']:+.3f} %"
    )
    if "linears" in found:
        yield f"{name}: {found['linears']['equal']} of {found['linears']['of']} weights have the same bits"
    if "modules" in found:
        yield f"{name}: hidden states differ first after {found['modules']['first that differs'] or 'no module'}"
    if plain := found.get("plain"):
        yield f"{name}, float16: perplexity {plain['stock']:.4f} in stock, {plain['exl2jax']:.4f} here"
    for setting, value in found.get("settings", {}).items():
        yield f"{name}, {setting}: {value}"


def _gptq(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    for row in found["rows"]:
        yield f"{row['name']}: {1000 * row['seconds']:.2f} ms, {row['ratio']:.2f} times its limit"


DESCRIBED = {"first": _whole, "second": _whole, "block": _block, "stock": _stock, "gptq": _gptq}
"""The words for each result, by the name of its file."""

if __name__ == "__main__":
    print("\n".join(summary(Path(sys.argv[1]))))
