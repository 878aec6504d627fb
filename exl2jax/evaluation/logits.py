"""The whole forward pass of a directory, block by block."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exl2jax.models import Model, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.stream.blocks import Block, forward_block
from exl2jax.stream.forward import embed, head_logits
from exl2jax.stream.memory import give_back
from exl2jax.stream.streams import Rows, Stream, fold


def walk(model: Model, input_ids: np.ndarray) -> Iterator[tuple[ModuleSpec, np.ndarray]]:
    """Every module and the hidden states `[R, T, D]` after it, one block resident; the next module overwrites them."""
    decoder = build_decoder(model.config)
    rows = Rows.of(np.ones(input_ids.shape), model.config.hidden_size, resident=False)
    states = rows.place(embed(model, input_ids))
    for spec in module_specs(model.config):
        states, _ = forward_block(decoder, Block.of(model, spec), states)
        give_back()
        yield spec, states.array()


def final_states(model: Model, input_ids: np.ndarray) -> np.ndarray:
    """Hidden states `[R, T, D]` after the last layer."""
    *_, (_, states) = walk(model, input_ids)
    return states


def model_logits(directory: Path, input_ids: np.ndarray) -> np.ndarray:
    """Logits `[R, T, vocab]` float32 of a Hugging Face or EXL2 directory on `input_ids [R, T]`."""
    model = open_model(directory)
    states = final_states(model, input_ids)
    decoder, params = build_decoder(model.config), model.head_params()
    rows = Rows.of(np.ones(input_ids.shape), model.config.hidden_size, resident=False)
    out = Stream.empty(rows.spans, (input_ids.shape[1], model.config.vocab_size), resident=False)
    fold(lambda total, h: (total, (head_logits(decoder, params, h),)), None, (rows.place(states),), (out,))
    return out.array()
