"""Running text to token rows: encode texts one after the other until the rows are full."""

from collections.abc import Iterable, Iterator

import numpy as np

from exl2jax.calibration.records import RowBlock
from exl2jax.calibration.tokenizer import Tokenizer
from exl2jax.errors import CalibrationError

LONGEST_PIECE = 1 << 18
"""Characters encoded at once. Longer texts are cut at white space, so that a huge cell cannot exhaust the memory."""


def pack_texts(
    texts: Iterable[str], tokenizer: Tokenizer, *, domain: str, where: str, rows: int, length: int
) -> RowBlock:
    """Token rows `[rows, length]` of texts encoded in order, without special tokens and without separators.

    Reads no further than needed. Raises `CalibrationError` with both counts if there are too few tokens.
    """
    needed = rows * length
    parts: list[np.ndarray] = []
    have = 0
    for text in texts:
        for piece in _pieces(text):
            parts.append(tokenizer.encode(piece))
            have += len(parts[-1])
            if have >= needed:
                return RowBlock(domain=domain, ids=np.concatenate(parts)[:needed].reshape(rows, length))
    raise CalibrationError(
        f"{where}: {have} tokens are there, {needed} are needed for {rows} rows of {length}; "
        f"{_advice(have, rows, length)}"
    )


def _advice(have: int, rows: int, length: int) -> str:
    """The amount that would fit."""
    if have >= length:
        return f"ask for at most {have // length} rows, shorter rows, or give more text"
    if have >= rows:
        return f"ask for rows of at most {have // rows} tokens, or give more text"
    return "give a source with more text" if have else "the source holds no text; give another one"


def _pieces(text: str) -> Iterator[str]:
    """The text, cut before white space into pieces of at most `LONGEST_PIECE` characters."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = start + LONGEST_PIECE
        cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
