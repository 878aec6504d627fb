"""Files: lazy safetensors reading, atomic writing, shards. Knows names and bytes, nothing of models or jobs."""

from exl2jax.storage.atomic import make_directory, read_json, write_atomically, write_json, write_tensors
from exl2jax.storage.shards import ShardWriter, is_shard
from exl2jax.storage.tensors import TensorFiles

__all__ = [
    "ShardWriter",
    "TensorFiles",
    "is_shard",
    "make_directory",
    "read_json",
    "write_atomically",
    "write_json",
    "write_tensors",
]
