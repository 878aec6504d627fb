"""Calibration data: from the standard set, files, named sets, the model itself or Python to token rows `[R, T]`."""

from exl2jax.calibration.examples import prepare_dataset
from exl2jax.calibration.load import load_rows
from exl2jax.calibration.named import get_dataset
from exl2jax.calibration.records import NOISE_ID, CalibrationConfig, CalibrationRows, Examples, Sampler
from exl2jax.calibration.summary import CalibrationSummary, summarize
from exl2jax.calibration.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "NOISE_ID",
    "CalibrationConfig",
    "CalibrationRows",
    "CalibrationSummary",
    "Examples",
    "Sampler",
    "Tokenizer",
    "get_dataset",
    "load_rows",
    "load_tokenizer",
    "prepare_dataset",
    "summarize",
]
