"""Transforms: exact rewritings of a full-precision model before anything is measured; what it computes stays the same.

The result is a plain model of the same architecture. A transform names the tensors that it changes and how to compute
each; the reader (`exl2jax.models.transform`) asks for them one at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exl2jax.variants.registry import NoSettings, variant

LAYER_NORM = "LayerNorm in place of RMSNorm"
POST_NORMS = "norms after its sublayers"
POSITIONS = "learned positions"
NORMED_HEAD = "a head that is normalised"
TOWER = "a vision tower that writes into the stream"
NO_GATE = "an activation between up and down"
CLIPPED = "clipped values"

type Read = Callable[[str], np.ndarray]
"""A tensor of the source in float32, `[out_features, in_features]` of a linear; a tied head gives the embedding."""

type Rewritten = dict[str, Callable[[], np.ndarray]]
"""A function for each tensor that changes, by name, which computes its new value; shapes stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Keys of two linears; output `source[i]` of `first` is read by input `i` of `second`, in proportion."""

    first: str
    second: str
    source: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A model as a transform sees it: names of tensors, and how they depend on each other.

    `traits` are the properties that an exact rewriting may not handle. `embedding` and `head` are tensors; a tied head
    becomes a tensor of its own when it is rewritten. `readers` are the weights, routers included, that read the
    residual stream through a norm, by the tensor of the norm's weight, to which `offset` is added. `writers` are the
    keys of linears that write to the stream, `pairs` those of which one reads the other's outputs, `biased` the keys of
    linears with a bias.
    """

    name: str
    traits: frozenset[str]
    hidden: int
    embedding: str
    head: str
    offset: float
    readers: Mapping[str, Sequence[str]]
    writers: Sequence[str]
    pairs: Sequence[Pair]
    biased: frozenset[str]


@variant("transform", "none")
def none(model: Layout, read: Read, settings: NoSettings) -> Rewritten:
    """The model as it is, as stock takes it."""
    return {}
