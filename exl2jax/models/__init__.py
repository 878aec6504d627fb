"""Models: the architecture registry, configuration, Flax decoder blocks, and loading one block at a time."""

from exl2jax.models.config import ModelConfig, read_config
from exl2jax.models.decoder import Decoder, Module, build_decoder
from exl2jax.models.modules import (
    LinearSpec,
    ModuleSpec,
    embedding_shapes,
    head_norm_spec,
    head_spec,
    module_specs,
    slots_of,
)
from exl2jax.models.source import Exl2Model, HFModel, Model, load_exl2, open_model
from exl2jax.models.tensors import to_source

__all__ = [
    "Decoder",
    "Exl2Model",
    "HFModel",
    "LinearSpec",
    "Model",
    "ModelConfig",
    "Module",
    "ModuleSpec",
    "build_decoder",
    "embedding_shapes",
    "head_norm_spec",
    "head_spec",
    "load_exl2",
    "module_specs",
    "open_model",
    "read_config",
    "slots_of",
    "to_source",
]
