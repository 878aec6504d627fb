"""Text from a model, token by token: what `exl2jax generate` and completion tasks of the harness show."""

from exl2jax.generation.generate import CHUNK, Generation, encode_prompt, generate
from exl2jax.generation.resident import ResidentModel, load_resident
from exl2jax.generation.sampling import Sampling

__all__ = ["CHUNK", "Generation", "ResidentModel", "Sampling", "encode_prompt", "generate", "load_resident"]
