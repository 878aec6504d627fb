"""Quantization parameters of a linear: bit widths, their shares of the rows, group sizes, exact bits on disk."""

import math
from dataclasses import dataclass
from typing import Any

from exl2jax.errors import MeasurementError, SettingsError

FORMAT_BITS = (2, 3, 4, 5, 6, 8)
"""Code widths that the EXL2 format knows."""

ROW_MULTIPLE = 32
"""Group rows, matrix rows and padded columns come in multiples of this."""

GROUP_SIZES = (32, 64, 96, 128)
"""Rows a group can have; 96 occurs only as a short last group of a 128-row plan."""

MAX_ROWS = 65536
"""Most rows (`in_features`) a matrix may have in the format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A run of rows in packed order that shares one bit width and one `q_scale_max`."""

    bits: int
    start: int
    rows: int

    @property
    def words(self) -> int:
        """Rows of int32 words that the codes of one column fill."""
        return self.rows * self.bits // 32


@dataclass(frozen=True, kw_only=True, slots=True)
class QParams:
    """One way to quantize a linear.

    `bits` are code widths in non-increasing order, `bits_prop` the share of the rows each gets, `group_size` the rows
    of a group at each width. `scale_bits` is 4 in every EXL2 file. Hashable, so it can be static under `jit`.
    """

    bits: tuple[int, ...]
    bits_prop: tuple[float, ...]
    group_size: tuple[int, ...]
    scale_bits: int = 4

    def __post_init__(self) -> None:
        if not self.bits or not len(self.bits) == len(self.bits_prop) == len(self.group_size):
            raise SettingsError(f"qparams: bits, bits_prop and group_size must have one entry per width, got {self}")
        if any(b not in FORMAT_BITS for b in self.bits) or list(self.bits) != sorted(self.bits, reverse=True):
            raise SettingsError(f"qparams: bits must be among {FORMAT_BITS} and non-increasing, got {self.bits}")
        if any(g not in (32, 64, 128) for g in self.group_size):
            raise SettingsError(f"qparams: group_size must be 32, 64 or 128, got {self.group_size}")
        if any(not p > 0 for p in self.bits_prop) or abs(sum(self.bits_prop) - 1) > 1e-6:
            raise SettingsError(f"qparams: bits_prop must be positive and sum to 1, got {self.bits_prop}")
        if self.scale_bits != 4:
            raise SettingsError(f"qparams: scale_bits must be 4, got {self.scale_bits}")

    def groups(self, rows: int) -> tuple[Group, ...]:
        """Cut `rows` into whole groups: `ceil(min(rows * share, rows left) / group_size)` of each width, in order.

        The last width takes every row left; a short last group keeps a multiple of 32 rows (docs/format.md 3.1).
        """
        require_quantizable_rows(rows)
        out: list[Group] = []
        start = 0
        for i, (bits, share, size) in enumerate(zip(self.bits, self.bits_prop, self.group_size, strict=True)):
            left = rows - start
            wanted = left if i == len(self.bits) - 1 else min(rows * share, left)
            for _ in range(math.ceil(wanted / size)):
                taken = min(size, rows - start)
                out.append(Group(bits=bits, start=start, rows=taken))
                start += taken
        return tuple(out)

    def total_bits(self, rows: int, columns: int) -> int:
        """Bits a `[rows, columns]` matrix takes on disk, bias apart; equals the stored bytes times eight."""
        return group_bits(self.groups(rows), rows, columns)

    def to_json(self) -> dict[str, Any]:
        """The form that stock `measurement.json` files use."""
        sizes = {str(b): g for b, g in zip(self.bits, self.group_size, strict=True)}
        return {
            "group_size": sizes,
            "bits": list(self.bits),
            "bits_prop": list(self.bits_prop),
            "scale_bits": self.scale_bits,
        }

    @classmethod
    def from_json(cls, record: Any, where: str) -> "QParams":
        """Read the stock form; `group_size` may be a map by width, a list or one int. `where` names it in errors."""
        try:
            bits = tuple(int(b) for b in record["bits"])
            sizes = record["group_size"]
            if isinstance(sizes, dict):
                group_size = tuple(int(sizes[str(b)]) for b in bits)
            elif isinstance(sizes, list):
                group_size = tuple(int(g) for g in sizes)
            else:
                group_size = (int(sizes),) * len(bits)
            props = tuple(float(p) for p in record["bits_prop"])
            return cls(bits=bits, bits_prop=props, group_size=group_size, scale_bits=int(record.get("scale_bits", 4)))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            raise MeasurementError(f"{where}: not a valid projection setting ({e}): {record!r:.200}") from e


def require_quantizable_rows(rows: int, name: str = "matrix") -> None:
    """Raise `SettingsError` unless `rows` (`in_features`) is a positive multiple of 32 within the format's limit."""
    if rows <= 0 or rows % ROW_MULTIPLE or rows > MAX_ROWS:
        raise SettingsError(f"{name}: in_features is {rows}, EXL2 needs a multiple of 32 of at most {MAX_ROWS}")


def padded_columns(columns: int) -> int:
    """Columns rounded up to the multiple of 32 that the format stores."""
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


def group_bits(groups: tuple[Group, ...], rows: int, columns: int) -> int:
    """Bits on disk of a matrix cut into `groups`: codes, scale nibbles, maxima, group table and permutation."""
    n = padded_columns(columns)
    return sum(g.rows * g.bits * n + 16 + 32 + 4 * n for g in groups) + 32 * rows


def q(widths: str, shares: str, sizes: str) -> QParams:
    """Shorthand of the tables: `q("4/3", ".1/.9", "128")`; one size serves every width."""
    bits = tuple(int(b) for b in widths.split("/"))
    props = tuple(float(p) for p in shares.split("/"))
    given = tuple(int(g) for g in sizes.split("/"))
    return QParams(bits=bits, bits_prop=props, group_size=given if len(given) > 1 else given * len(bits))
