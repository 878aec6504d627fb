"""A summary of calibration rows, for a person to see before converting."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exl2jax.calibration.load import count_duplicates
from exl2jax.calibration.records import NOISE_ID, CalibrationRows
from exl2jax.calibration.tokenizer import Tokenizer

PREVIEW = 50
"""Tokens shown of the start and of the end, as the stock converter does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSummary:
    """A view of calibration rows.

    `composition` is rows per domain; `first` and `last` are decoded tokens of the first and last rows (empty without a
    tokenizer); `vocabulary_used` counts distinct ids of `vocabulary_size`; `tokens` counts real ones (neither padding
    nor noise); `duplicates` counts rows that equal an earlier one.
    """

    source: str
    rows: int
    length: int
    tokens: int
    composition: dict[str, int]
    first: str
    last: str
    vocabulary_used: int
    vocabulary_size: int
    duplicates: int
    sha256: str
    notes: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """Fraction of the vocabulary that occurs."""
        return self.vocabulary_used / self.vocabulary_size

    def record(self) -> dict[str, Any]:
        """The fields and the coverage as JSON-able values."""
        return {**asdict(self), "notes": list(self.notes), "coverage": self.coverage}


def summarize(rows: CalibrationRows, tokenizer: Tokenizer | None, *, vocab_size: int) -> CalibrationSummary:
    """Count and decode what `exl2jax calibrate` shows."""
    ids = rows.input_ids
    real = ids != NOISE_ID
    if rows.attention_mask is not None:
        real &= rows.attention_mask == 1
    texts = ("", "")
    with_text = np.flatnonzero(real.any(axis=1))
    if tokenizer is not None and len(with_text):
        first, last = with_text[0], with_text[-1]
        texts = tokenizer.decode(ids[first][real[first]][:PREVIEW]), tokenizer.decode(ids[last][real[last]][-PREVIEW:])
    return CalibrationSummary(
        source=rows.source,
        rows=ids.shape[0],
        length=ids.shape[1],
        tokens=int(real.sum()),
        composition=rows.composition,
        first=texts[0],
        last=texts[1],
        vocabulary_used=len(np.unique(ids[real])),
        vocabulary_size=vocab_size,
        duplicates=count_duplicates(ids),
        sha256=rows.sha256,
        notes=rows.notes,
    )
