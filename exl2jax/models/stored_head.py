"""The head of a source: a stored tensor, or the embedding that it is tied to."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from exl2jax.errors import ModelError
from exl2jax.models.config import CONFIG_NAME, ModelConfig
from exl2jax.models.modules import embedding_name, head_spec
from exl2jax.models.quantization import FLOAT_DTYPES
from exl2jax.models.tensors import SourceTensors

ROWS = 4096
"""Rows of the head that are compared at a time."""


def settle_head(tensors: SourceTensors, config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config with `tie_word_embeddings` set by the tensors, and a note where the config was wrong.

    A stored head that equals the embedding is tied. A head that differs is used, as `transformers` and stock do. Raises
    `ModelError` where the stored head is zero throughout, and where a config that says tied comes with a head of
    another shape or type.
    """
    name = f"{head_spec(config).key}.weight"
    if name not in tensors:
        return config, ()
    shape, dtype = tensors.shape(name), tensors.dtype(name)
    if shape != (config.vocab_size, config.hidden_size) or dtype not in FLOAT_DTYPES:
        if not config.tie_word_embeddings:
            return config, ()  # the check of headers names it
        raise ModelError(
            f"{tensors.file(name)}: {name} is {dtype} {list(shape)}, {CONFIG_NAME} implies floats "
            f"[{config.vocab_size}, {config.hidden_size}]; delete the tensor if the head is the embedding "
            "(tie_word_embeddings), or store the right one"
        )
    if not any(rows.any() for rows in _pieces(tensors, name, config)):
        raise ModelError(
            f"{tensors.file(name)}: {name} is zero throughout, so no token can be predicted; delete the tensor and set "
            f"tie_word_embeddings to true in {CONFIG_NAME} if the head is the embedding, else download the model again"
        )
    embedding = embedding_name(config)
    if not config.tie_word_embeddings or embedding not in tensors or tensors.shape(embedding) != shape:
        return config, ()
    both = zip(_pieces(tensors, name, config), _pieces(tensors, embedding, config), strict=True)
    if all(np.array_equal(head, rows) for head, rows in both):
        return config, ()
    note = (
        f"{name} is stored and differs from the embedding: it is the head, although {CONFIG_NAME} says "
        "tie_word_embeddings"
    )
    return replace(config, tie_word_embeddings=False), (note,)


def _pieces(tensors: SourceTensors, name: str, config: ModelConfig) -> Iterator[np.ndarray]:
    """A tensor of one row for each token, float32, some rows at a time."""
    for start in range(0, config.vocab_size, ROWS):
        yield tensors.read(name, slice(start, min(start + ROWS, config.vocab_size))).astype(np.float32)
