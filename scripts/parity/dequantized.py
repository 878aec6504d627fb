"""Convert tiny models and write them back with `dequantize`; `scripts.parity.reference` then loads them.

    .venv/bin/python -m scripts.parity.dequantized FOLDER

For each case `FOLDER/NAME.source` holds the model, `FOLDER/NAME` the plain directory, `FOLDER/NAME.npz` tokens and our
logits of the EXL2 directory between them.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from exl2jax import ConversionConfig, convert, open_model
from exl2jax.evaluation import model_logits
from exl2jax.exl2.dequantize import dequantize_model
from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.testing.made_up import made_up_measurement
from exl2jax.testing.parity_cases import TINY_CASES, ParityCase, make_input_ids
from exl2jax.testing.tiny_architectures import TINY

NATIVE = tuple(
    name for name, tiny in TINY.items() if ARCHITECTURES[tiny.architecture].proof.startswith(tiny.architecture)
)
"""The architectures that `transformers` has itself: the others are compared with a stand-in."""

CASES = ("untied_biases", *NATIVE)

ROWS, LENGTH = 2, 48


def write(case: ParityCase, folder: Path) -> None:
    """Convert the case to 4 bits per weight and leave what `dequantize` makes of the result."""
    name = case.name
    exl2, plain = folder / f"{name}.exl2", folder / name
    if case.tiny:  # of a float32 source, half precision would round embeddings and norms
        case = replace(case, tiny=replace(case.tiny, dtype="bfloat16"))
    source = case.write(folder / f"{name}.source")
    config = ConversionConfig(
        in_dir=source,
        out_dir=folder / f"{name}.work",
        compile_full=exl2,
        preset="fast",
        bits=4.0,
        dataset_rows=ROWS,
        length=LENGTH,
        measurement_rows=ROWS,
        measurement_length=LENGTH,
        measurement=made_up_measurement(source, folder / f"{name}.measurement.json"),
    )
    convert(config)
    dequantize_model(exl2, plain)
    ids = make_input_ids(LENGTH, open_model(exl2).config.vocab_size)
    np.savez(folder / f"{name}.npz", input_ids=ids, logits=model_logits(exl2, ids))


if __name__ == "__main__":
    for wanted in TINY_CASES:
        if wanted.name in CASES:
            write(wanted, Path(sys.argv[1]))
