"""Cost of a linear's weight error at each width, tile by tile: the record that bits are allocated by.

A cost is the expected KL divergence of the model's next-token distributions, in nats per token, that the error of one
tile of 32 permuted rows causes. Few widths and group sizes are measured; the others follow from them (`costs`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.errors import MeasurementError
from exl2jax.models import LinearSpec, ModuleSpec
from exl2jax.qparams import FORMAT_BITS, ROW_MULTIPLE, QParams
from exl2jax.stream.token_classes import CLASSES

SECTION = "sensitivity"
"""Key of this record in a measurement file, beside stock's `measurement`."""

TOKEN_WEIGHTS = "token_weights"
"""Key of a linear's weights of tokens, beside its costs."""

type Setting = tuple[int, int]
"""Bit width and group size of a run at one width."""

MEASURED: tuple[Setting, ...] = ((5, 128), (4, 128), (4, 32), (3, 128), (3, 32), (2, 128), (2, 32))
"""Settings that are run; wider codes follow the law of their step, other group sizes lie between."""

SIZES = (32, 64, 128)

LEAST_COST = 1e-120
"""The least cost of a tile at zero bits, in nats: below all that is measured, and its square is still a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearCosts:
    """Costs of a linear `[rows, columns]`: for each measured setting an array `[rows / 32]` float64 in nats.

    `widths` are the code widths that allocation may choose from. `token_weights [CLASSES]` weigh the tokens of the
    Hessian (`exl2jax.stream.token_classes`), None where all count alike.
    """

    rows: int
    columns: int
    measured: Mapping[Setting, np.ndarray]
    widths: tuple[int, ...] = FORMAT_BITS
    token_weights: np.ndarray | None = None

    def costs(self) -> dict[Setting, np.ndarray]:
        """Costs at every width and group size of the format, widest first.

        A group size of 64 lies half way (geometrically) between 32 and 128; the gain of small groups at 5 bits and
        more is that at 4; a width's error falls with the square of its number of steps.
        """
        # The least costs fall with the width: where nothing was measured, more bits still count as better.
        known = {(b, g): np.maximum(c, LEAST_COST * 4.0**-b) for (b, g), c in self.measured.items()}
        known[5, 32] = known[5, 128] * known[4, 32] / known[4, 128]
        for bits in (6, 8):
            for size in (32, 128):
                known[bits, size] = known[5, size] * ((2**5 - 1) / (2**bits - 1)) ** 2
        for bits in FORMAT_BITS:
            known[bits, 64] = np.sqrt(known[bits, 32] * known[bits, 128])
        return {(b, g): known[b, g] for b in sorted(self.widths, reverse=True) for g in SIZES}

    def cost(self, qparams: QParams) -> float:
        """Cost of a mixture of allowed widths, in nats."""
        known, sizes = self.costs(), dict(zip(qparams.bits, qparams.group_size, strict=True))
        tiles = [
            (g.bits, slice(g.start // ROW_MULTIPLE, (g.start + g.rows) // ROW_MULTIPLE))
            for g in qparams.groups(self.rows)
        ]
        return sum(float(known[bits, sizes[bits]][part].sum()) for bits, part in tiles)

    @property
    def ends(self) -> tuple[QParams, QParams]:
        """The cheapest and the dearest setting of the allowed widths."""
        return width_ends(self.widths)

    def to_json(self) -> dict[str, list[float]]:
        """Lists by `BITS:GROUP_SIZE`, six digits, and the weights of tokens."""
        costs = {f"{b}:{g}": _digits(tiles) for (b, g), tiles in self.measured.items()}
        return costs if self.token_weights is None else {**costs, TOKEN_WEIGHTS: _digits(self.token_weights)}

    @classmethod
    def from_json(cls, record: Any, spec: LinearSpec, where: str) -> "LinearCosts":
        """Read the costs of the linear `spec`; `where` names it in errors."""
        measured = {}
        for bits, size in MEASURED:
            tiles = record.get(f"{bits}:{size}") if isinstance(record, dict) else None
            if not isinstance(tiles, list) or len(tiles) != spec.rows // ROW_MULTIPLE:
                raise MeasurementError(f"{where}: needs {spec.rows // ROW_MULTIPLE} costs at {bits}:{size}")
            if not all(map(_is_cost, tiles)):
                raise MeasurementError(f"{where}: the costs at {bits}:{size} must be numbers of at least 0")
            measured[bits, size] = np.asarray(tiles, np.float64)
        weights = record.get(TOKEN_WEIGHTS)
        if weights is not None:
            if not (isinstance(weights, list) and len(weights) == CLASSES and all(map(_is_cost, weights))):
                raise MeasurementError(f"{where}: {TOKEN_WEIGHTS} must be {CLASSES} numbers of at least 0")
            weights = np.asarray(weights, np.float32)
        return cls(rows=spec.rows, columns=spec.columns, measured=measured, token_weights=weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """Costs of all linears by key; `method` names their source, over `rows` rows of the backward pass."""

    method: str
    rows: int
    linears: Mapping[str, LinearCosts]

    @property
    def token_weights(self) -> dict[str, np.ndarray]:
        """Weights of tokens by key of a linear; empty where all count alike."""
        return {key: x.token_weights for key, x in self.linears.items() if x.token_weights is not None}

    def to_json(self) -> dict[str, Any]:
        """The section of the measurement file."""
        costs = {key: costs.to_json() for key, costs in self.linears.items()}
        return {"method": self.method, "rows": self.rows, "unit": "nats per token", "linears": costs}

    @classmethod
    def from_json(cls, record: Any, specs: Sequence[ModuleSpec], path: Path) -> "Sensitivity":
        """Read the section for the linears of `specs`; `MeasurementError` names the missing part."""
        linears = record.get("linears") if isinstance(record, dict) else None
        if not isinstance(linears, dict):
            raise MeasurementError(f"{path}: {SECTION} holds no linears; run the measurement pass again")
        found = {
            linear.key: LinearCosts.from_json(linears.get(linear.key), linear, f"{path}: {linear.key}")
            for spec in specs
            for linear in spec.linears
        }
        return cls(method=str(record.get("method", "")), rows=int(record.get("rows", 0)), linears=found)


def _digits(values: np.ndarray) -> list[float]:
    return [float(f"{x:.6g}") for x in values]


def _is_cost(x: Any) -> bool:
    return isinstance(x, int | float) and 0 <= x < float("inf")


def pure_qparams(setting: Setting) -> QParams:
    """The setting that gives every row one width."""
    return QParams(bits=(setting[0],), bits_prop=(1.0,), group_size=(setting[1],))


def width_ends(widths: Sequence[int]) -> tuple[QParams, QParams]:
    """The cheapest and the dearest setting of some widths."""
    return pure_qparams((min(widths), max(SIZES))), pure_qparams((max(widths), min(SIZES)))
