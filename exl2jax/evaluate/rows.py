"""Token rows to evaluate on, from a file of ids or from text."""

from pathlib import Path

import numpy as np

from exl2jax.calibration import load_tokenizer
from exl2jax.errors import CalibrationError
from exl2jax.storage import TensorFiles


def read_token_rows(path: Path) -> np.ndarray:
    """The `input_ids [rows, length]` of a safetensors file, int32."""
    if not path.is_file():
        raise CalibrationError(f"{path}: no such token file")
    files = TensorFiles([path])
    if "input_ids" not in files:
        raise CalibrationError(f"{path}: holds no tensor input_ids [rows, length]")
    ids = files.read("input_ids")
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(f"{path}: input_ids must be integers [rows, length], got {ids.dtype} {list(ids.shape)}")
    return ids.astype(np.int32)


def text_rows(path: Path, model_dir: Path, length: int) -> np.ndarray:
    """A text file tokenized once and cut into whole rows of `length` tokens."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({e})") from e
    ids = np.asarray(load_tokenizer(model_dir).encode(text), np.int32)
    rows = len(ids) // length
    if rows == 0:
        raise CalibrationError(f"{path}: {len(ids)} tokens, a row needs {length}; give more text or a smaller --length")
    return ids[: rows * length].reshape(rows, length)
