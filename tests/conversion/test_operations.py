"""Operations of the passes against a count by hand, and durations with their range."""

from dataclasses import replace
from pathlib import Path

import pytest

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.operations import MODEL_ERROR, Speed, durations, machine_speed, pass_operations
from exl2jax.conversion.sizes import Size, set_operations
from exl2jax.estimate import Passes, conversion_work
from exl2jax.models import read_config


def test_each_pass_counts_its_own_rows_and_length(tiny_llama: Path) -> None:
    config = ConversionConfig(
        in_dir=tiny_llama,
        out_dir=Path("work"),
        dataset_rows=3,
        length=20,
        measurement_rows=2,
        measurement_length=10,
        preset="fast",
        products="float32",
    )
    model, _, _ = read_config(tiny_llama)
    measuring = conversion_work(model, config.recipe, Passes(rows=3, measurement_rows=2, length=10))
    quantizing = conversion_work(model, config.recipe, Passes(rows=3, measurement_rows=2, length=20))
    works = {**{name: measuring[name] for name in config.recipe.passes}, "quantize": quantizing["quantize"]}
    expected = {name: work.products + 107 / 49 * work.elementwise for name, work in works.items()}
    found = pass_operations(config, model)
    assert found == pytest.approx(expected) and list(found) == list(expected)
    rounded = pass_operations(replace(config, products="bfloat16"), model)
    fewer = {name: 0.6 * work.fast if name in ("price", "quantize") else 0 for name, work in works.items()}
    assert rounded == pytest.approx({name: expected[name] - fewer[name] for name in works})
    only = pass_operations(replace(config, output_measurement=Path("m.json")), model)
    assert only == {name: found[name] for name in config.recipe.passes}
    assert pass_operations(replace(config, measurement=Path("m.json")), model) == {"quantize": found["quantize"]}
    sizes = [Size(head_bits=6, bits=3.0), Size(head_bits=6, bits=4.0)]
    both = set_operations(config, sizes)
    assert sum(both.values()) == pytest.approx(sum(found.values()) + found["quantize"])
    assert list(both)[-1] == "size 2 of 2, quantize"


def test_durations_have_a_range() -> None:
    found = durations({"a": 30.0, "b": 10.0}, Speed(operations=2.0, spread=0.25))
    assert found["a"].seconds == 15 and found["all"].seconds == 20
    assert found["all"].least == 20 / (MODEL_ERROR * 1.25) and found["all"].most == 20 * MODEL_ERROR * 1.25


def test_a_machine_has_a_speed() -> None:
    speed = machine_speed(0.0)
    assert speed.operations > 1e6 and speed.spread >= 0
