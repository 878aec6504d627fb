import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2jax.calibration.composition import TEXT_DOMAINS, share, standard_composition
from exl2jax.calibration.seeds import stream, substream_seed
from exl2jax.errors import SettingsError


def test_the_full_set_is_the_stock_one() -> None:
    order = ["web", "wiki", "code", "tiny", "multilingual", "multilingual-shuffled", "random", "technical"]
    assert standard_composition(False, None) == tuple(zip(order, [10, 48, 15, 10, 15, 5, 2, 10], strict=True))
    assert standard_composition(True, None) == tuple(zip(order, [2, 4, 3, 2, 3, 1, 2, 2], strict=True))
    assert standard_composition(False, 115) == standard_composition(False, None)


@settings(deadline=None)
@given(rows=st.integers(1, 400), measure=st.booleans())
def test_scaling_keeps_order_total_and_text_domains(rows: int, measure: bool) -> None:
    scaled = standard_composition(measure, rows)
    full = standard_composition(measure, None)
    assert [domain for domain, _ in scaled] == [domain for domain, _ in full]
    assert sum(count for _, count in scaled) == rows
    assert all(count >= 0 for _, count in scaled)
    if rows >= len(TEXT_DOMAINS):
        assert all(count >= 1 for domain, count in scaled if domain in TEXT_DOMAINS)


@settings(deadline=None)
@given(weights=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any), total=st.integers(0, 300))
def test_share_is_within_one_of_the_exact_quota(weights: list[int], total: int) -> None:
    counts = share(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight * total / sum(weights)) < 1


def test_share_by_hand() -> None:
    assert share([5, 3, 2], 10) == [5, 3, 2]
    assert share([1, 1, 1], 4) == [2, 1, 1]
    assert share([98, 1, 1], 5) == [5, 0, 0]
    assert share([98, 1, 1], 5, keep=[True, True, True]) == [3, 1, 1]
    assert share([98, 1, 1], 2, keep=[True, True, True]) == [2, 0, 0]
    with pytest.raises(SettingsError):
        share([0, 0], 4)


def test_streams_are_named_and_stable() -> None:
    """Literal values: a change would change the bytes of every job."""
    assert stream(0, "random").integers(0, 1000, 6, dtype=np.int64).tolist() == [778, 839, 149, 442, 515, 787]
    assert stream(0, "random").integers(0, 1000, 6).tolist() != stream(1, "random").integers(0, 1000, 6).tolist()
    assert stream(0, "random").integers(0, 1000, 6).tolist() != stream(0, "self").integers(0, 1000, 6).tolist()
    assert substream_seed(0, "self") == 1690235818
