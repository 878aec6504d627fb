"""Quantization parameters: the cut into groups, the bits they cost, and their JSON form."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2jax.errors import MeasurementError, SettingsError
from exl2jax.qparams import FORMAT_BITS, Group, QParams, padded_columns, q, require_quantizable_rows

ROWS = st.integers(1, 64).map(lambda tiles: 32 * tiles)


@st.composite
def settings_of_a_linear(draw: st.DrawFn) -> QParams:
    """One to three widths in falling order, shares in twentieths, any group sizes."""
    count = draw(st.integers(1, 3))
    bits = sorted(
        draw(st.lists(st.sampled_from(FORMAT_BITS), min_size=count, max_size=count, unique=True)), reverse=True
    )
    cuts = sorted(draw(st.lists(st.integers(1, 19), min_size=count - 1, max_size=count - 1, unique=True)))
    shares = [(b - a) / 20 for a, b in zip([0, *cuts], [*cuts, 20], strict=True)]
    sizes = draw(st.lists(st.sampled_from((32, 64, 128)), min_size=count, max_size=count))
    return QParams(bits=tuple(bits), bits_prop=tuple(shares), group_size=tuple(sizes))


def cut(qparams: QParams, rows: int) -> list[tuple[int, int]]:
    return [(g.bits, g.rows) for g in qparams.groups(rows)]


@pytest.mark.parametrize(
    ("qparams", "rows", "expected"),
    [
        (q("4", "1", "128"), 256, [(4, 128), (4, 128)]),
        (q("4", "1", "128"), 224, [(4, 128), (4, 96)]),
        (q("4/3", ".1/.9", "128"), 576, [(4, 128), (3, 128), (3, 128), (3, 128), (3, 64)]),
        (q("3/2", ".05/.95", "64"), 576, [(3, 64)] + [(2, 64)] * 8),
        (q("8/4/3", ".05/.1/.85", "32/128/128"), 576, [(8, 32), (4, 128), (3, 128), (3, 128), (3, 128), (3, 32)]),
        # 0.05 of 1536 rows is 76.8: three groups of 32.
        (q("8/4", ".05/.95", "32/128"), 1536, [(8, 32)] * 3 + [(4, 128)] * 11 + [(4, 32)]),
        # Too few rows for every width: the widest ones come first and nothing goes negative.
        (q("6/3/2", ".05/.2/.75", "32/64/64"), 32, [(6, 32)]),
        (q("6/3/2", ".05/.2/.75", "32/64/64"), 64, [(6, 32), (3, 32)]),
        (q("5/4", ".1/.9", "128"), 96, [(5, 96)]),
    ],
)
def test_cuts_by_hand(qparams: QParams, rows: int, expected: list[tuple[int, int]]) -> None:
    assert cut(qparams, rows) == expected


@given(settings_of_a_linear(), ROWS)
def test_groups_follow_the_format(qparams: QParams, rows: int) -> None:
    groups = qparams.groups(rows)
    assert sum(g.rows for g in groups) == rows
    assert [g.start for g in groups] == [sum(g.rows for g in groups[:i]) for i in range(len(groups))]
    assert all(0 < g.rows <= max(qparams.group_size) and g.rows % 32 == 0 for g in groups)
    widths = [g.bits for g in groups]
    assert widths == sorted(widths, reverse=True)
    assert set(widths) <= set(qparams.bits)


@given(settings_of_a_linear(), ROWS)
def test_every_width_gets_its_share_in_whole_groups(qparams: QParams, rows: int) -> None:
    groups = qparams.groups(rows)
    left = rows
    for bits, share, size in zip(qparams.bits[:-1], qparams.bits_prop[:-1], qparams.group_size[:-1], strict=True):
        got = [g.rows for g in groups if g.bits == bits]
        assert len(got) == math.ceil(min(rows * share, left) / size)
        left -= sum(got)
    assert sum(g.rows for g in groups if g.bits == qparams.bits[-1]) == left


@given(settings_of_a_linear(), ROWS, st.integers(1, 300))
def test_total_bits_counts_every_stored_tensor(qparams: QParams, rows: int, columns: int) -> None:
    groups = qparams.groups(rows)
    n = -(-columns // 32) * 32
    assert padded_columns(columns) == n
    stored = {
        "q_weight": sum(g.rows * g.bits // 32 for g in groups) * n * 4,
        "q_scale": len(groups) * n // 8 * 4,
        "q_scale_max": len(groups) * 2,
        "q_groups": 2 * len(groups) * 2,
        "q_invperm": rows * 4,
    }
    assert qparams.total_bits(rows, columns) == 8 * sum(stored.values())


def test_a_group_knows_its_words() -> None:
    assert [Group(bits=b, start=0, rows=96).words for b in FORMAT_BITS] == [6, 9, 12, 15, 18, 24]


@given(settings_of_a_linear())
def test_json_round_trip(qparams: QParams) -> None:
    assert QParams.from_json(qparams.to_json(), "here") == qparams
    assert hash(QParams.from_json(qparams.to_json(), "here")) == hash(qparams)


def test_json_is_the_stock_form() -> None:
    assert q("4/3", ".1/.9", "128").to_json() == {
        "group_size": {"4": 128, "3": 128},
        "bits": [4, 3],
        "bits_prop": [0.1, 0.9],
        "scale_bits": 4,
    }


@pytest.mark.parametrize("group_size", [{"4": 32, "3": 128}, [32, 128]])
def test_older_spellings_of_group_size(group_size: object) -> None:
    record = {"group_size": group_size, "bits": [4, 3], "bits_prop": [0.1, 0.9], "scale_bits": 4}
    assert QParams.from_json(record, "here") == q("4/3", ".1/.9", "32/128")


def test_one_group_size_for_every_width() -> None:
    record = {"group_size": 64, "bits": [4, 3], "bits_prop": [0.1, 0.9]}
    assert QParams.from_json(record, "here") == q("4/3", ".1/.9", "64")


@pytest.mark.parametrize(
    "damage",
    [
        {"bits": [7]},
        {"bits": []},
        {"bits": None},
        {"bits": [float("inf")]},
        {"bits": [3, 4], "bits_prop": [0.5, 0.5]},
        {"bits_prop": [0.5]},
        {"bits_prop": ["a"]},
        {"bits_prop": [float("nan")]},
        {"group_size": {"5": 128}},
        {"group_size": 48},
        {"group_size": None},
        {"group_size": float("inf")},
        {"scale_bits": 8},
    ],
)
def test_damaged_json_names_its_place(damage: dict[str, object]) -> None:
    record = {"group_size": {"4": 128}, "bits": [4], "bits_prop": [1], "scale_bits": 4} | damage
    with pytest.raises(MeasurementError, match=r"m\.json: layer\.q_proj: not a valid projection setting"):
        QParams.from_json(record, "m.json: layer.q_proj")


@pytest.mark.parametrize("record", [None, 4, [], "4", {}])
def test_json_of_another_kind_names_its_place(record: object) -> None:
    with pytest.raises(MeasurementError, match="here"):
        QParams.from_json(record, "here")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"bits": (4, 3)}, "one entry per width"),
        ({"bits": ()}, "one entry per width"),
        ({"bits": (7,)}, "bits must be among"),
        ({"bits": (3, 4), "bits_prop": (0.5, 0.5), "group_size": (32, 32)}, "non-increasing"),
        ({"group_size": (16,)}, "group_size"),
        ({"group_size": (96,)}, "group_size"),
        ({"bits_prop": (0.9,)}, "sum to 1"),
        ({"bits": (4, 3), "bits_prop": (1.5, -0.5), "group_size": (32, 32)}, "bits_prop"),
        ({"scale_bits": 3}, "scale_bits"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, tuple[int, ...]], what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        QParams(**({"bits": (4,), "bits_prop": (1.0,), "group_size": (128,)} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [0, -32, 16, 48, 100, 65536 + 32])
def test_rows_that_the_format_cannot_hold(rows: int) -> None:
    with pytest.raises(SettingsError, match=rf"down_proj: in_features is {rows}, EXL2 needs a multiple of 32"):
        require_quantizable_rows(rows, "down_proj")
    with pytest.raises(SettingsError):
        q("4", "1", "128").groups(rows)


def test_the_largest_matrix_passes() -> None:
    require_quantizable_rows(65536)
    assert len(q("4", "1", "128").groups(65536)) == 512
