"""Calibration data given from Python, as Optimum's GPTQ takes it in `dataset`, and its batching."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exl2jax.calibration.ready import ready_rows
from exl2jax.calibration.records import EXAMPLES, Examples, RowBlock
from exl2jax.calibration.tokenizer import Tokenizer
from exl2jax.errors import CalibrationError, SettingsError

_WHERE = "calibration examples"


def example_rows(
    examples: Examples,
    tokenizer: Tokenizer | None,
    *,
    rows: int | None,
    length: int | None,
    context: int | None = None,
    batch_size: int = 1,
    pad_token_id: int | None = None,
) -> tuple[RowBlock, tuple[str, ...]]:
    """Rows of texts, token lists, tokenizer outputs or an array, one row per example, and notes.

    Texts are encoded as calling a `transformers` tokenizer does (with its default special tokens). Rows are cut to
    `length` (else to the model's `context`) and padded at the end to the longest; padding is masked, so its id changes
    nothing. As in Optimum, a `batch_size` over one needs a `pad_token_id`. An array is taken as it is, its rows cut to
    `length`.
    """
    if isinstance(examples, np.ndarray) and examples.ndim == 2:
        block = ready_rows(examples, None, where=_WHERE, rows=rows, length=length)
        return RowBlock(domain=EXAMPLES, ids=block.ids), ()
    _check_padding(batch_size, pad_token_id)
    length = length or context
    sequences = [ids for index, example in enumerate(examples) for ids in _sequences(example, index, tokenizer)]
    if not sequences:
        raise CalibrationError(f"{_WHERE}: the list is empty; give at least one text or token list")
    if rows is not None and rows > len(sequences):
        raise CalibrationError(f"{_WHERE}: {len(sequences)} are there, {rows} rows are needed; ask for fewer rows")
    sequences = sequences[:rows]
    cut = 0 if length is None else sum(len(ids) > length for ids in sequences)
    notes = (f"{cut} of {len(sequences)} examples were cut to {length} tokens",) if cut else ()
    pad = tokenizer.pad_id if pad_token_id is None and tokenizer is not None else pad_token_id
    return _padded([ids[:length] for ids in sequences], pad or 0), notes


def prepare_dataset(
    examples: Sequence[Mapping[str, Any]], batch_size: int = 1, pad_token_id: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Batch tokenizer outputs as Optimum's function of this name does.

    Each example holds `input_ids` and `attention_mask` (`[n]` or `[1, n]`). Each batch holds both as int64
    `[batch, longest]`, padded at the *start* to the longest of the batch with `pad_token_id` and mask 0.
    """
    _check_padding(batch_size, pad_token_id)
    pairs = [
        (np.atleast_2d(np.asarray(e["input_ids"])), np.atleast_2d(np.asarray(e["attention_mask"]))) for e in examples
    ]
    batches = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        longest = max(ids.shape[1] for ids, _ in batch)
        ids = [np.pad(i, ((0, 0), (longest - i.shape[1], 0)), constant_values=pad_token_id or 0) for i, _ in batch]
        masks = [np.pad(m, ((0, 0), (longest - m.shape[1], 0))) for _, m in batch]
        batches.append(
            {
                "input_ids": np.concatenate(ids).astype(np.int64),
                "attention_mask": np.concatenate(masks).astype(np.int64),
            }
        )
    return batches


def _check_padding(batch_size: int, pad_token_id: int | None) -> None:
    if batch_size > 1 and pad_token_id is None:
        raise SettingsError(f"calibration: a batch_size of {batch_size} needs a pad_token_id to pad with")


def _sequences(example: Any, index: int, tokenizer: Tokenizer | None) -> list[np.ndarray]:
    """The token arrays `[n]` int32 of one example (several where it is a batch)."""
    where = f"{_WHERE}, entry {index}"
    if isinstance(example, str):
        if tokenizer is None:
            raise CalibrationError(f"{where}: is text, and there is no tokenizer to encode it with")
        found = [tokenizer.encode(example, template=True)]
    elif isinstance(example, Mapping):
        found = _unmasked(example, where)
    else:
        found = [_integers(example, where)]
    if any(ids.ndim != 1 or len(ids) == 0 for ids in found):
        raise CalibrationError(f"{where}: holds no tokens or is not a flat list of them; leave it out or flatten it")
    return found


def _unmasked(example: Mapping[str, Any], where: str) -> list[np.ndarray]:
    """Rows of a tokenizer's output without their padding."""
    if "input_ids" not in example:
        raise CalibrationError(f"{where}: has no 'input_ids' (it has {', '.join(map(str, example)) or 'nothing'})")
    ids = np.atleast_2d(_integers(example["input_ids"], where))
    mask = example.get("attention_mask")
    block = ready_rows(
        ids, None if mask is None else np.atleast_2d(np.asarray(mask)), where=where, rows=None, length=None
    )
    if block.mask is None:
        return list(block.ids)
    return [row[: int(real.sum())] for row, real in zip(block.ids, block.mask, strict=True)]


def _integers(value: Any, where: str) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except ValueError as error:
        raise CalibrationError(f"{where}: is ragged; give one flat list of token ids per example") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(f"{where}: holds {ids.dtype}, not token ids; give texts, or lists of integers")
    return ids


def _padded(sequences: Sequence[np.ndarray], pad: int) -> RowBlock:
    """One row per sequence, padded at the end; no mask where all are equally long."""
    lengths = np.array([len(ids) for ids in sequences])
    ids = np.full((len(sequences), int(lengths.max())), pad, dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    mask = None
    if lengths.min() < lengths.max():
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32)
    return RowBlock(domain=EXAMPLES, ids=ready_rows(ids, None, where=_WHERE, rows=None, length=None).ids, mask=mask)
