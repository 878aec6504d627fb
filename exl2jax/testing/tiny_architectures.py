"""A tiny random model of every architecture, all its options on, as a Hugging Face directory."""

from exl2jax.testing.tiny_dense import DENSE
from exl2jax.testing.tiny_layout import TinyArchitecture
from exl2jax.testing.tiny_sparse import SPARSE
from exl2jax.testing.tiny_vision import VISION

TINY: dict[str, TinyArchitecture] = DENSE | SPARSE | VISION
