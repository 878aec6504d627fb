#!/usr/bin/env python3
"""Make the files that `scripts/gpu_check.sh` takes to a machine without a network: a model, token rows, a wheel.

    python -m scripts.gpu.prepare .gpu --wheels .whl

The model is the demo model with the first tokens of its vocabulary, or only its first layers, converted to EXL2 at
about 3 bits. That is a fifth of the size in float16, small enough to carry; the machine dequantizes it and converts the
result. The tokenizer is cut in the same way: merges come in the order of their tokens, so that the rest is a valid
tokenizer. The rows hold the built-in texts, some for calibration and some held out. The wheel is stock ExLlamaV2's,
with the sources of its kernels.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from exl2jax import CalibrationConfig
from exl2jax.calibration import load_rows, load_tokenizer
from exl2jax.evaluation.rows import heldout_rows
from exl2jax.storage import write_json

ROOT = Path(__file__).parents[2]
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
STOCK_WHEEL = "exllamav2==0.3.2"
LENGTH = 512
"""Tokens of a row."""


def cut_model(source: Path, out: Path, *, layers: int, vocabulary: int | None) -> None:
    """Write the first layers of a model, and the first tokens of its vocabulary or all, as a model directory."""
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    vocabulary = int(vocabulary or config["vocab_size"])
    write_json(out / "config.json", config | {"num_hidden_layers": layers, "vocab_size": vocabulary})
    with safe_open(source / "model.safetensors", "numpy") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if _layer(name) < layers}  # noqa: SIM118
    for name in VOCABULARY_TENSORS:
        if name in kept:
            kept[name] = np.ascontiguousarray(kept[name][:vocabulary])
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    write_json(out / "tokenizer.json", cut_tokenizer(tokenizer, vocabulary))
    for name in ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(source / name, out / name)


def _layer(name: str) -> int:
    """The layer that a tensor belongs to; -1 for those of none."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def cut_tokenizer(tokenizer: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The tokenizer with the first tokens only, and the merges that make them."""
    model = tokenizer["model"]
    kept = {token: index for token, index in model["vocab"].items() if index < vocabulary}
    merges = [merge for merge in model["merges"] if "".join(merge) in kept]
    return tokenizer | {"model": model | {"vocab": kept, "merges": merges}}


def write_rows(model: Path, out: Path, rows: int) -> None:
    """Write `calibration.safetensors`, rows of the built-in calibration texts, and `heldout.safetensors`."""
    tokenizer = load_tokenizer(model)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    # Rows of noise hold no token ids, so that no file of rows can carry them.
    built = load_rows(CalibrationConfig(rows=rows, length=LENGTH, noise_rows=0), tokenizer, vocab_size=vocabulary)
    save_file({"input_ids": built.input_ids.astype(np.int32)}, out / "calibration.safetensors")
    held = heldout_rows(tokenizer, LENGTH).ids
    save_file({"input_ids": held.astype(np.int32)}, out / "heldout.safetensors")


def convert(model: Path, out: Path, work: Path, bits: float) -> None:
    """Convert by the preset `fast` on the rows beside `out`."""
    rows = out.parent / "calibration.safetensors"
    command = ["convert", "-i", model, "-o", work, "-cf", out, "-b", bits, "--preset", "fast", "-c", rows]
    options = ["-r", 16, "-mr", 4, "-l", 256, "-ml", 256]
    subprocess.run([sys.executable, "-m", "exl2jax", *map(str, [*command, *options])], cwd=ROOT, check=True)


def fetch_wheel(folder: Path) -> None:
    """Download stock's wheel; the machine has everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-d", str(folder), STOCK_WHEEL], check=True)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Write everything, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write: model/, calibration.safetensors, heldout.safetensors")
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="model to cut")
    parser.add_argument("--layers", type=int, default=30, help="layers to keep")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens to keep")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of 512 tokens")
    parser.add_argument("--bits", type=float, default=3.1, help="bits per weight to carry the model at")
    parser.add_argument("--wheels", type=Path, help="also download stock's wheel into this folder")
    given = parser.parse_args(argv)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        cut, work = Path(folder) / "cut", Path(folder) / "work"
        cut_model(given.model, cut, layers=given.layers, vocabulary=given.vocabulary)
        write_rows(cut, given.out, given.rows)
        convert(cut, given.out / "model", work, given.bits)
    if given.wheels:
        fetch_wheel(given.wheels)
    print(f"{given.out}: {size(given.out) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
