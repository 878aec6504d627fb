"""The architectures that can be converted. Each of them runs in stock ExLlamaV2 0.3.2."""

from exl2jax.models.architectures_dense import DENSE
from exl2jax.models.architectures_sparse import PARALLEL, SPARSE
from exl2jax.models.architectures_vision import VISION
from exl2jax.models.registry import Architecture

ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in (*DENSE, *SPARSE, *PARALLEL, *VISION)}
