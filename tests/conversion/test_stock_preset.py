"""ExLlamaV2's own algorithm on experts and on parallel blocks: every candidate measured, the best choice quantized."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from exl2jax import ConversionConfig, convert, evaluate
from exl2jax.exl2.verify.directory import verify
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import EXPERTS, VOCABULARY, write_tiny

ROWS, LENGTH, BITS = 6, 24, 4.0

SLOTS = {
    "mixtral": {
        "model.layers.0.self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "model.layers.0.block_sparse_moe": ("w1", "w3", "w2"),
    },
    "cohere": {
        "model.layers.0.parallel_decoder.attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "model.layers.0.parallel_decoder.mlp": ("gate_proj", "up_proj", "down_proj"),
    },
}
"""The parts that stock measures separately, and the roles that a candidate of each sets."""


@pytest.mark.parametrize("name", SLOTS)
def test_measured_and_quantized(name: str, tmp_path: Path) -> None:
    tiny = replace(TINY[name], config={**TINY[name].config, "num_hidden_layers": 1})
    source, tokens = write_tiny(tmp_path / "source", tiny), tmp_path / "rows.safetensors"
    generator = np.random.default_rng(5)
    save_file({"input_ids": generator.integers(0, VOCABULARY, (ROWS, LENGTH))}, tokens)
    result = convert(
        ConversionConfig(
            in_dir=source,
            out_dir=tmp_path / "work",
            compile_full=tmp_path / "exl2",
            cal_dataset=str(tokens),
            bits=BITS,
            dataset_rows=ROWS,
            measurement_rows=2,
            preset="stock",
        )
    )
    assert result.bpw is not None and result.bpw <= BITS
    assert result.rfn_error and not result.stream_error
    assert result.allocation is not None and result.allocation["pricing"] == "accuracy"
    found = measured(tmp_path / "work" / "measurement.json")
    assert found.keys() == result.allocation["modules"].keys() == SLOTS[name].keys()
    for key, roles in SLOTS[name].items():
        check_measurement(found[key], roles)
        check_choice(result.allocation["modules"][key], found[key], roles)
    assert verify(tmp_path / "exl2").faults == ()
    ids = generator.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    kl = evaluate(tmp_path / "exl2", ids, source).kl_divergence
    assert kl is not None and kl < 1.0  # unrelated logits differ by about 4


def measured(path: Path) -> dict[str, list[dict]]:
    """The candidates by slot, whether they stand in a module of their own or in a branch."""
    found = {}
    for key, rows in json.loads(path.read_text())["measurement"].items():
        if rows is not None:
            found |= {f"{key}.{part}": r for part, r in rows.items()} if isinstance(rows, dict) else {key: rows}
    return found


def check_measurement(rows: list[dict], roles: tuple[str, ...]) -> None:
    """Every candidate sets every role, and bits buy accuracy; in matrices this small some come to the same."""
    assert all(tuple(row) == ("accuracy", "total_bits", *roles) for row in rows)
    bits, accuracies = (np.array([row[key] for row in rows]) for key in ("total_bits", "accuracy"))
    assert ((accuracies > 0) & (accuracies < 1)).all() and len(set(accuracies)) > len(rows) // 2
    assert accuracies[bits.argmax()] == accuracies.max() and accuracies[bits.argmin()] < np.median(accuracies)
    assert np.corrcoef(bits, accuracies)[0, 1] > 0.7


def check_choice(chosen: dict[str, dict], rows: list[dict], roles: tuple[str, ...]) -> None:
    """A candidate that was measured, the same for all experts."""
    by_role = {role: [q for linear, q in chosen.items() if linear.partition(".")[0] == role] for role in roles}
    experts = EXPERTS if roles == SLOTS["mixtral"]["model.layers.0.block_sparse_moe"] else 1
    assert all(found == [found[0]] * experts for found in by_role.values())
    assert any(all(row[role] == found[0] for role, found in by_role.items()) for row in rows)
