"""Text that the full-precision model writes itself, for the calibration source `self`.

All rows of a batch grow by one token at a time: each module runs once per token over its cache of keys and values,
which costs about what one forward pass over the finished rows costs. Drawing is plain sampling at temperature one.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.calibration import Sampler
from exl2jax.calibration.ready import read_ready
from exl2jax.errors import Interrupted
from exl2jax.models import Decoder, Model, ModelConfig, build_decoder
from exl2jax.models.kv_cache import turns, widened
from exl2jax.storage import write_tensors
from exl2jax.stream.forward import head_logits
from exl2jax.stream.progress import RunControl
from exl2jax.stream.stepping import Embeddings, Walk, empty_caches, resident_walk, step_tokens

CACHE_BYTES = 2 << 30
"""Keys and values held at once; rows beyond wait for the next batch."""

STRETCHES = 8
"""The cache is widened this many times on the way to a full row: few compilations, little empty room."""


def model_sampler(model: Model, vocab: int, control: RunControl | None = None) -> Sampler:
    """A sampler of the model, over the ids `0 .. vocab-1`: the same model, prompts and seed give the same rows.

    Calling it raises `Interrupted` when `control.stop` was asked; nothing of the weights is read before.
    """
    return partial(_sample, model, vocab, control or RunControl())


def remembered(sampler: Sampler, folder: Path, identity: str) -> Sampler:
    """The sampler, its rows kept in `folder` so that a job that goes on need not draw them again.

    `identity` stands for everything but the arguments that decides the rows: the model's weights and tokenizer.
    """

    def sample(prompts: Sequence[Sequence[int]], n_rows: int, length: int, seed: int) -> np.ndarray:
        asked = json.dumps([identity, [list(prompt) for prompt in prompts], n_rows, length, seed])
        path = folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"input_ids": sampler(prompts, n_rows, length, seed)})
        return read_ready(path, rows=n_rows, length=length).ids

    return sample


def _sample(
    model: Model,
    vocab: int,
    control: RunControl,
    prompts: Sequence[Sequence[int]],
    n_rows: int,
    length: int,
    seed: int,
) -> np.ndarray:
    """Rows `[n_rows, length]` int32 in batches whose caches fit in `CACHE_BYTES`."""
    config = model.config
    ids = np.zeros((n_rows, length), np.int32)
    given = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    chances = np.random.default_rng(seed).random((n_rows, length))
    embeddings = Embeddings(model.embedding(), model.positions(length))
    walk, head = resident_walk(model), jax.tree.map(jnp.asarray, model.head_params())
    batches = np.array_split(np.arange(n_rows), -(-n_rows // _batch_rows(config, length)))
    stretch = -(-length // STRETCHES)
    control.progress.start("sample", len(batches) * -(-(length - 1) // stretch), 0)
    for rows in batches:
        part = ids[rows]
        for position, hidden in enumerate(_hidden_states(build_decoder(config), walk, embeddings, part, stretch)):
            if control.stop.asked:
                raise Interrupted("stopped while sampling calibration rows; run the same command to start them again")
            drawn = given[rows] <= position + 1
            if drawn.any():
                weights = np.asarray(_weights(build_decoder(config), head, hidden, vocab))
                part[drawn, position + 1] = draw(weights, chances[rows, position + 1])[drawn]
            if (position + 1) % stretch == 0 or position == length - 2:
                control.progress.step(f"{position + 2} of {length} tokens of {len(rows)} rows")
        ids[rows] = part
    control.progress.finish()
    return ids


def draw(weights: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """One id per row of unnormalised probabilities `[B, V]`: the first whose cumulative share exceeds `chances [B]`."""
    totals = np.cumsum(weights, axis=1, dtype=np.float64)
    return np.array([np.searchsorted(t, u * t[-1], side="right") for t, u in zip(totals, chances, strict=True)])


def _batch_rows(config: ModelConfig, length: int) -> int:
    """Rows whose keys and values (float32) fit."""
    row = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * length
    return max(1, CACHE_BYTES // row)


def _hidden_states(
    decoder: Decoder, walk: Walk, embeddings: Embeddings, ids: np.ndarray, stretch: int
) -> Iterator[jax.Array]:
    """The final hidden states `[B, 1, D]` of positions `0 .. length-2`; `ids` is read when a position's turn comes.

    The caches start with room for `stretch` tokens and are widened by as many whenever they are full.
    """
    batch, length = ids.shape
    tables, caches = turns(decoder.config, length), empty_caches(decoder.config, batch, stretch)
    for position in range(length - 1):
        if position and position % stretch == 0:
            for i, cache in enumerate(caches):  # one after the other: never two whole sets in memory
                caches[i] = widened(cache, position + stretch)
        hidden = jnp.asarray(embeddings.at(ids[:, position, None], position))
        yield step_tokens(decoder, walk, hidden, caches, position, tables)


@partial(jax.jit, static_argnames=("decoder", "vocab"))
def _weights(decoder: Decoder, head: Any, h: jax.Array, vocab: int) -> jax.Array:
    """Unnormalised probabilities `[B, vocab]` of the next token."""
    logits = head_logits(decoder, head, h)[:, 0, :vocab]
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
