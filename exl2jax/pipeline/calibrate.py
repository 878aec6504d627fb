"""Calibration rows for a model: its vocabulary, its context, its noise rows, and itself as an author."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from exl2jax.calibration import CalibrationConfig, CalibrationRows, Tokenizer, load_rows
from exl2jax.models import Model, ModelConfig
from exl2jax.pipeline.progress import Control
from exl2jax.pipeline.sample import model_sampler, remembered


def build_rows(
    wanted: CalibrationConfig,
    config: ModelConfig,
    tokenizer: Tokenizer,
    opened: Callable[[], Model],
    control: Control,
    *,
    memory: tuple[Path, str] | None = None,
) -> CalibrationRows:
    """The rows of a configuration for a model; `opened` gives the model itself, and is called only for text of its own.

    `memory` is a folder to keep that text in and what stands for the model there (`remembered`). Raises what
    `load_rows` and `model_sampler` raise.
    """

    def sample(prompts: Sequence[Sequence[int]], n_rows: int, length: int, seed: int) -> np.ndarray:
        vocab = min(config.vocab_size, tokenizer.vocab_size)
        return model_sampler(opened(), vocab, control)(prompts, n_rows, length, seed)

    return load_rows(
        wanted,
        tokenizer,
        vocab_size=config.vocab_size,
        context=config.max_position,
        architecture=config.architecture,
        sampler=sample if memory is None else remembered(sample, *memory),
    )
