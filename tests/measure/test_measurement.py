"""`measurement.json` both ways: literal stock records in, our own out in the same form, and every damage by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exl2jax.errors import MeasurementError
from exl2jax.measure.measurement import Candidate, Measurement, candidate_rows, module_bits, read_measurement
from exl2jax.measure.sensitivity import MEASURED, LinearCosts, Sensitivity
from exl2jax.models import LinearSpec, ModuleSpec, module_specs, open_model
from exl2jax.qparams import ROW_MULTIPLE, QParams
from exl2jax.stream.token_classes import CLASSES
from exl2jax.testing.tiny_model import write_tiny_llama

STOCK_ATTENTION = """{
    "accuracy": 0.9583360427304318,
    "total_bits": 50112,
    "q_proj": {"group_size": {"3": 64, "2": 64}, "bits": [3, 2], "bits_prop": [0.05, 0.95], "scale_bits": 4},
    "k_proj": {"group_size": {"3": 64, "2": 64}, "bits": [3, 2], "bits_prop": [0.05, 0.95], "scale_bits": 4},
    "v_proj": {"group_size": [64, 64], "bits": [3, 2], "bits_prop": [0.05, 0.95], "scale_bits": 4},
    "o_proj": {"group_size": 128, "bits": [4], "bits_prop": [1], "scale_bits": 4}
}"""
"""A record as stock writes it, with the two older spellings of `group_size` on v and o.

