"""The pure parts of the comparison with other formats: layouts, bits, table. Nothing here needs torch or gguf."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts.peers import layout
from scripts.peers.formats import FORMATS
from scripts.peers.packed import pack, unpack, weight_of
from scripts.peers.table import Record, plot, table

DOMAIN = {"kl": 0.25, "kl_error": 0.01, "perplexity": 40.0, "top1": 0.7}


def test_rotary_rows_are_paired_and_split_again() -> None:
    weight = np.arange(2 * 4)[:, None] * np.ones((1, 3))
    paired = layout.paired_rows(weight, heads=2)
    assert paired[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(layout.split_rows(paired, heads=2), weight)
    other = np.random.default_rng(0).standard_normal((3 * 64, 5))
    np.testing.assert_array_equal(layout.split_rows(layout.paired_rows(other, 3), 3), other)


def test_rows_are_joined_until_they_fit_the_super_blocks() -> None:
    assert layout.rows_to_join(1536, 576) == 4
    assert layout.rows_to_join(576, 1536) == 1
    assert layout.rows_to_join(6, 576) == 1  # six rows are not a whole number of fours


def test_names_of_gguf() -> None:
    assert layout.gguf_name("model.layers.12.self_attn.o_proj.weight") == "blk.12.attn_output.weight"
    assert layout.gguf_name("model.embed_tokens.weight") == "token_embd.weight"


def test_bits_per_weight_count_all_that_lies_beside_the_codes(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.up_proj"
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    norm = {"model.layers.0.input_layernorm.weight": np.ones(64, np.float16)}
    for folder, parts in (
        (plain, {f"{key}.weight": np.zeros((32, 64), np.float16)}),
        (packed, {f"{key}.qweight": np.zeros((8, 32), np.int32), f"{key}.scales": np.zeros((2, 32), np.float16)}),
    ):
        folder.mkdir()
        save_file(parts | norm, folder / "model.safetensors")
    weights = layout.decoder_weights(layout.heads_of(plain))
    size = layout.decoder_bytes(layout.heads_of(packed))
    assert (weights, size) == (2048, 8 * 32 * 4 + 2 * 32 * 2)
    assert layout.bits_per_weight(size, weights) == 4.5
    assert layout.weight_bytes(packed) > size


def test_rows_are_taken_evenly() -> None:
    assert layout.spread(115, 200).tolist() == list(range(115))
    assert layout.spread(9, 3).tolist() == [0, 4, 8]


def test_tensor_types_are_counted() -> None:
    assert layout.counted(["Q3_K", "IQ4_NL", "IQ4_NL"]) == "IQ4_NL 2, Q3_K 1"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_packed_and_unpacked(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (96, 5)).astype(np.int32)
    words = pack(codes, bits)
    assert words.shape == (96 * bits // 32, 5)
    np.testing.assert_array_equal(unpack(words, bits), codes)


def test_weights_come_out_of_the_layout_of_gptq() -> None:
    generator = np.random.default_rng(1)
    codes, zeros = generator.integers(0, 8, (64, 32)), generator.integers(1, 8, (2, 32))
    scales = generator.random((2, 32)).astype(np.float16)
    parts = {"qweight": pack(codes, 3), "qzeros": pack((zeros - 1).T, 3).T, "scales": scales}
    expected = (codes - np.repeat(zeros, 32, 0)) * np.repeat(scales.astype(np.float32), 32, 0)
    np.testing.assert_allclose(weight_of(parts, 3, 32), expected.T, rtol=1e-6)
    order = generator.permutation(np.arange(64) // 32)
    expected = (codes - zeros[order]) * scales.astype(np.float32)[order]
    np.testing.assert_allclose(weight_of({**parts, "g_idx": order}, 3, 32), expected.T, rtol=1e-6)


def test_a_format_that_failed_stands_in_the_table_with_the_reason(tmp_path: Path) -> None:
    good: Record = {
        "label": "good",
        "family": "a",
        "bpw": 3.5,
        "file_bytes": 8_000_000,
        "cpu_seconds": [7.2, 60.0],
        "note": "Q3_K 210",
        "domains": {"web": DOMAIN, "code": DOMAIN},
    }
    bad: Record = {"label": "bad", "family": "b", "failure": "no kernel | for\nthis"}
    head, rule, *lines = table([good, bad]).splitlines()
    assert head.count("|") == rule.count("|") == lines[0].count("|") == lines[1].count("|")
    assert lines[0].startswith("| good | 3.500 | 8.0 | 0.2500 ± 0.0100 |") and "| 7 + 60 | Q3_K 210 |" in lines[0]
    assert lines[1].endswith("| not run: no kernel / for this |")
    plot([good, bad], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_formats_have_names_of_their_own() -> None:
    assert len({wanted.key for wanted in FORMATS}) == len(FORMATS)
    assert all((Path("scripts/peers") / f"{wanted.script}.py").exists() for wanted in FORMATS)
