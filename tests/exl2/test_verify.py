"""`verify`: a sound EXL2 directory passes, and each kind of damage is reported by the name of what is damaged."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from exl2jax.exl2.verify.directory import VerifyReport, verify
from exl2jax.exl2.verify.groups import Table, table_faults, word_rows_fault
from exl2jax.stock_tables import ATTENTION, HEAD, MLP
from exl2jax.testing.tiny_model import write_tiny_llama
from tests.exl2.exl2_damage import (
    CONFIG,
    DAMAGES,
    DOWN,
    EMBEDDING,
    FILES,
    FLOATS,
    GATE,
    HEADERS,
    K_PROJ,
    NORM,
    SETTINGS,
    SHARD,
    VALUES,
    Damage,
    Q,
    add,
    cast,
    change,
    config,
    drop,
    drop_linear,
    put,
    quantization,
    swap,
    without_shards,
)
from tests.exl2.exl2_dir import (
    HEAD_LAYOUT,
    HIDDEN,
    LAYERS,
    LINEARS,
    PADDED_VOCABULARY,
    SHARDS,
    VOCABULARY,
    Layout,
    edit_config,
    write_tiny_exl2,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_exl2(tmp_path_factory.mktemp("exl2") / "sound")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "exl2")


def names(report: VerifyReport) -> set[str]:
    return {fault.tensor for fault in report.faults}


def stored_bits(rows: int, columns: int, layout: Layout) -> int:
    """The count of docs/format.md 1.7: codes, then per group 16 + 32 + 4 N, then 32 per row."""
    return sum(size * bits * columns + 48 + 4 * columns for bits, size in layout) + 32 * rows


def test_kinds_of_damage_are_many() -> None:
    assert len(DAMAGES) + len(SHARD) >= 60
    assert len(DAMAGES) == sum(map(len, (FILES, SETTINGS, HEADERS, VALUES, FLOATS)))


def test_sound_directory_passes_with_its_bits_counted(sound: Path) -> None:
    report = verify(sound)
    assert report.ok and report.faults == ()
    bits = sum(stored_bits(*linear) for linear in LINEARS.values())
    weights = sum(rows * columns for rows, columns, _ in LINEARS.values())
    assert report.bits_per_weight == bits / weights
    head = stored_bits(HIDDEN, PADDED_VOCABULARY, HEAD_LAYOUT)
    assert report.head_bits_per_weight == head / (HIDDEN * VOCABULARY)
    assert report.linears == LAYERS * len(LINEARS) + 1
    assert report.bytes == sum((sound / shard).stat().st_size for shard in SHARDS)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_reported_by_name_and_nothing_else_is(kind: str, copy: Path) -> None:
    damage, expected = DAMAGES[kind]
    damage(copy)
    report = verify(copy)
    assert names(report) == set(expected), "\n".join(map(str, report.faults))
    assert not report.ok


@pytest.mark.parametrize("kind", SHARD)
def test_damaged_shard_is_reported_with_what_is_missing(kind: str, copy: Path) -> None:
    lost, kept = (load_file(copy / shard).keys() for shard in SHARDS)
    SHARD[kind](copy)
    report = verify(copy)
    reported = names(report) - {SHARDS[0]}
    assert kind == "gone" or SHARDS[0] in names(report)
    assert all(name in reported or name.rpartition(".")[0] in reported for name in lost)
    assert not reported & set(kept)
    assert report.bits_per_weight is None


def test_faults_do_not_hide_each_other(copy: Path) -> None:
    for damage in (
        put(f"{Q}.q_scale_max", 0, np.nan),
        put(f"{Q}.q_groups", 3, 5),
        put(f"{Q}.q_invperm", 0, -1),
        cast(f"{GATE}.q_scale", np.int64),
        swap(f"{DOWN}.q_groups", 0, 2),
        drop(f"{K_PROJ}.bias"),
        put(NORM, 0, np.inf),
        quantization("version", ...),
        add("extra.safetensors", stray=np.zeros(2, np.float16)),
    ):
        damage(copy)
    expected = {f"{Q}.q_scale_max", f"{Q}.q_groups", f"{Q}.q_invperm", f"{GATE}.q_scale", f"{DOWN}.q_groups"}
    assert names(verify(copy)) == expected | {f"{K_PROJ}.bias", NORM, CONFIG, "stray"}


def test_linears_are_checked_without_a_config(copy: Path) -> None:
    (copy / CONFIG).unlink()
    put(f"{Q}.q_scale_max", 0, np.nan)(copy)
    drop(f"{GATE}.q_invperm")(copy)
    add(SHARDS[0], **{f"{DOWN}.weight": np.zeros((HIDDEN, 256), np.float16)})(copy)
    report = verify(copy)
    assert names(report) == {CONFIG, f"{Q}.q_scale_max", f"{GATE}.q_invperm", f"{DOWN}.weight"}
    assert report.bits_per_weight is None and report.linears == LAYERS * len(LINEARS)


def test_missing_linear_says_that_a_module_is_all_or_none(copy: Path) -> None:
    drop_linear(K_PROJ)(copy)
    (fault,) = verify(copy).faults
    assert "q_proj, v_proj, o_proj" in fault.message and "all or none" in fault.message


LOADER: dict[str, tuple[Damage, str, str]] = {
    "no tokenizer.json": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json", "is missing"),
    "tokenizer.json cut short": (
        lambda d: (d / "tokenizer.json").write_text('{"version": "1.0"'),
        "tokenizer.json",
        "not a readable tokenizer",
    ),
    "tokenizer_config.json no object": (
        lambda d: (d / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json",
        "JSON object",
    ),
    "an added token without its content": (
        lambda d: (d / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"special": true}}}'),
        "tokenizer_config.json",
        "content and special",
    ),
    "added_tokens.json with a text": (
        lambda d: (d / "added_tokens.json").write_text('{"<x>": "7"}'),
        "added_tokens.json",
        "whole number",
    ),
    "generation_config.json cut short": (
        lambda d: (d / "generation_config.json").write_text("{"),
        "generation_config.json",
        "cannot be read",
    ),
    "generation_config.json with a text": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "generation_config.json",
        "eos_token_id",
    ),
    "no eos among none": (config(eos_token_id=[]), CONFIG, "eos_token_id"),
    "bos a list": (config(bos_token_id=[1]), CONFIG, "bos_token_id"),
    "rotary base in the new spelling only": (
        config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        CONFIG,
        "rope_theta is None for the loader, and means 500000.0",
    ),
    "scaling with two types": (
        config(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0}),
        CONFIG,
        "rope_scaling",
    ),
    "vision without a preprocessor": (
        config(vision_config={"model_type": "pixtral"}),
        "preprocessor_config.json",
        "is missing",
    ),
}
"""Damage to the other files that stock's loader opens, the file to be named, and words of the message."""


