"""Convert tiny models and write them back with `dequantize`, for `scripts.parity` to load with `transformers`.

    .venv/bin/python -m scripts.parity_dequantized FOLDER

For each case `FOLDER/NAME` holds the plain directory, `FOLDER/NAME.npz` tokens and our logits of it.
"""

import sys
from pathlib import Path

import numpy as np

from exl2jax import ConversionConfig, convert, open_model
from exl2jax.evaluate import model_logits
from exl2jax.pipeline.dequantize import dequantize_model
from tests.support.parity_cases import TINY_CASES, make_input_ids

CASES = ("untied_biases", "gemma2", "mixtral")
"""Biases and a head of its own; norms around zero, caps and a tied head; experts."""

ROWS, LENGTH = 2, 48


def write(name: str, folder: Path) -> None:
    """Convert the case to 4 bits per weight and leave what `dequantize` makes of the result."""
    case = next(case for case in TINY_CASES if case.name == name)
    exl2, plain = folder / f"{name}.exl2", folder / name
    config = ConversionConfig(
        in_dir=case.write(folder / f"{name}.source"),
        out_dir=folder / f"{name}.work",
        compile_full=exl2,
        preset="fast",
        bits=4.0,
        dataset_rows=ROWS,
        length=LENGTH,
        measurement_rows=ROWS,
        measurement_length=LENGTH,
    )
    convert(config)
    dequantize_model(exl2, plain)
    ids = make_input_ids(LENGTH, open_model(exl2).config.vocab_size)
    np.savez(folder / f"{name}.npz", input_ids=ids, logits=model_logits(exl2, ids))


if __name__ == "__main__":
    for wanted in CASES:
        write(wanted, Path(sys.argv[1]))
