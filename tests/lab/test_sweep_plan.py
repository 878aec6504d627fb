"""Plans: what a file says becomes cells, and every mistake is named before anything runs."""

from pathlib import Path

import pytest

from exl2jax.errors import SettingsError
from exl2jax.lab import read_plan
from exl2jax.lab.plan import without_variants

PLAN = """
models = ["some/model"]
targets = [3.0, 4]
seeds = [0, 1]
[settings]
dataset_rows = 7
[evaluation]
rows = 5
[variants.best]
[variants.stock]
preset = "stock"
solver = "annealing"
[variants.gentle]
propagation = 0.25
[variants.thorough]
fisher_rows = 16
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return path


def test_cells_of_a_plan(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, PLAN))
    cells = plan.cells()
    assert len(cells) == len({cell.name for cell in cells}) == 4 * 2 * 2
    first, gentle, stock = cells[0], plan.cells()[8], plan.cells()[4]
    assert (first.variant, first.bits, first.seed, first.settings["dataset_rows"]) == ("best", 3.0, 0, 7)
    assert gentle.recipe.propagation == 0.25 and gentle.recipe.pricing == "fisher"
    config = stock.config(tmp_path / "work")
    assert config.solver.name == "annealing" and config.recipe.pricing == "accuracy" and config.dataset_rows == 7


def test_measurements_are_shared_by_what_measures_the_same(tmp_path: Path) -> None:
    cells = read_plan(written(tmp_path, PLAN)).cells()
    names: dict[str, set[str]] = {}
    for cell in cells:
        names.setdefault(cell.variant, set()).add(cell.measurement)
    assert all(len(found) == 2 for found in names.values()), "one per seed, whatever the target"
    assert names["best"] == names["gentle"], "propagation is a matter of the quantization"
    assert not names["best"] & names["stock"] and not names["best"] & names["thorough"]


def test_names_follow_everything_that_decides_the_figures(tmp_path: Path) -> None:
    before = read_plan(written(tmp_path, PLAN)).cells()[0].name
    for old, new in (("dataset_rows = 7", "dataset_rows = 8"), ("rows = 5", "rows = 6")):
        assert read_plan(written(tmp_path, PLAN.replace(old, new))).cells()[0].name != before
    assert read_plan(written(tmp_path, PLAN + "\n[resources]\ncpus = 2")).cells()[0].name == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("targets = [3.0, 4]", "", "targets must be a list of numbers"),
        ("targets = [3.0, 4]", "targets = [3.0, 40]", "`bits` is 40"),
        ("[settings]", "[setings]", "the plan has no entry 'setings'"),
        ("dataset_rows = 7", "bits = 7", r"\[settings\] has no entry 'bits'"),
        ("propagation = 0.25", "propagation = 2", "propagation is 2"),
        ("propagation = 0.25", "propagation = 'much'", "propagation must be like 0.5"),
        ("propagation = 0.25", "propogation = 0.25", "no choice 'propogation'"),
        ('preset = "stock"', 'preset = "stick"', "must be one of best"),
        ("[variants.best]", '[variants."../best"]', "must be a table under a name"),
        ("rows = 5", "raws = 5", "raws"),
        ('models = ["some/model"]', "models = 3", "models must be a list of strings"),
        ("[variants.best]", "[variants.best", "the plan cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PLAN
    with pytest.raises(SettingsError, match=message):
        read_plan(written(tmp_path, PLAN.replace(old, new, 1)))


def test_some_variants_only(tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path, PLAN))
    assert [v.name for v in without_variants(plan, ("stock",)).variants] == ["stock"]
    with pytest.raises(SettingsError, match="no variant 'other'"):
        without_variants(plan, ("other",))
