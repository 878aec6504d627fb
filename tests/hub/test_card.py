"""The card: literal text for given records, metadata that the Hub's own reader reads, nothing unmeasured."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from exl2jax.conversion.config import ConversionConfig
from exl2jax.errors import FormatError
from exl2jax.hub.card import NAMES, card_text, read_sizes, write_set_card, write_size_card
from exl2jax.hub.command import command_of
from exl2jax.hub.record import RECORD_FILE, SizeRecord, cache_bytes, read_record, source_metadata, write_record
from exl2jax.models import read_config

FIGURES: dict[str, Any] = {
    "perplexity": 26.8149,
    "kl_divergence": 0.11834,
    "top1_agreement": 0.8031,
    "tokens": 7665,
    "domains": {"web": {"kl_divergence": 0.1}, "code": {"kl_divergence": 0.0567}},
}


def record(**changes: Any) -> SizeRecord:
    plain = SizeRecord(
        name="tiny",
        base_model="org/tiny",
        revision="a" * 40,
        quantized_by="someone",
        metadata={"license": "apache-2.0", "language": ["en"], "tags": ["chat", "exl2"]},
        bits=4.0,
        bpw=3.9996,
        head_bits=6,
        bytes=132_800_000,
        memory=321_500_000,
        evaluated_on="held-out text",
        source_perplexity=24.287,
        evaluation=FIGURES,
        command="exl2jax convert -i org/tiny -b 4",
        seed=7,
        versions={"exl2jax": "0.1.0", "jax": "0.11.2"},
        fingerprints={"model weights": "ab" * 32},
        files={"output.safetensors": "cd" * 32},
    )
    return dataclasses.replace(plain, **changes)


def test_the_table_holds_the_figures() -> None:
    text = card_text([record()])
    assert (
        "| bits per weight | head | GB | GB with 8k cache | perplexity | KL divergence | top-1 agreement |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 4.00 | 6 | 0.133 | 0.322 | 26.81 | 0.1183 | 80.3% |\n"
    ) in text
    assert "| bits per weight | web | code |\n| --- | --- | --- |\n| 4.00 | 0.1000 | 0.0567 |\n" in text
    assert "7665 tokens of held-out text; the source has a perplexity of 24.29 there" in text
    for part in ("exl2jax convert -i org/tiny -b 4", "Seed: 7", "ab" * 32, "cd" * 32, "model_name: tiny-exl2"):
        assert part in text


def test_nothing_is_claimed_that_was_not_measured() -> None:
    text = card_text([record(evaluation=None, evaluated_on=None, source_perplexity=None)])
    assert "No quality was measured." in text
    for word in ("perplexity", "KL", "top-1"):
        assert word not in text
    mixed = card_text([record(), record(bits=2.5, evaluation=None)])
    assert mixed.count("not measured") == 3 + 2


def test_the_hub_reads_the_head(tmp_path: Path) -> None:
    write_size_card(record(), tmp_path)
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "quantized_by": "someone",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["chat", "exl2"],
    }
    write_size_card(record(base_model=None, quantized_by=None, metadata={}), tmp_path)
    assert metadata_load(tmp_path / "README.md") == {"tags": ["exl2"]}


def test_a_set_is_in_order_with_its_plot(tmp_path: Path) -> None:
    sizes = [record(bits=b, bpw=b, bytes=int(b * 1e8)) for b in (6.0, 2.5, 4.0)]
    write_set_card(sizes, tmp_path)
    text = (tmp_path / "README.md").read_text()
    first_cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert [cell for cell in first_cells if cell in ("2.50", "4.00", "6.00")] == ["2.50", "4.00", "6.00"] * 2
    assert "![KL divergence against size](kl.png)" in text and "--revision 2.5bpw" in text
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == set(NAMES)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None and read_sizes([tmp_path]) == []
    write_record(record(), tmp_path)
    assert read_sizes([tmp_path]) == [record()]
    (tmp_path / RECORD_FILE).write_text('{"format": 9}')
    with pytest.raises(FormatError, match="not a record of this version"):
        read_record(tmp_path)


def test_metadata_of_the_source(tmp_path: Path) -> None:
    assert source_metadata(tmp_path) == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags: [a]\nmodel-index: x\n---\nText.\n")
    assert source_metadata(tmp_path) == {"license": "mit", "tags": ["a"]}
    for broken in ("no head", "---\n: [\n---\n", "---\n- a\n---\n"):
        card.write_text(broken)
        assert source_metadata(tmp_path) == {}


def test_cache_by_hand(tiny_llama: Path) -> None:
    config, _, _ = read_config(tiny_llama)
    layers, heads, width = 2, 2, 16
    assert cache_bytes(config) == layers * heads * width * 8192 * 2 * 2


def test_the_command_names_no_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "cal file.txt").write_text("x")
    config = ConversionConfig(
        in_dir=tmp_path / "model",
        out_dir=tmp_path / "work",
        compile_full=tmp_path / "model-4bpw",
        bits=4.0,
        head_bits=8,
        seed=3,
        cal_dataset=tmp_path / "cal file.txt",
        cal_columns=("body",),
        measurement=tmp_path / "measurement.json",
        pins=("*.down_proj=6",),
    )
    assert command_of(config) == (
        "exl2jax convert -i model -o WORK -cf model-4bpw -b 4 -c 'cal file.txt' --cal-column body -hb 8 "
        "-m measurement.json --seed 3 --pin '*.down_proj=6'"
    )
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    assert f"-i org/tiny@{'a' * 40} " in command_of(dataclasses.replace(config, in_dir=snapshot))
