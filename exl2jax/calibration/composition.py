"""Rows of each domain: the standard set's composition, and the sharing of rows in proportion."""

from collections.abc import Sequence

from exl2jax.errors import SettingsError

WEB, WIKI, CODE, TINY = "web", "wiki", "code", "tiny"
MULTILINGUAL, SHUFFLED, RANDOM, TECHNICAL, NOISE = (
    "multilingual",
    "multilingual-shuffled",
    "random",
    "technical",
    "noise",
)

TEXT_DOMAINS = (WEB, WIKI, CODE, TINY, MULTILINGUAL, TECHNICAL)
"""Domains read from a text file each; each keeps at least one row as long as there are rows enough."""

type Composition = tuple[tuple[str, int], ...]
"""Pairs of domain and number of rows, in row order."""

QUANTIZE_ROWS: Composition = (
    (WEB, 10),
    (WIKI, 48),
    (CODE, 15),
    (TINY, 10),
    (MULTILINGUAL, 15),
    (SHUFFLED, 5),
    (RANDOM, 2),
    (TECHNICAL, 10),
)
"""The 115 rows of the quantization pass (docs/format.md 5.1)."""

MEASURE_ROWS: Composition = (
    (WEB, 2),
    (WIKI, 4),
    (CODE, 3),
    (TINY, 2),
    (MULTILINGUAL, 3),
    (SHUFFLED, 1),
    (RANDOM, 2),
    (TECHNICAL, 2),
)
"""The 19 rows of the measurement pass."""

_NOISE_ROWS = {"Qwen2VLForConditionalGeneration": (5, 30), "Qwen2_5_VLForConditionalGeneration": (5, 30)}
"""Noise rows of the measurement and the quantization pass by architecture, as the stock converter adds them."""


def noise_rows(architecture: str, measure: bool) -> int:
    """Noise rows that an architecture asks for in a pass, on top of the composition."""
    return _NOISE_ROWS.get(architecture, (0, 0))[0 if measure else 1]


def standard_composition(measure: bool, rows: int | None) -> Composition:
    """The standard set's composition, scaled to `rows` in all where given (noise rows not counted)."""
    full = MEASURE_ROWS if measure else QUANTIZE_ROWS
    total = sum(count for _, count in full)
    if rows is None or rows == total:
        return full
    counts = share([count for _, count in full], rows, keep=[domain in TEXT_DOMAINS for domain, _ in full])
    return tuple((domain, count) for (domain, _), count in zip(full, counts, strict=True))


def share(weights: Sequence[int], total: int, keep: Sequence[bool] | None = None) -> list[int]:
    """Share `total` rows out in proportion to `weights` by the method of largest remainders.

    Ties go to the earlier entry. Entries marked in `keep` get at least one row as long as `total` allows one each,
    taken from the entry that has most.
    """
    if not weights or min(weights) < 0 or sum(weights) == 0:
        raise SettingsError(f"calibration: cannot share {total} rows in the proportions {list(weights)}")
    whole = sum(weights)
    counts = [weight * total // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(weights[i] * total % whole), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    kept = [i for i, marked in enumerate(keep or [False] * len(weights)) if marked]
    if total >= len(kept):
        for i in kept:
            if counts[i] == 0:
                counts[_largest(counts, kept)] -= 1
                counts[i] = 1
    return counts


def _largest(counts: Sequence[int], kept: Sequence[int]) -> int:
    """Index of the entry that can best spare a row: of those that need none first, then the one that has most."""
    return max(range(len(counts)), key=lambda i: (counts[i] - (1 if i in kept else 0), counts[i], -i))
