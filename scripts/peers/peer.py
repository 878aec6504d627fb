"""The command line and the results of every script that quantizes with another's software.

A script leaves in its folder `plain/`, a Hugging Face directory in float16 that holds the dequantized weights, and
`peer.json`: bytes, CPU seconds, versions. Runs in the environment of the peers: no JAX, nothing of exl2jax.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from scripts.peers.layout import decoder_bytes, heads_of, spread, weight_bytes
from scripts.peers.packed import weights_of

COPIED = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


class Timer:
    """CPU seconds of the process and its threads, and wall seconds."""

    cpu_seconds = 0.0
    seconds = 0.0


@contextmanager
def timed() -> Iterator[Timer]:
    """Time the block of the `with` statement."""
    timer, start, cpu = Timer(), time.monotonic(), time.process_time()
    yield timer
    timer.seconds, timer.cpu_seconds = time.monotonic() - start, time.process_time() - cpu


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all scripts take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="source, a Hugging Face directory in float16")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tokens", type=Path, help="calibration rows")
    parser.add_argument("--rows", type=int, default=115, help="how many of the calibration rows, evenly spaced")
    return parser


def grouped_parser_of(description: str) -> argparse.ArgumentParser:
    """The same for a package that quantizes to a width in groups."""
    parser = parser_of(description)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="weights that share a scale")
    return parser


def calibration(arguments: argparse.Namespace) -> np.ndarray:
    """The calibration rows `[rows, tokens]`."""
    ids = load_file(arguments.tokens)["input_ids"].astype(np.int64)
    return ids[spread(len(ids), arguments.rows)]


def source_tensors(model: Path) -> dict[str, np.ndarray]:
    """All tensors of the source."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(model.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write_plain(model: Path, out: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the source with other `tensors` in float16 at `out/plain`; those that are not given stay."""
    plain = out / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir(parents=True)
    for name in COPIED:
        if (model / name).is_file():
            shutil.copy(model / name, plain / name)
    kept = source_tensors(model)
    unknown = sorted(tensors.keys() - kept.keys())
    if unknown:
        raise ValueError(f"the source has no {unknown[0]}")
    # safetensors writes memory as it lies: a transposed view would come out scrambled.
    whole = {name: tensors.get(name, value).astype(np.float16, order="C") for name, value in kept.items()}
    save_file(whole, plain / "model.safetensors", {"format": "pt"})


def write_facts(
    out: Path, timer: Timer, packages: Sequence[str], *, file_bytes: int, decoder_bytes: int, **more: Any
) -> None:
    """Write `peer.json`."""
    facts = {
        "file_bytes": file_bytes,
        "decoder_bytes": decoder_bytes,
        "cpu_seconds": round(timer.cpu_seconds, 2),
        "seconds": round(timer.seconds, 2),
        "versions": {name: version(name) for name in packages},
        **more,
    }
    (out / "peer.json").write_text(json.dumps(facts, indent=1))


def write_packed(arguments: argparse.Namespace, packed: Path, timer: Timer, package: str, rows: int) -> None:
    """Write the results of a directory that a package saved in GPTQ's layout: the plain directory and `peer.json`."""
    write_plain(arguments.model, arguments.out, weights_of(source_tensors(packed), arguments.bits, arguments.group))
    write_facts(
        arguments.out,
        timer,
        (package, "torch", "transformers"),
        file_bytes=weight_bytes(packed),
        decoder_bytes=decoder_bytes(heads_of(packed)),
        note=f"embedding float16; {rows} calibration rows",
    )