@pytest.mark.parametrize("kind", LOADER)
def test_files_that_the_loader_opens(kind: str, copy: Path) -> None:
    damage, file, words = LOADER[kind]
    damage(copy)
    report = verify(copy)
    assert names(report) == {file}, "\n".join(map(str, report.faults))
    assert all(words in fault.message for fault in report.faults)


def test_the_image_processor_must_be_one_that_the_loader_knows(copy: Path) -> None:
    config(vision_config={"model_type": "pixtral"})(copy)
    (copy / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor", "size": {}}')
    messages = [fault.message for fault in verify(copy).faults]
    assert any("PixtralImageProcessor" in m for m in messages) and any("lacks image_mean" in m for m in messages)


@pytest.mark.parametrize(
    "harmless",
    [
        pytest.param(lambda d: (d / "model.safetensors.index.json").write_text("{}"), id="index left behind"),
        pytest.param(lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), id="file that no loader reads"),
        pytest.param(lambda d: (d / SHARDS[0]).rename(d / "any name.safetensors"), id="shard of another name"),
        pytest.param(cast(EMBEDDING, np.float32), id="embedding float32"),
        pytest.param(put("lm_head.q_scale", (slice(None), slice(-2, None)), -1), id="other padded scales"),
        pytest.param(quantization("bits", 4.9), id="budget not spent to the last bit"),
        pytest.param(config(tie_word_embeddings=False), id="embeddings not tied"),
    ],
)
def test_what_the_format_allows_passes(harmless: Damage, copy: Path) -> None:
    harmless(copy)
    assert verify(copy).faults == ()


