"""Rewritings of a full-precision model that spread or even out its channels."""

from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from exl2jax.errors import SettingsError
from exl2jax.variants import variant
from exl2jax.variants.transforms import (
    CLIPPED,
    LAYER_NORM,
    NO_GATE,
    NORMED_HEAD,
    POSITIONS,
    POST_NORMS,
    TOWER,
    Layout,
    Pair,
    Read,
    Rewritten,
)


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


@variant("transform", "rotation", RotationSettings)
def rotation(model: Layout, read: Read, settings: RotationSettings) -> Rewritten:
    """Norms folded into what reads them, the residual stream turned by a random orthogonal matrix (QuaRot,
    arXiv:2404.00456; the first rotation of SpinQuant, arXiv:2405.16406): it spreads channels that stand out.

    Measured: 0.543 and 0.328 where `best` had 0.490 and 0.309.
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

    Measured: 0.522 and 0.301 where `best` had 0.490 and 0.309.
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
