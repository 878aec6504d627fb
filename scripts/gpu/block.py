"""Blocks of a 7B model measured and quantized, and the time that a whole model of such blocks takes.

A model of two blocks of random weights is converted twice in one process: on a few rows, where everything is compiled,
and on the rows of a real conversion. In each pass the first block pays for compiling, and the second shows the time of
every further block. The result is written after every module, so that an interrupted run keeps what it has.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exl2jax import ConversionConfig
from exl2jax.models.modules import HEAD_KEY
from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.bench.traffic import TIME, Counted, set_up
from scripts.gpu.whole import run

BLOCK = 2
"""Modules of a block: attention and MLP."""

PASSES = ("forward", "backward", "price", "quantize")


def parts(modules: Sequence[Counted]) -> dict[str, dict[str, float]]:
    """Seconds of every pass: of its first block, of its last block, and of everything else."""
    found = {}
    for name in PASSES:
        mine = [(key, counts[TIME]) for stage, key, counts in modules if stage == name]
        blocks = [seconds for key, seconds in mine if key and key != HEAD_KEY]
        found[name] = {
            "first": sum(blocks[:BLOCK]),
            "last": sum(blocks[-BLOCK:]),
            "other": sum(seconds for _, seconds in mine) - sum(blocks),
        }
    return found


def whole_model(cold: Sequence[Counted], warm: Sequence[Counted], layers: int) -> dict[str, float]:
    """Seconds of a model of `layers` blocks: `cold` says what compiling takes, `warm` everything else."""
    before, after = parts(cold), parts(warm)
    compiling = sum(max(p["first"] - p["last"], 0) for p in before.values())
    block = sum(p["last"] for p in after.values())
    other = sum(p["other"] for p in after.values())
    return {
        "compiling": round(compiling, 2),
        "block": round(block, 2),
        "head and between": round(other, 2),
        "layers": layers,
        "whole": round(compiling + layers * block + other, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run both conversions and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--width", type=int, default=4096, help="hidden size")
    parser.add_argument("--inner", type=int, default=11008, help="hidden size of the MLP")
    parser.add_argument("--heads", type=int, default=32, help="attention heads, each with keys and values of its own")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens of the vocabulary")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the whole model")
    parser.add_argument("--rows", default="16,4;115,19", help="rows and measurement rows of both conversions")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    given = parser.parse_args(argv)
    set_up()
    cold, warm = ([int(n) for n in pair.split(",")] for pair in given.rows.split(";"))
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_llama(
            Path(folder) / "model",
            hidden_size=given.width,
            intermediate_size=given.inner,
            num_layers=2,
            num_heads=given.heads,
            num_kv_heads=given.heads,
            vocab_size=given.vocabulary,
            max_position_embeddings=given.length,
            dtype="bfloat16",
        )
        found: dict[str, Any] = {"shape": {k: v for k, v in vars(given).items() if k != "result"}}
        for name, (rows, measured) in (("cold", cold), ("warm", warm)):
            config = ConversionConfig(
                in_dir=model,
                out_dir=Path(folder) / name,
                compile_full=Path(folder) / f"{name}-exl2",
                cal_dataset="random",
                bits=4.0,
                dataset_rows=rows,
                measurement_rows=measured,
                length=given.length,
                measurement_length=given.length,
            )
            running = given.result.with_suffix(f".{name}.part")
            found[name] = run(config, running)
            running.unlink()
            given.result.write_text(json.dumps(found, indent=1))
    found["model"] = whole_model(found["cold"]["modules"], found["warm"]["modules"], given.layers)
    given.result.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
