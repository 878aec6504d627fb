"""The candidate tables, against a second transcription and against a stock measurement."""

import json
from pathlib import Path

import pytest

from exl2jax.errors import SettingsError
from exl2jax.qparams import QParams
from exl2jax.stock_tables import ATTENTION, HEAD, MLP, head_qparams

# Per projection `widths@shares(%)gsizes`; `=` repeats the first projection of the row.
ATTENTION_TABLE = """
3/2@5/95g64 = = =
3/2@10/90g64 = 3/2@25/75g64 =
3/2@10/90g64 = 4/3@10/90g128 =
3/2@10/90g64 = 4/3@10/90g128 4/3@10/90g128
4/3@10/90g128 = = =
4/3@10/90g128 = 4/3@10/90g64 =
4@100g128 = = =
4@100g128 = 4@100g64 =
4@100g64 = 4@100g32 =
4@100g32 = = =
5/4@10/90g128 = 5/4@10/90g64 =
5/4@10/90g64 = 5/4@10/90g32 =
5/4@10/90g64 = 5@100g64 =
5/4@10/90g32 = 5@100g32 =
6/5@10/90g128 = 6@100g128 =
6/5@10/90g32 = 6@100g32 =
6@100g128 = = =
6@100g32 = 8@100g32 =
8@100g128 = = =
"""

MLP_TABLE = """
3/2@5/95g64 = 6/3/2@5/20/75g32,64,64
3/2@10/90g64 3/2@25/75g64 6/3/2@5/20/75g32,64,64
3/2@10/90g64 3/2@30/70g64 5/3@5/95g32
3/2@10/90g64 3/2@30/70g64 5/4@5/95g32
4/3@10/90g128 4/3@25/75g128 8/4/3@5/10/85g32,128,128
4/3@10/90g32 4/3@25/75g32 8/4/3@5/10/85g32
4/3@10/90g32 4/3@25/75g32 8/4@5/95g32,128
4@100g128 4@100g32 8/4@5/95g32,128
4@100g32 = 8/4@5/95g32
5/4@10/90g128 5/4@25/75g128 8/5/4@5/10/85g32,128,128
5/4@10/90g32 5/4@25/75g32 8/5/4@5/10/85g32
6/5@10/90g128 6/5@25/75g128 8/6/5@5/10/85g32,128,128
6/5@10/90g32 6/5@25/75g32 8/6/5@5/10/85g32
6@100g128 = 8/6@5/95g32,128
8/6@10/90g128 = 8/6@15/85g128
8/6@10/90g128 = 8@100g128
8@100g128 = =
"""

HEAD_TABLE = {
    2: "4/2@30/70g32",
    3: "4/3@15/85g32",
    4: "6/4@15/85g32",
    5: "6/5@15/85g128",
    6: "8/6@15/85g128",
    8: "8@100g128",
}


def parse(entry: str) -> QParams:
    widths, rest = entry.split("@")
    shares, sizes = rest.split("g")
    bits = tuple(map(int, widths.split("/")))
    group_size = tuple(map(int, sizes.split(",")))
    return QParams(
        bits=bits,
        bits_prop=tuple(int(share) / 100 for share in shares.split("/")),
        group_size=group_size if len(group_size) == len(bits) else group_size * len(bits),
    )


def parse_table(text: str) -> tuple[tuple[QParams, ...], ...]:
    rows = [line.split() for line in text.strip().splitlines()]
    return tuple(tuple(parse(row[0] if entry == "=" else entry) for entry in row) for row in rows)


def test_attention_table() -> None:
    assert parse_table(ATTENTION_TABLE) == ATTENTION


def test_mlp_table() -> None:
    assert parse_table(MLP_TABLE) == MLP


def test_head_table() -> None:
    assert {bits: parse(entry) for bits, entry in HEAD_TABLE.items()} == HEAD
    assert all(head_qparams(bits) is HEAD[bits] for bits in HEAD)


@pytest.mark.parametrize("head_bits", [0, 1, 7, 9, -6])
def test_other_head_bits_are_refused_with_the_choices(head_bits: int) -> None:
    with pytest.raises(SettingsError, match=rf"`head_bits` is {head_bits}; it must be one of 2, 3, 4, 5, 6, 8"):
        head_qparams(head_bits)


SMOLLM2 = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}


def test_stock_measurement_has_the_same_settings_and_bits(shared: Path) -> None:
    path = shared / "data" / "golden" / "stock_measurement_smollm2.json"
    measured = json.loads(path.read_text(encoding="utf-8"))["measurement"]
    tables = {"self_attn": (list(SMOLLM2)[:4], ATTENTION), "mlp": (list(SMOLLM2)[4:], MLP)}
    seen = 0
    for layer in range(30):
        for kind, (names, table) in tables.items():
            records = measured[f"model.layers.{layer}.{kind}"]
            assert len(records) == len(table)
            for record, row in zip(records, table, strict=True):
                assert {name: record[name] for name in names} == {
                    name: setting.to_json() for name, setting in zip(names, row, strict=True)
                }
                bits = sum(s.total_bits(*SMOLLM2[name]) for name, s in zip(names, row, strict=True))
                assert record["total_bits"] == bits
                seen += 1
    assert seen == 1080
