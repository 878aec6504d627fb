"""Perplexity of a directory, and its divergence from a reference directory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exl2jax.errors import CalibrationError
from exl2jax.evaluate.logits import final_states
from exl2jax.models import Model, build_decoder, open_model
from exl2jax.pipeline.scoring import perplexity, score


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Figures of a directory on token rows; `tokens` counts the predicted ones, divergence is in nats per token."""

    perplexity: float
    tokens: int
    kl_divergence: float | None = None
    top1_agreement: float | None = None


def evaluate(directory: Path, input_ids: np.ndarray, against: Path | None = None) -> Evaluation:
    """Evaluate an HF or EXL2 directory on `input_ids [rows, length]`, rows apart, first token of a row not predicted.

    `against` names the directory to compare next-token distributions with (mean KL divergence, top-1 agreement).
    """
    model = open_model(directory)
    _require_ids(input_ids, model)
    states = final_states(model, input_ids)
    reference = None
    if against is not None:
        other = open_model(against)
        _require_ids(input_ids, other)
        reference = (other.head_params(), final_states(other, input_ids))
    scores = score(build_decoder(model.config), model.head_params(), states, input_ids, reference)
    return Evaluation(
        perplexity=perplexity(scores.nll),
        tokens=int(scores.nll.size),
        kl_divergence=None if scores.kl is None else float(np.mean(scores.kl, dtype=np.float64)),
        top1_agreement=None if scores.agree is None else float(np.mean(scores.agree, dtype=np.float64)),
    )


def _require_ids(input_ids: np.ndarray, model: Model) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] < 2 or not input_ids.size:
        raise CalibrationError(f"token rows must be [rows, length] of at least 2 tokens, got {list(input_ids.shape)}")
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise CalibrationError(f"token ids run to {input_ids.max()}, {model.directory} has {model.config.vocab_size}")
