"""Measure the peak of resident memory of converting one block of Llama-7B width, or blocks of any other size.

A model of random bfloat16 weights is written to a temporary folder and converted by the command that users run, in a
process of its own, through every pass of the preset: its peak is the kernel's high-water mark (`VmHWM`), which counts
the pages of mapped files too. Only one block of a model is resident at a time, so the peak of one block is that of
a model, except for the embedding and the head, which are tiny here.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl2jax.testing.tiny_model import write_tiny_llama

ROOT = Path(__file__).parents[2]

LIMIT = 12e9
"""Bytes that a block of Llama-7B width on 16 rows of 2048 may take."""

CHILD = """
import sys
from pathlib import Path
from exl2jax.cli.entry import main
assert main(sys.argv[1:]) == 0
(line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
print(line.split()[1])
"""
"""The program of the process: a command of exl2jax, then a line with its high-water mark in kB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model and the rows it is calibrated on; the defaults are one block of Llama-7B on 16 rows of 2048 tokens."""

    width: int = 4096
    inner: int = 11008
    heads: int = 32
    layers: int = 1
    rows: int = 16
    length: int = 2048

    @property
    def states(self) -> int:
        """Bytes of one stream of hidden states in float32."""
        return 4 * self.rows * self.length * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The peak of a conversion's resident bytes, and its seconds on the wall, start included."""

    resident: int
    seconds: float


def conversion_peak(shape: Shape, *options: str, cache: Path | None = None) -> Peak:
    """The peak of converting a random model of this shape under `options` of the command, bits among them.

    Compiled programs come from `cache`; without it everything is compiled, which takes memory of its own.
    Raises `CalledProcessError` if the conversion fails; its messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_llama(
            Path(folder) / "model",
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.heads,
            max_position_embeddings=shape.length,
            dtype="bfloat16",
        )
        rows, length = str(shape.rows), str(shape.length)
        flags = ["-c", "random", "-r", rows, "-mr", rows, "-l", length, "-ml", length]
        command = ["convert", "-i", str(model), "-o", f"{folder}/out", *flags, *options]
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *command],
            cwd=ROOT,
            env=os.environ | _cache_settings(cache),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return Peak(resident=1024 * int(done.stdout.split()[-1]), seconds=time.perf_counter() - begun)


def _cache_settings(cache: Path | None) -> dict[str, str]:
    """Environment variables that make JAX keep its compiled programs in a folder; none without a folder."""
    if cache is None:
        return {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Shape]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--preset", default="best", help="recipe of the conversion")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    return given, Shape(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Shape)})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one conversion: 0 where its peak is within the limit, else 1."""
    given, shape = arguments(argv)
    peak = conversion_peak(shape, "-b", "4.0", "--preset", given.preset)
    if given.json:
        record = dataclasses.asdict(shape) | dataclasses.asdict(peak) | {"limit": LIMIT, "states": shape.states}
        print(json.dumps(record, indent=1))
    else:
        print(
            f"{shape.layers} block(s) of {shape.width}/{shape.inner}, {shape.heads} heads, {shape.rows} rows of "
            f"{shape.length}, preset {given.preset}: {peak.resident / 1e9:.2f} GB resident at most "
            f"(limit {LIMIT / 1e9:.0f} GB), a stream of hidden states being {shape.states / 1e9:.2f} GB; "
            f"{peak.seconds:.0f} s"
        )
    return int(peak.resident > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
