"""A model directory opened for writing text: weights in memory as far as they fit, tokenizer, end tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.calibration import Tokenizer, load_tokenizer
from exl2jax.errors import ModelError
from exl2jax.models import Decoder, Model, build_decoder, open_model
from exl2jax.storage import read_json
from exl2jax.stream.stepping import Walk, in_single, resident_walk


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidentModel:
    """The parts of a model that generation needs.

    `ends` are the ids that end a text, `table` the embeddings `[vocab, D]`, `walk` a pass over its modules.
    """

    directory: Path
    model: Model
    decoder: Decoder
    tokenizer: Tokenizer
    table: np.ndarray
    head: Any
    walk: Walk
    ends: frozenset[int]

    @property
    def context(self) -> int:
        """The most tokens of a text, the prompt included."""
        return self.model.config.max_position

    @property
    def first_id(self) -> int:
        """The token that a text without a context follows: the first one that the model names."""
        known = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return next((i for i in known if i is not None), 0)


def load_resident(directory: Path, tokenizer: Tokenizer | None = None) -> ResidentModel:
    """Read a Hugging Face or EXL2 directory; `tokenizer` is its own where that has been read already."""
    tokenizer = tokenizer or load_tokenizer(directory)
    model = open_model(directory)
    return ResidentModel(
        directory=directory,
        model=model,
        decoder=build_decoder(model.config),
        tokenizer=tokenizer,
        table=model.embedding(),
        head=in_single(model.head_params()),
        walk=resident_walk(model),
        ends=_end_ids(directory, tokenizer),
    )


def _end_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokenizer's end token, and those that `generation_config.json` names."""
    path = directory / "generation_config.json"
    record = read_json(path, ModelError, "the settings of generation") if path.is_file() else {}
    named = record.get("eos_token_id") if isinstance(record, dict) else None
    found = named if isinstance(named, list) else [named]
    return frozenset(i for i in (tokenizer.eos_id, *found) if isinstance(i, int) and not isinstance(i, bool))
