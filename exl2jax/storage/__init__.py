"""Files: lazy safetensors reading, atomic writing, shards. Knows names and bytes, nothing of models or jobs."""

from exl2jax.storage.atomic import (
    copy_file,
    make_directory,
    read_json,
    remove,
    reserve,
    storing,
    sweep,
    write_atomically,
    write_bytes,
    write_json,
    write_tensors,
)
from exl2jax.storage.checked import read_checked_tensors, write_checked_tensors
from exl2jax.storage.headers import TensorHead
from exl2jax.storage.shards import ShardWriter, is_shard, shards_size
from exl2jax.storage.tensors import TensorFiles

__all__ = [
    "ShardWriter",
    "TensorFiles",
    "TensorHead",
    "copy_file",
    "is_shard",
    "make_directory",
    "read_checked_tensors",
    "read_json",
    "remove",
    "reserve",
    "shards_size",
    "storing",
    "sweep",
    "write_atomically",
    "write_bytes",
    "write_checked_tensors",
    "write_json",
    "write_tensors",
]
