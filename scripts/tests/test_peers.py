"""The pure parts of the comparison with other formats: layouts, bits, table. Nothing here needs torch or gguf."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.peers import frontier, layout
from scripts.peers.activations import importance_file
from scripts.peers.formats import FORMATS
from scripts.peers.off_grid import write_off_grid
from scripts.peers.packed import pack, unpack, weight_of
from scripts.peers.peer import write_plain
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


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> frontier.Frontier:
    base = tmp_path_factory.mktemp("frontier")
    save_file({"input_ids": np.random.default_rng(3).integers(0, 300, (4, 24))}, base / "rows.safetensors")
    model = write_tiny_llama(base / "model", num_layers=1)
    named = ["--calibration", str(base / "rows.safetensors"), "--heldout", str(base / "rows.safetensors")]
    return frontier.Frontier(frontier.parse([*named, "--model", str(model), "--out", str(base / "out")]))


def test_a_finished_directory_is_judged_like_the_others(study: frontier.Frontier) -> None:
    record = study.ours(f"itself=={study.model}")
    assert record["label"] == "EXL2 itself=" and record["family"] == "EXL2 itself="
    assert record["bpw"] in (16, 32) and record["file_bytes"] > record["decoder_bytes"]
    for found in record["domains"].values():
        assert abs(found["kl"]) < 1e-6 and found["top1"] == 1 and found["perplexity"] > 1


def test_a_format_without_its_software_is_named(study: frontier.Frontier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "PYTHON", Path("no/such/python"))
    assert study.kept(FORMATS[0]) is None
    assert "scripts/setup.sh peers" in study.record(FORMATS[0])["failure"]
    assert study.kept(FORMATS[0]) is not None


def test_the_table_of_what_ran_names_the_rest(study: frontier.Frontier, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontier.main(["--known", "--model", str(study.model), "--out", str(study.out), "--ours"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(FORMATS) and all("not run" in line for line in lines[2:])
    assert any("many for a processor" in line for line in lines)


def test_the_study_of_quality_leaves_directories_to_compare(tmp_path: Path) -> None:
    for name in ("exl2-max-2.5-115-0", "exl2-best-3-115-0", "exl2-best-3-24-0", "exl2-fast-3-115-0"):
        (tmp_path / name).mkdir()
    kept = [f"max 2.5={tmp_path}/exl2-max-2.5-115-0", f"best 3={tmp_path}/exl2-best-3-115-0"]
    assert frontier.of_study(tmp_path) == kept


def test_importance_is_the_mean_square_of_the_inputs(study: frontier.Frontier, tmp_path: Path) -> None:
    path = tmp_path / "squares.safetensors"
    seconds = importance_file(study.model, study.tokens, 3, path)
    assert seconds > 0 and importance_file(study.model, study.tokens, 3, path) == seconds
    found = load_file(path)
    linears = [name for name in layout.heads_of(study.model) if layout.is_decoder_linear(name)]
    assert {f"{name}.weight" for name in found} == set(linears)
    gate, up = (found[f"model.layers.0.mlp.{name}"] for name in ("gate_proj", "up_proj"))
    np.testing.assert_array_equal(gate, up)
    norm = load_file(study.model / "model.safetensors")["model.layers.0.input_layernorm.weight"].astype(np.float32)
    # A normed state has mean square 1, so the weight of the norm sets the size of its channels.
    assert 0.5 < np.mean(found["model.layers.0.self_attn.q_proj"]) / np.mean(norm**2) < 2


def test_weights_off_the_grid_make_the_same_model(study: frontier.Frontier, tmp_path: Path) -> None:
    write_off_grid(study.model, tmp_path / "off")
    before, after = (load_file(path / "model.safetensors") for path in (study.model, tmp_path / "off"))
    for name in layout.heads_of(study.model):
        ratio = after[name].astype(np.float64) / before[name].astype(np.float64)
        assert (
            np.ptp(ratio[np.isfinite(ratio)]) > 0.1
            or "embed" in name
            or name in ("model.norm.weight", "lm_head.weight")
        )
    for found in study.ours(str(tmp_path / "off"))["domains"].values():
        assert abs(found["kl"]) < 1e-5 and found["top1"] > 0.9


def test_plain_directories_hold_transposed_weights_the_right_way_round(tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    (tmp_path / "model").mkdir()
    save_file({"w": np.zeros((3, 4), np.float16)}, tmp_path / "model" / "model.safetensors")
    write_plain(tmp_path / "model", tmp_path, {"w": np.asfortranarray(weight)})
    np.testing.assert_array_equal(load_file(tmp_path / "plain" / "model.safetensors")["w"], weight)
    with pytest.raises(ValueError, match="no v"):
        write_plain(tmp_path / "model", tmp_path, {"v": weight})
