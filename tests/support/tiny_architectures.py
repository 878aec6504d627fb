"""A tiny random model of every architecture, all its options on, as a Hugging Face directory."""

from tests.support.tiny_dense import DENSE
from tests.support.tiny_layout import TinyArchitecture
from tests.support.tiny_sparse import SPARSE
from tests.support.tiny_vision import VISION

TINY: dict[str, TinyArchitecture] = DENSE | SPARSE | VISION
