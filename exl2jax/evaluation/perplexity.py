"""Perplexity of directories, and their divergence from a reference directory."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.errors import CalibrationError
from exl2jax.evaluation.figures import Evaluation, figures_of
from exl2jax.evaluation.logits import walk
from exl2jax.evaluation.rows import EvalRows
from exl2jax.models import Model, build_decoder, open_model
from exl2jax.stream.forward import relative_error
from exl2jax.stream.scoring import perplexity, score

DEPTH_ROWS = 4
"""Rows, spread over the text, on which the growth of the error with depth is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The model that a directory is compared with: head parameters, final states `[R, T, D]` and their perplexity.

    `depth` holds the states after every module, on some rows.
    """

    directory: Path
    head: Any
    states: np.ndarray
    perplexity: float
    sample: np.ndarray
    depth: dict[str, np.ndarray]


def reference_pass(directory: Path, rows: EvalRows) -> Reference:
    """Run the reference once; every directory compared with it shares the result."""
    model = open_model(directory)
    _require_ids(rows.ids, model)
    sample = np.unique(np.linspace(0, len(rows.ids) - 1, min(DEPTH_ROWS, len(rows.ids))).astype(int))
    depth, states = {}, np.empty(0)
    for spec, states in walk(model, rows.ids):
        depth[spec.key] = states[sample]
    head = model.head_params()
    nll = score(build_decoder(model.config), head, states, rows.ids).nll
    return Reference(
        directory=directory, head=head, states=states, perplexity=perplexity(nll), sample=sample, depth=depth
    )


def evaluate_one(directory: Path, rows: EvalRows, reference: Reference | None = None) -> Evaluation:
    """Evaluate a Hugging Face or EXL2 directory on token rows, rows apart, first token of a row not predicted."""
    begun = time.monotonic()
    model = open_model(directory)
    _require_ids(rows.ids, model)
    if reference is not None and reference.states.shape[-1] != model.config.hidden_size:
        raise CalibrationError(f"{directory} and {reference.directory} are not the same model: their widths differ")
    depth, states = {}, np.empty(0)
    for spec, states in walk(model, rows.ids):
        if reference is not None and spec.key in reference.depth:
            depth[spec.key] = relative_error(states[reference.sample], reference.depth[spec.key], None)
    against = None if reference is None else (reference.head, reference.states)
    scores = score(build_decoder(model.config), model.head_params(), states, rows.ids, against)
    seconds = time.monotonic() - begun
    return Evaluation(
        **asdict(figures_of(scores)),
        domains={name: figures_of(scores, rows.of_domain(name)) for name in rows.domain_names},
        depth=depth,
        seconds=round(seconds, 3),
        tokens_per_second=round(rows.ids.size / seconds, 1),
    )


def evaluate_many(
    directories: Sequence[Path], rows: EvalRows, against: Path | None = None
) -> Iterator[tuple[Path, Evaluation]]:
    """Evaluate directories one after the other on the same rows; the reference `against` runs once for all."""
    reference = None if against is None else reference_pass(against, rows)
    for directory in directories:
        yield directory, evaluate_one(directory, rows, reference)


def evaluate(directory: Path, input_ids: np.ndarray, against: Path | None = None) -> Evaluation:
    """Evaluate a directory on `input_ids [rows, length]`.

    `against` names the directory to compare next-token distributions with (KL divergence, top-1 agreement).
    """
    [(_, found)] = evaluate_many([directory], EvalRows(ids=input_ids), against)
    return found


def _require_ids(input_ids: np.ndarray, model: Model) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] < 2 or not input_ids.size:
        raise CalibrationError(f"token rows must be [rows, length] of at least 2 tokens, got {list(input_ids.shape)}")
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise CalibrationError(f"token ids run to {input_ids.max()}, {model.directory} has {model.config.vocab_size}")
