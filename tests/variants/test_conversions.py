"""Every variant alone in a real conversion, limits on the widths, plugins, and settings from a file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exl2jax import ConversionConfig, cli, convert
from exl2jax.errors import SettingsError
from exl2jax.evaluate.inspect import inspect
from exl2jax.evaluate.verify import verify
from exl2jax.pipeline.recipe import recipe_from
from exl2jax.variants import choose, load_plugin, names
from tests.support.tiny_model import write_tiny_llama

ROOT = Path(__file__).parents[2]
MATRIX = [(kind, name) for kind in ("scales", "rounding", "order", "damping", "tuning") for name in names(kind)[1:]]
"""Every variant but those that are stock's, whose names come first."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ConversionConfig:
    model = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_layers=1)
    return ConversionConfig(
        in_dir=model,
        out_dir=model.parent / "none",
        preset="fast",
        bits=4.0,
        dataset_rows=2,
        length=48,
        measurement_rows=2,
        measurement_length=48,
    )


def measured(base: ConversionConfig, folder: Path, preset: str) -> Path:
    convert(replace(base, out_dir=folder / "work", output_measurement=folder / "m.json", preset=preset))
    return folder / "m.json"


@pytest.fixture(scope="module")
def prices(base: ConversionConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(base, tmp_path_factory.mktemp("prices"), "fast")


@pytest.fixture(scope="module")
def accuracies(base: ConversionConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(base, tmp_path_factory.mktemp("accuracies"), "stock")


def made(base: ConversionConfig, folder: Path, **changes: Any) -> Path:
    convert(replace(base, out_dir=folder / "work", compile_full=folder / "exl2", **changes))
    return folder / "exl2"


@pytest.mark.parametrize(("kind", "name"), MATRIX)
def test_each_variant_alone(base: ConversionConfig, prices: Path, tmp_path: Path, kind: str, name: str) -> None:
    recipe = recipe_from({"preset": "fast", kind: name}, "mine")
    report = verify(made(base, tmp_path, preset=recipe, measurement=prices))
    assert report.ok, report.faults
    assert report.bits_per_weight <= 4.0


@pytest.mark.parametrize("name", names("objective"))
def test_each_objective(base: ConversionConfig, accuracies: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_from({"preset": "stock", "objective": name}, "mine")
    assert verify(made(base, tmp_path, preset=recipe, measurement=accuracies)).ok


def test_a_variant_enters_measurement_and_quantization(base: ConversionConfig, tmp_path: Path) -> None:
    recipe = recipe_from({"preset": "stock", "rounding": "nearest"}, "mine")
    convert(replace(base, out_dir=tmp_path / "n", output_measurement=tmp_path / "n.json", preset=recipe))
    convert(replace(base, out_dir=tmp_path / "s", output_measurement=tmp_path / "s.json", preset="stock"))
    nearest, stock = (json.loads((tmp_path / f"{x}.json").read_text())["measurement"] for x in "ns")
    key = "model.layers.0.mlp"
    assert nearest[key][0]["accuracy"] < stock[key][0]["accuracy"], "without feedback two bits err more"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"preset": "best", "objective": "logs"}, "an objective needs pricing accuracy"),
        ({"preset": "stock", "scales": {"name": "grid", "powr": 2}}, "no setting 'powr'"),
        ({"preset": "stock", "rounding": "up"}, "must be one of stock, descent"),
    ],
)
def test_wrong_combinations_are_refused_at_once(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        recipe_from(choices, "mine")


def test_annealing_has_an_objective_of_its_own(base: ConversionConfig) -> None:
    recipe = recipe_from({"preset": "stock", "objective": "logs"}, "mine")
    with pytest.raises(SettingsError, match="annealing picks an objective"):
        replace(base, preset=recipe, allocation="annealing")


def test_pins_and_exclusions(base: ConversionConfig, prices: Path, tmp_path: Path) -> None:
    limits = {"pins": ("*.mlp.*=3", "model.layers.0.self_attn.q_proj=8"), "exclude_bits": (2, 5)}
    found = {x.key: set(x.widths) for x in inspect(made(base, tmp_path, measurement=prices, **limits))}
    assert found["model.layers.0.self_attn.q_proj"] == {8}
    assert all(found[f"model.layers.0.mlp.{n}_proj"] == {3} for n in ("gate", "up", "down"))
    assert not {2, 5} & set().union(*(widths for key, widths in found.items() if key != "lm_head"))


def test_pins_of_stock_candidates(base: ConversionConfig, accuracies: Path, tmp_path: Path) -> None:
    changes = {"preset": "stock", "measurement": accuracies, "bits": 6.0}
    found = inspect(made(base, tmp_path, pins=("*.self_attn.*=8",), **changes), "self_attn")
    assert all(set(x.widths) == {8} for x in found)
    with pytest.raises(SettingsError, match="none of stock's candidates keeps to"):
        made(base, tmp_path / "other", pins=("*.mlp.*=5",), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pins": ("model.layers.9.*=8",)}, "no linear is named so"),
        ({"pins": ("model.layers.0.*=7",)}, "must be PATTERN=BITS"),
        ({"pins": ("q_proj",)}, "must be PATTERN=BITS"),
        ({"exclude_bits": (7,)}, "must leave some"),
        ({"exclude_bits": (2, 3, 4, 5, 6, 8)}, "must leave some"),
    ],
)
def test_wrong_limits(base: ConversionConfig, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        convert(replace(base, out_dir=tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def arguments(base: ConversionConfig, prices: Path, folder: Path) -> list[str]:
    paths = {"-i": base.in_dir, "-o": folder / "work", "-cf": folder / "exl2", "-m": prices}
    return ["convert", *(str(x) for pair in paths.items() for x in pair), "--preset", "fast"]


def test_a_plugin_from_a_file(base: ConversionConfig, prices: Path, tmp_path: Path) -> None:
    plugin = ROOT / "examples" / "scale_search.py"
    command = [*arguments(base, prices, tmp_path), "-r", "2", "-l", "48", "-b", "4", "--plugin", str(plugin)]
    assert cli.main([*command, "--variant", "scales=shrunk:share=0.95"]) == 0
    assert verify(tmp_path / "exl2").ok
    job = json.loads((tmp_path / "work" / "job_new.json").read_text())
    [choice] = job["inputs"]["preset"]["variants"]
    assert choice["settings"] == {"share": 0.95} and len(choice["source"]) == 64
    assert cli.main(["convert", "-o", str(tmp_path / "work")]) == 0, "the job remembers its variants"


def test_plugins_that_do_not_work(tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    with pytest.raises(SettingsError, match="cannot be read"):
        load_plugin(path)
    path.write_text("1 / 0")
    with pytest.raises(SettingsError, match="ZeroDivisionError"):
        load_plugin(path)
    path.write_text(
        "from exl2jax.variants import variant\n"
        "@variant('order', 'none')\ndef none(diagonal, settings):\n    '''Taken.'''\n"
    )
    with pytest.raises(SettingsError, match="the name is taken"):
        load_plugin(path)
    assert choose("order", "none").source == ""


def test_settings_from_a_file(base: ConversionConfig, prices: Path, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('bits = 5.0\ndataset_rows = 2\nlength = 48\nexclude-bits = [2]\npin = ["*.q_proj=8"]\n')
    assert cli.main([*arguments(base, prices, tmp_path), "--settings", str(path), "-b", "4.5"]) == 0
    job = json.loads((tmp_path / "work" / "job_new.json").read_text())["inputs"]
    assert (job["bits"], job["dataset_rows"], job["pins"], job["exclude_bits"]) == (4.5, 2, ["*.q_proj=8"], [2])
    path.write_text("bit = 5.0\n")
    assert cli.main([*arguments(base, prices, tmp_path / "b"), "--settings", str(path)]) == 2
