"""Advice for a tensor that is missing or has a wrong shape: the usual causes, told by the other tensors."""

import re
from collections.abc import Iterable

from exl2jax.models.config import CONFIG_NAME, ModelConfig

PREFIXES = {
    "_orig_mod.": "the model was saved while it was compiled",
    "module.": "the model was saved inside a parallel wrapper",
    "base_model.model.": "the model was saved inside an adapter; merge the adapter first",
}
"""Prefixes that savers put before every name, and the reason of each."""

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def stored_layers(names: Iterable[str]) -> int:
    """The number of layers in the names of tensors."""
    found = [int(match[1]) for match in map(_LAYER.search, names) if match and len(match[1]) < 9]
    return max(found, default=-1) + 1


def missing_hint(name: str, stored: Iterable[str], config: ModelConfig) -> str:
    """A likely reason for a missing tensor, as the end of a message; empty where none is known."""
    names = list(stored)
    for prefix, why in PREFIXES.items():
        if any(other.startswith(prefix) for other in names):
            return f"; names begin with {prefix!r} ({why}): remove it and save again"
    layers = stored_layers(names)
    if layers < config.num_layers and stored_layers([name]) > layers:
        return f"; {CONFIG_NAME} says {config.num_layers} layers, the files hold {layers}"
    return ""


def shape_hint(name: str, shape: tuple[int, ...], implied: tuple[int, ...], config: ModelConfig) -> str:
    """A likely reason for a wrong shape, as the end of a message; empty where none is known."""
    if 0 in shape:
        return "; it is an empty placeholder, as sharded trainers leave: gather the weights and save the model again"
    vocabulary = implied == (config.vocab_size, config.hidden_size) and len(shape) == 2
    if vocabulary and shape[1:] == implied[1:] and "layers." not in name:
        return f"; set vocab_size to {shape[0]} if the vocabulary was resized"
    return ""


def dtype_hint(dtype: str) -> str:
    """A likely reason for a wrong dtype, as the end of a message; empty where none is known."""
    if dtype in ("I8", "U8", "I32"):
        return "; these are quantized weights: take the original, or save the model again without load_in_8bit or 4bit"
    return ""
