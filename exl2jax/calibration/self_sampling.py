"""Rows that the full-precision model writes itself, without outside text."""

from collections.abc import Sequence
from itertools import chain, cycle, islice, zip_longest

import numpy as np

from exl2jax.calibration.prompts import PROMPTS
from exl2jax.calibration.records import RowBlock, Sampler
from exl2jax.calibration.seeds import substream_seed
from exl2jax.calibration.source import SELF
from exl2jax.calibration.tokenizer import Tokenizer
from exl2jax.errors import CalibrationError, SettingsError


def self_rows(
    sampler: Sampler | None,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    seed: int,
    only: Sequence[str] = (),
    purpose: str = SELF,
) -> RowBlock:
    """Rows sampled from the model: every other one from BOS alone, the rest from prompts of each domain in turn.

    `only` names the domains to prompt for, one per row (then no row starts from BOS alone). A model without BOS gets
    prompts only. `purpose` separates the random streams of several calls in one job.
    """
    if sampler is None:
        raise SettingsError("calibration source 'self' samples from the model; pass a sampler to load_rows")
    prompts = [prompt[:length] for prompt in _prompts(tokenizer, rows, only)]
    ids = np.asarray(sampler(prompts, rows, length, substream_seed(seed, purpose)))
    if ids.shape != (rows, length) or not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(
            f"calibration source 'self': the sampler gave {ids.dtype} {list(ids.shape)}, not integers {[rows, length]}"
        )
    return RowBlock(domain=SELF, ids=ids.astype(np.int32))


def _prompts(tokenizer: Tokenizer, rows: int, only: Sequence[str]) -> list[list[int]]:
    """Token ids of each row's opening."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if only:
        queues = {domain: cycle(PROMPTS[domain]) for domain in set(only)}
        texts = [next(queues[domain]) for domain in only]
    else:
        in_turn = [text for text in chain.from_iterable(zip_longest(*PROMPTS.values())) if text is not None]
        asked = cycle(in_turn)
        texts = [("" if row % 2 == 0 and bos else next(asked)) for row in range(rows)]
    return [bos + tokenizer.encode(text).tolist() if text else list(bos) for text in islice(texts, rows)]
