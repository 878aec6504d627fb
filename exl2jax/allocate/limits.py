"""Limits on the allocation: linears pinned to one width, and widths that are excluded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from exl2jax.errors import SettingsError
from exl2jax.measure.measurement import Candidate, Measurement
from exl2jax.models import ModuleSpec
from exl2jax.qparams import FORMAT_BITS


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """`pins` are `(pattern, bits)`, the last that matches a linear's key decides; `excluded` are widths.

    A pin stands over an exclusion. Patterns are those of file names: `model.layers.0.*`.
    """

    pins: tuple[tuple[str, int], ...] = ()
    excluded: tuple[int, ...] = ()

    @classmethod
    def parse(cls, pins: Sequence[str], excluded: Sequence[int]) -> "Limits":
        """From `PATTERN=BITS` and widths; `SettingsError` names what is wrong."""
        found = []
        for pin in pins:
            pattern, _, bits = pin.rpartition("=")
            if not pattern or not bits.strip().isdigit() or int(bits) not in FORMAT_BITS:
                raise SettingsError(f"`pins` {pin!r} must be PATTERN=BITS with bits among {FORMAT_BITS}")
            found.append((pattern.strip(), int(bits)))
        unknown = [bits for bits in excluded if bits not in FORMAT_BITS]
        if unknown or set(excluded) >= set(FORMAT_BITS):
            raise SettingsError(f"`exclude_bits` {list(excluded)}: must leave some of {FORMAT_BITS} and name no others")
        return cls(pins=tuple(found), excluded=tuple(sorted(set(excluded))))

    def widths(self, key: str) -> tuple[int, ...]:
        """The widths that a linear may have."""
        pinned = [bits for pattern, bits in self.pins if fnmatchcase(key, pattern)]
        return (pinned[-1],) if pinned else tuple(b for b in FORMAT_BITS if b not in self.excluded)

    def require_matches(self, specs: Sequence[ModuleSpec]) -> None:
        """Refuse a pattern that matches no linear, since it is a typing error."""
        keys = [linear.key for spec in specs for linear in spec.linears]
        for pattern, bits in self.pins:
            if not any(fnmatchcase(key, pattern) for key in keys):
                raise SettingsError(f"`pins` {pattern}={bits}: no linear is named so; one is {keys[0]}")

    def apply(self, measurement: Measurement, specs: Sequence[ModuleSpec]) -> Measurement:
        """The measurement without the settings that the limits forbid; `SettingsError` where none is left."""
        if not self.pins and not self.excluded:
            return measurement
        slots, rows = [slot for spec in specs for slot in spec.slots], measurement.modules
        left = {slot.key: self._left(slot, rows[slot.key]) for slot in slots if slot.key in rows}
        costs = measurement.sensitivity
        if costs is not None:
            linears = {key: replace(found, widths=self.widths(key)) for key, found in costs.linears.items()}
            return replace(measurement, modules=left, sensitivity=replace(costs, linears=linears))
        empty = [key for key, found in left.items() if not found]
        if empty:
            raise SettingsError(
                f"{empty[0]}: none of stock's candidates keeps to `pins` and `exclude_bits`; pin a whole module to a "
                "width of its own (4, 6 or 8), or take a preset that allocates by linear (best, fast)"
            )
        return replace(measurement, modules=left)

    def _left(self, spec: ModuleSpec, rows: Sequence[Candidate]) -> tuple[Candidate, ...]:
        allowed = {linear.name: set(self.widths(linear.key)) for linear in spec.linears}
        return tuple(row for row in rows if all(set(row.qparams[name].bits) <= allowed[name] for name in allowed))


NO_LIMITS = Limits()