Its bits by hand: q 64*64*3 + (48 + 4*64) + 32*64 = 14640, k and v 64*32*3 + (48 + 4*32) + 32*64 = 8368 each (one group
takes all 64 rows at 3 bits), o 64*64*4 + (48 + 4*64) + 32*64 = 18736.
"""

STOCK_MLP = """{
    "accuracy": 0.9866,
    "total_bits": 183920,
    "gate_proj": {"group_size": {"4": 32}, "bits": [4], "bits_prop": [1], "scale_bits": 4},
    "up_proj": {"group_size": {"8": 128, "6": 128}, "bits": [8, 6], "bits_prop": [0.1, 0.9], "scale_bits": 4},
    "down_proj": {"group_size": {"8": 32, "4": 128}, "bits": [8, 4], "bits_prop": [0.05, 0.95], "scale_bits": 4}
}"""


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleSpec, ...]:
    """One layer of hidden size 64, inner size 160, keys half as wide as queries."""
    directory = write_tiny_llama(tmp_path_factory.mktemp("one") / "layer", num_layers=1)
    return module_specs(open_model(directory).config)


def stock(**changes: Any) -> dict[str, Any]:
    records = {
        "model.layers.0.self_attn": [json.loads(STOCK_ATTENTION)],
        "model.layers.0.mlp": [json.loads(STOCK_MLP)],
        "model.norm.norm": None,
        "lm_head.linear": None,
    }
    return {"measurement": records | changes, "last_module_idx": 4}


def write(path: Path, record: Any) -> Path:
    path.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    return path


def test_a_stock_file_is_read(tmp_path: Path, specs: tuple[ModuleSpec, ...]) -> None:
    found = read_measurement(write(tmp_path / "m.json", stock()), specs)
    attention, mlp = found.modules.values()
    assert attention == (
        Candidate(
            qparams={
                "q_proj": QParams(bits=(3, 2), bits_prop=(0.05, 0.95), group_size=(64, 64)),
                "k_proj": QParams(bits=(3, 2), bits_prop=(0.05, 0.95), group_size=(64, 64)),
                "v_proj": QParams(bits=(3, 2), bits_prop=(0.05, 0.95), group_size=(64, 64)),
                "o_proj": QParams(bits=(4,), bits_prop=(1.0,), group_size=(128,)),
            },
            total_bits=50112,
            accuracy=0.9583360427304318,
        ),
    )
    assert mlp[0].qparams["down_proj"] == QParams(bits=(8, 4), bits_prop=(0.05, 0.95), group_size=(32, 128))
    assert mlp[0].error == pytest.approx(0.0134)


def test_ours_is_written_in_the_stock_form(tmp_path: Path, specs: tuple[ModuleSpec, ...]) -> None:
    path = tmp_path / "m.json"
    read_measurement(write(path, stock()), specs).write(tmp_path / "again.json", specs)
    expected = stock()
    expected["measurement"]["model.layers.0.self_attn"][0]["v_proj"]["group_size"] = {"3": 64, "2": 64}
    expected["measurement"]["model.layers.0.self_attn"][0]["o_proj"]["group_size"] = {"4": 128}
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == expected


def test_all_candidates_survive_the_file(tmp_path: Path, specs: tuple[ModuleSpec, ...]) -> None:
    def candidates(spec: ModuleSpec) -> tuple[Candidate, ...]:
        rows = enumerate(candidate_rows(spec))
        return tuple(Candidate(qparams=r, total_bits=module_bits(spec, r), accuracy=1 - 0.3 / (i + 1)) for i, r in rows)

    measurement = Measurement(modules={spec.key: candidates(spec) for spec in specs})
    measurement.write(tmp_path / "m.json", specs)
    assert read_measurement(tmp_path / "m.json", specs) == measurement
    assert [len(rows) for rows in measurement.modules.values()] == [19, 17]


def test_a_part_of_a_pass(tmp_path: Path, specs: tuple[ModuleSpec, ...]) -> None:
    """A file cut short by an interruption says how far it came, and is no measurement yet."""
    whole = read_measurement(write(tmp_path / "m.json", stock()), specs)
    first = dict(list(whole.modules.items())[:1])
    Measurement(modules=first).write(tmp_path / "part.json", specs)
    record = json.loads((tmp_path / "part.json").read_text(encoding="utf-8"))
    assert record["last_module_idx"] == 1
    assert list(record["measurement"]) == ["model.layers.0.self_attn"]
    assert read_measurement(tmp_path / "part.json", specs, partial=1).modules == first
    with pytest.raises(MeasurementError, match=r"part\.json: no candidates for model\.layers\.0\.mlp"):
        read_measurement(tmp_path / "part.json", specs)


def changed(**changes: Any) -> dict[str, Any]:
    """The stock file with its attention record changed."""
    return stock(**{"model.layers.0.self_attn": [json.loads(STOCK_ATTENTION) | changes]})


Q_PROJ = json.loads(STOCK_ATTENTION)["q_proj"]
AT = r"m\.json: model\.layers\.0\.self_attn\[0\]"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"m\.json: the measurement file cannot be read"),
        ("", r"m\.json: the measurement file cannot be read"),
        ([], r"m\.json: holds no measurement"),
        ({}, r"m\.json: holds no measurement"),
        ({"measurement": {}}, r"m\.json: holds no measurement"),
        (stock(**{"model.layers.0.mlp": None}), r"no candidates for model\.layers\.0\.mlp"),
        (stock(**{"model.layers.0.mlp": []}), r"no candidates for model\.layers\.0\.mlp"),
        (stock(**{"model.layers.1.mlp": []}), r"module model\.layers\.1\.mlp is not in this model"),
        (changed(total_bits=50111), rf"{AT}: total_bits is 50111, this model's shapes give 50112"),
        (changed(accuracy=0), rf"{AT}: accuracy must lie in \(0, 1\]"),
        (changed(accuracy=1.5), rf"{AT}: accuracy must lie in \(0, 1\]"),
        (changed(accuracy="good"), rf"{AT}: accuracy must lie in \(0, 1\], got 'good'"),
        (changed(q_proj=Q_PROJ | {"bits": [7, 2]}), rf"{AT}\.q_proj: not a valid projection setting"),
        (changed(q_proj=Q_PROJ | {"bits": [2, 3]}), rf"{AT}\.q_proj: not a valid projection setting"),
        (changed(q_proj=Q_PROJ | {"bits_prop": [0.5, 0.4]}), rf"{AT}\.q_proj: not a valid projection setting"),
        (changed(q_proj=Q_PROJ | {"group_size": {"3": 64}}), rf"{AT}\.q_proj: not a valid projection setting"),
        (changed(q_proj=None), rf"{AT}\.q_proj: not a valid projection setting"),
        (
            stock(**{"model.layers.0.self_attn": [{"accuracy": 0.5}]}),
            rf"{AT}: must hold accuracy, total_bits and q_proj",
        ),
        (stock(**{"model.layers.0.self_attn": ["x"]}), rf"{AT}: must hold accuracy"),
    ],
)
def test_damage_is_named(tmp_path: Path, specs: tuple[ModuleSpec, ...], record: Any, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        read_measurement(write(tmp_path / "m.json", record), specs)


def test_a_missing_file_is_named(tmp_path: Path, specs: tuple[ModuleSpec, ...]) -> None:
    with pytest.raises(MeasurementError, match=r"none\.json: the measurement file is missing"):
        read_measurement(tmp_path / "none.json", specs)


def test_the_stock_file_of_the_demo_model_survives_both_ways(demo_model: Path, shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "golden" / "stock_measurement_smollm2.json"
    specs = module_specs(open_model(demo_model).config)
    read_measurement(path, specs).write(tmp_path / "again.json", specs)
    ours, theirs = (json.loads(p.read_text(encoding="utf-8")) for p in (tmp_path / "again.json", path))
    assert ours == theirs


def priced(specs: tuple[ModuleSpec, ...], token_weights: Any = None) -> Measurement:
    """Costs of every linear, made up."""
    rng = np.random.default_rng(0)

    def costs(linear: LinearSpec) -> LinearCosts:
        measured = {setting: rng.integers(1, 99, linear.rows // ROW_MULTIPLE) / 4 for setting in MEASURED}
        return LinearCosts(rows=linear.rows, columns=linear.columns, measured=measured, token_weights=token_weights)

    linears = {x.key: costs(x) for spec in specs for x in spec.linears}
    return Measurement(sensitivity=Sensitivity(method="made up", rows=3, linears=linears))


@pytest.mark.parametrize("weights", [None, np.arange(CLASSES, dtype=np.float32) / 8], ids=["alike", "weighed"])
def test_costs_and_weights_of_tokens_survive_the_file(
    tmp_path: Path, specs: tuple[ModuleSpec, ...], weights: np.ndarray | None
) -> None:
    measurement = priced(specs, weights)
    measurement.write(tmp_path / "m.json", specs)
    again = read_measurement(tmp_path / "m.json", specs)
    assert again.to_json(0) == measurement.to_json(0)
    assert again.sensitivity is not None
    found = again.sensitivity.token_weights
    assert len(found) == (0 if weights is None else len(again.sensitivity.linears))
    assert all(np.array_equal(w, weights) for w in found.values() if weights is not None)


@pytest.mark.parametrize("weights", [[], [1.0] * (CLASSES - 1), [-1.0] * CLASSES, ["1"] * CLASSES, "much"])
def test_weights_of_tokens_that_are_none(tmp_path: Path, specs: tuple[ModuleSpec, ...], weights: Any) -> None:
    record = priced(specs).to_json(0)
    key = specs[0].linears[0].key
    record["sensitivity"]["linears"][key]["token_weights"] = weights
    with pytest.raises(MeasurementError, match=rf"m\.json: {key}: token_weights must be {CLASSES} numbers"):
        read_measurement(write(tmp_path / "m.json", record), specs)
