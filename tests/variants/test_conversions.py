"""Every variant alone in a real conversion, limits on the widths, plugins, and settings from a file."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exl2jax import ConversionConfig, cli, convert
from exl2jax.errors import SettingsError
from exl2jax.exl2.inspect import inspect
from exl2jax.exl2.verify.directory import verify
from exl2jax.ops import annealing
from exl2jax.stock_tables import MLP
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants import choose, load_plugin, names, solvers
from exl2jax.variants.recipe import recipe_from

ROOT = Path(__file__).parents[2]
LINEARS = ("scales", "rounding", "order", "damping", "tuning", "transform")
MATRIX = [(kind, name) for kind in LINEARS for name in names(kind)[1:]]
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


OF_ROWS = [(kind, name) for kind in ("objective", "solver") for name in names(kind)[kind == "solver" :]]
"""Every objective, and every solver but stock's."""


@pytest.mark.parametrize(("kind", "name"), OF_ROWS)
def test_each_variant_of_rows(
    base: ConversionConfig, accuracies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setattr(annealing, "PROPOSALS", 50)
    monkeypatch.setattr(solvers, "RUNS", 4)
    recipe = recipe_from({"preset": "stock", kind: name}, "mine")
    assert verify(made(base, tmp_path, preset=recipe, measurement=accuracies)).ok


@pytest.mark.parametrize(
    "choices",
    [
        {"preset": "stock", "error": "squared"},
        {"preset": "fast", "pricing": "divergence", "divergence_rows": 1},
        {"preset": "stock", "pricing": "fisher", "fisher_rows": 1},
        {"preset": "best", "pricing": "accuracy"},
    ],
    ids=lambda choices: str(choices.get("error", choices.get("pricing"))),
)
def test_each_error_measure(base: ConversionConfig, tmp_path: Path, choices: dict[str, Any]) -> None:
    """Measured, allocated and quantized by it."""
    recipe = recipe_from(choices, "mine")
    assert verify(made(base, tmp_path, preset=recipe)).ok
    record = json.loads((tmp_path / "work" / "measurement.json").read_text())
    assert ("sensitivity" in record) == (recipe.pricing != "accuracy")
    scales = ["scales=columns"] if choices["preset"] != "stock" else []
    error = ["error=squared"] if "error" in choices else []
    assert record.get("method", "") == ", ".join([*error, *scales])


def test_the_same_choices_as_text_and_as_values(base: ConversionConfig) -> None:
    texts = ("propagation=0.25", "residual=1", "accuracies=true", "fisher_rows=3", "scales=grid:power=2")
    values = {"propagation": 0.25, "residual": 1.0, "accuracies": True, "fisher_rows": 3}
    recipe = replace(base, preset="fast", variants=texts).recipe
    assert recipe == recipe_from({"preset": "fast", **values, "scales": {"name": "grid", "power": 2}}, "fast")
    assert recipe.words()["scales"].startswith("grid:power=2.0,") and recipe.words()["residual"] == 1.0
    assert replace(base, preset=recipe, variants=("residual=0",)).recipe == replace(recipe, residual=0.0)


@pytest.mark.parametrize("residual", [0.0, 0.75])
def test_propagation(base: ConversionConfig, prices: Path, tmp_path: Path, residual: float) -> None:
    choices = (f"residual={residual}", "propagation=0.25")
    assert verify(made(base, tmp_path, preset="fast", variants=choices, measurement=prices)).ok


ROW = {"bits": [4, 3], "bits_prop": [0.25, 0.75], "group_size": 32}
WIDE = {"bits": [6], "bits_prop": [1], "group_size": {"6": 64}}
OWN = {"attention": [dict.fromkeys("qkvo", x) for x in (ROW, WIDE)]}
OWN["mlp"] = [dict.fromkeys(("gate", "up", "down"), x) for x in (ROW, WIDE)]


@pytest.mark.parametrize("preset", ["fast", "stock"])
def test_candidates_of_ones_own(base: ConversionConfig, prices: Path, tmp_path: Path, preset: str) -> None:
    """Every module has a row of the file: by its prices, and by its measured accuracies."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(OWN))
    recipe = recipe_from({"preset": preset, "candidates": str(path)}, "mine")
    given = {"measurement": prices} if preset == "fast" else {}
    found = inspect(made(base, tmp_path, preset=recipe, bits=5.0, **given))
    assert {frozenset(x.widths) for x in found if x.key != "lm_head"} <= {frozenset({4, 3}), frozenset({6})}
    job = json.loads((tmp_path / "work" / "job_new.json").read_text())
    assert job["records"]["strategy"]["pricing"] == recipe.pricing
    path.write_text(json.dumps(OWN | {"mlp": OWN["mlp"][:1]}))
    assert cli.main(["convert", "-o", str(tmp_path / "work")]) == 1, "the rows changed since"


@pytest.mark.parametrize("name", ["stock", "free"])
def test_candidates_by_name(base: ConversionConfig, prices: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_from({"preset": "fast", "candidates": name}, "mine")
    made(base, tmp_path, preset=recipe, measurement=prices)
    modules = json.loads((tmp_path / "work" / "job_new.json").read_text())["records"]["strategy"]["modules"]
    rows = {tuple(x.bits for x in row) for row in MLP}
    chosen = tuple(tuple(x["bits"]) for x in modules["model.layers.0.mlp"].values())
    assert name == "free" or chosen in rows


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not a JSON file"),
        ([], "must be an object of attention and mlp"),
        ({"attention": OWN["attention"], "mlp": []}, r"mlp must be a list of at least one row"),
        ({**OWN, "mlp": [{"gate": ROW}]}, r"mlp\[0\] must hold gate, up, down"),
        ({**OWN, "mlp": [*OWN["mlp"], {**OWN["mlp"][0], "up": {**ROW, "bits": [3, 4]}}]}, r"mlp\[2\].up: .*falling"),
        (
            {**OWN, "attention": [{name: {**ROW, "group_size": 48} for name in "qkvo"}]},
            r"attention\[0\].q: .*32, 64 or 128",
        ),
        ({**OWN, "attention": [dict.fromkeys("qkvo", 4)]}, r"attention\[0\].q: must have bits"),
    ],
)
def test_wrong_candidates_name_the_file_and_the_row(tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(SettingsError, match=rf"candidates .*rows.json: {message}"):
        recipe_from({"preset": "stock", "candidates": str(path)}, "mine")


def test_candidates_from_flags_and_settings(base: ConversionConfig, prices: Path, tmp_path: Path) -> None:
    rows, settings = tmp_path / "rows.json", tmp_path / "settings.toml"
    rows.write_text(json.dumps(OWN))
    settings.write_text(f'variants = ["candidates={rows}"]\ndataset_rows = 2\nlength = 48\nbits = 5.0\n')
    assert cli.main([*arguments(base, prices, tmp_path), "--settings", str(settings)]) == 0
    choice = json.loads((tmp_path / "work" / "job_new.json").read_text())["inputs"]["variants"]["candidates"]
    assert re.fullmatch(rf"file:file={rows},sha256=[0-9a-f]{{64}}", choice)
    assert cli.main([*arguments(base, prices, tmp_path / "b"), "--variant", "candidates=none.json"]) == 2
    assert cli.main([*arguments(base, prices, tmp_path / "c"), "--variant", "candidates=mine"]) == 2


def test_a_measurement_of_another_method_is_named(base: ConversionConfig, prices: Path, tmp_path: Path) -> None:
    recipe = recipe_from({"preset": "fast", "rounding": "nearest"}, "mine")
    result = convert(replace(base, out_dir=tmp_path / "a", measurement=prices, preset=recipe))
    named = "made with other variants (scales=columns) than the linears are quantized with (rounding=nearest, scales"
    assert any(named in line for line in result.warnings)
    own = convert(replace(base, out_dir=tmp_path / "b", preset=recipe))
    assert not any("other variants" in line for line in own.warnings)
    costs = [
        json.loads(path.read_text())["sensitivity"]["linears"] for path in (prices, tmp_path / "b/measurement.json")
    ]
    stock, nearest = (sum(sum(tiles) for x in each.values() for tiles in x.values()) for each in costs)
    assert nearest > 1.05 * stock, "priced by what it does: no feedback costs more"


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
        ({"preset": "stock", "candidates": "free"}, "free candidates need pricing fisher"),
        ({"preset": "best", "error": "squared"}, "an error of rows needs pricing accuracy"),
        ({"preset": "best", "hessian": "asymmetric"}, "there is no choice 'hessian'"),
        ({"propagation": 1.5}, "must lie between 0 and 1"),
        ({"propagation": "much"}, "propagation must be like 0.5"),
        ({"pricing": "divergence", "divergence_rows": 0}, "divergence_rows is 0"),
        ({"pricing": "guess"}, "must be one of fisher, divergence, accuracy"),
    ],
)
def test_wrong_combinations_are_refused_at_once(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        recipe_from(choices, "mine")


def test_annealing_has_an_objective_of_its_own(base: ConversionConfig) -> None:
    recipe = recipe_from({"preset": "stock", "objective": "logs"}, "mine")
    with pytest.raises(SettingsError, match="annealing picks an objective"):
        replace(base, preset=recipe, variants=("solver=annealing",))


def test_wrong_combinations_of_settings(base: ConversionConfig, accuracies: Path) -> None:
    table = recipe_from({"preset": "stock", "candidates": "stock"}, "m")
    for changes, message in (
        ({"preset": "best", "variants": ("solver=annealing",)}, "the solver annealing chooses among rows"),
        ({"variants": ("solver=exact", "solver=annealing")}, "two choices of solver"),
        ({"variants": ("solver",)}, "must be FIELD=VALUE or KIND=NAME"),
        ({"preset": table, "measurement": accuracies}, "holds its own candidates"),
        ({"variants": ("solver=magic",)}, "must be one of exact, annealing"),
    ):
        with pytest.raises(SettingsError, match=message):
            replace(base, **changes)


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
    choice = job["inputs"]["variants"]["scales"]
    assert re.fullmatch(r"shrunk:share=0\.95 of a file with SHA-256 [0-9a-f]{64}", choice)
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
