"""Transforms: exact rewritings of a full-precision model before anything is measured; what it computes stays the same.

The result is a plain model of the same architecture. A transform names the tensors that it changes and how to compute
each; the reader (`exl2jax.models.transform`) asks for them one at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from exl2jax.errors import SettingsError
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
"""What computes the new value of each tensor that changes, by name; shapes stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Keys of two linears; output `source[i]` of `first` is read by input `i` of `second`, in proportion."""

    first: str
    second: str
    source: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A model as a transform sees it: names of tensors, and what they are to each other.

    `traits` are what an exact rewriting may founder on. `embedding` and `head` are tensors; a head that is tied becomes
    a tensor of its own where it is rewritten. `readers` are the weights, routers too, that read the residual stream
    through a norm, by the tensor of the norm's weight, to which `offset` is added. `writers` are the keys of linears
    that write to the stream, `pairs` those that follow each other, `biased` the keys of linears with a bias.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationSettings:
    """The seed that the rotation is drawn from."""

    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no generator takes."""
        if self.seed < 0:
            raise ValueError("seed must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualizeSettings:
    """How far ranges are brought together: not at all at 0, to the same at 0.5, beyond it to the other linear's."""

    strength: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what would drive ranges apart."""
        if not 0 <= self.strength <= 1:
            raise ValueError("strength must lie between 0 and 1")


@variant("transform", "none")
def none(model: Layout, read: Read, settings: NoSettings) -> Rewritten:
    """The model as it is, as stock takes it."""
    return {}


@variant("transform", "rotation", RotationSettings)
def rotation(model: Layout, read: Read, settings: RotationSettings) -> Rewritten:
    """Norms folded into what reads them, the residual stream turned by a random orthogonal matrix (QuaRot,
    arXiv:2404.00456; the first rotation of SpinQuant, arXiv:2405.16406): it spreads channels that stand out.
    """  # noqa: D205
    _refuse(model, "rotation", LAYER_NORM, POST_NORMS, POSITIONS, NORMED_HEAD, TOWER)
    turn = cache(partial(orthogonal, model.hidden, settings.seed))

    def rows(name: str) -> np.ndarray:
        return read(name) @ turn()

    def reader(name: str, norm: str) -> np.ndarray:
        return (read(name) * (read(norm) + np.float32(model.offset))) @ turn()

    def writer(name: str) -> np.ndarray:
        return turn().T @ read(name)

    new: Rewritten = {model.embedding: partial(rows, model.embedding)}
    for norm, weights in model.readers.items():
        new[norm] = partial(np.full, model.hidden, 1 - model.offset)
        new |= {name: partial(reader, name, norm) for name in weights}
    for key in model.writers:
        new[f"{key}.weight"] = partial(writer, f"{key}.weight")
        if key in model.biased:
            new[f"{key}.bias"] = partial(rows, f"{key}.bias")
    return new


@variant("transform", "equalize", EqualizeSettings)
def equalize(model: Layout, read: Read, settings: EqualizeSettings) -> Rewritten:
    """Channels between v and o, up and down scaled so that both linears have the same range in them (cross-layer
    equalization, arXiv:1906.04721, section 4.1); key/value heads once for all queries that share them.
    """  # noqa: D205
    _refuse(model, "equalize", NO_GATE, CLIPPED)
    new: Rewritten = {}
    for pair in model.pairs:
        new |= _equalized(pair, read, settings.strength, bias=pair.first in model.biased)
    return new


def orthogonal(size: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix `[size, size]` float32, uniform among all (Haar), drawn in float64 from `seed`."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return (q * np.sign(np.diagonal(r))).astype(np.float32)  # without the signs, not uniform (arXiv:math-ph/0609050)


def _equalized(pair: Pair, read: Read, strength: float, *, bias: bool) -> Rewritten:
    """The tensors of two linears with `first`'s outputs divided by a factor and `second`'s inputs multiplied."""
    first, second = f"{pair.first}.weight", f"{pair.second}.weight"

    @cache
    def factor() -> np.ndarray:
        outputs = np.abs(read(first)).max(axis=1).astype(np.float64)
        inputs = np.zeros_like(outputs)
        np.maximum.at(inputs, pair.source, np.abs(read(second)).max(axis=0))
        alive = (outputs > 0) & (inputs > 0)  # a channel of nothing has no range to match
        ratio = np.divide(outputs, inputs, out=np.ones_like(outputs), where=alive)
        return (ratio**strength).astype(np.float32)

    new: Rewritten = {
        first: lambda: read(first) / factor()[:, None],
        second: lambda: read(second) * factor()[pair.source],
    }
    if bias:
        new[f"{pair.first}.bias"] = lambda: read(f"{pair.first}.bias") / factor()
    return new


def _refuse(model: Layout, transform: str, *obstacles: str) -> None:
    """Raise `SettingsError` for the first obstacle that the model has."""
    for trait in obstacles:
        if trait in model.traits:
            raise SettingsError(
                f"transform {transform}: {model.name} has {trait}, which this rewriting would not leave as it is; "
                "choose another transform, or none"
            )