def test_dead_group_passes(copy: Path) -> None:
    """A group of zero weights: maximum 0, and every code the zero code."""

    def zero_codes(words: np.ndarray) -> np.ndarray:
        words[10:] = np.full((8, words.shape[1]), 0x88888888, np.uint32).view(np.int32)
        return words

    change(f"{GATE}.q_weight", zero_codes)(copy)
    put(f"{GATE}.q_scale_max", 1, 0.0)(copy)
    assert verify(copy).faults == ()


def test_directories_that_are_none(tmp_path: Path, copy: Path) -> None:
    for path in (tmp_path / "nowhere", copy / CONFIG):
        report = verify(path)
        assert names(report) == {str(path)} and report.bytes == 0
    without_shards(copy)
    assert names(verify(copy)) == {str(copy)}
    edit_config(copy, {"num_hidden_layers": 10**9})
    assert names(verify(copy)) == {str(copy), CONFIG}  # no model has so many
    (tmp_path / "empty").mkdir()
    assert names(verify(tmp_path / "empty")) == {str(tmp_path / "empty"), CONFIG, "tokenizer.json"}


def test_unquantized_model_fails_by_every_linear(tmp_path: Path) -> None:
    report = verify(write_tiny_llama(tmp_path / "hf"))
    linears = {f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS}
    expected = linears | {f"{key}.weight" for key in linears} | {CONFIG, "lm_head", "model.safetensors"}
    assert names(report) == expected and report.linears == 0


def test_stock_linears_have_no_faults(shared: Path, tmp_path: Path) -> None:
    kept = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
    files = sorted((shared / "data" / "golden").glob("model.layers.*.safetensors"))
    if not files:
        pytest.skip("no golden linears in ../shared")
    for file in files:
        tensors = load_file(file)
        key = file.name.removesuffix(".3.0bpw.safetensors")
        save_file({f"{key}.{name}": tensors[name] for name in kept}, tmp_path / file.name)
    report = verify(tmp_path)
    assert names(report) == {CONFIG, "tokenizer.json"} and report.linears == len(files)


def test_report_is_frozen(sound: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        verify(sound).bytes = 0  # type: ignore[misc]


ALL_SETTINGS = sorted({q for row in (*ATTENTION, *MLP) for q in row} | set(HEAD.values()), key=str)


@given(st.sampled_from(ALL_SETTINGS), st.integers(1, 300))
def test_tables_of_all_candidates_are_sound(qparams: Any, tiles: int) -> None:
    groups = qparams.groups(32 * tiles)
    starts = np.cumsum([0, *(g.words for g in groups)])
    table = Table(
        widths=tuple(g.bits for g in groups), starts=tuple(starts[:-1].tolist()), words=int(starts[-1]), rows=32 * tiles
    )
    assert table_faults(table) == [] and word_rows_fault(table) is None


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_never_raise(seed: int, copy: Path) -> None:
    """Bytes overwritten anywhere, half of the time within the headers: a report, not an exception."""
    rng = np.random.default_rng(seed)
    path = copy / rng.choice([CONFIG, *SHARDS])
    data = bytearray(path.read_bytes())
    limit = len(data) if seed % 2 else min(len(data), 4000)
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(0, limit)] = rng.integers(0, 256)
    path.write_bytes(data)
    assert all(fault.tensor and fault.message for fault in verify(copy).faults)
