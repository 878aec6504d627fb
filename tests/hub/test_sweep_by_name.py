"""A sweep over a repository of the Hub: the table names repository and commit, wherever the cache is."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from exl2jax import cli
from exl2jax.testing.hub_server import Hub, Repo

PLAN = """
models = ["org/tiny"]
targets = [4.5]
[settings]
cal_dataset = "random"
dataset_rows = 2
length = 24
measurement_rows = 2
measurement_length = 24
[evaluation]
rows = 2
length = 32
[variants.fast]
preset = "fast"
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def listed(plan: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The names of the cells that a dry run lists."""
    assert cli.main(["sweep", str(plan), "--out", str(plan.parent / "sweep"), "--dry-run", "--json"]) == 0
    return [cell["cell"] for cell in json.loads(capsys.readouterr().out)["cells"]]


def test_cells_are_known_by_repository_and_commit(
    hub: Hub,
    published: Repo,
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = listed(plan, capsys)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert listed(plan, capsys) == cells, "another cache, the same cells"
    published.branches["main"]["LICENSE"] = b"other terms"
    assert listed(plan, capsys) != cells, "another commit, other cells"


def test_a_name_that_is_no_repository(hub: Hub, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", str(plan), "--out", str(plan.parent / "sweep"), "--dry-run"]) == 1
    assert "org/tiny: no such directory here; as a repository of" in capsys.readouterr().err
    assert not (plan.parent / "sweep").exists()


@pytest.mark.slow
def test_a_cell_is_run(hub: Hub, published: Repo, plan: Path) -> None:
    command = ["sweep", str(plan), "--out", str(plan.parent / "sweep")]
    assert cli.main(command) == 0
    table = plan.parent / "sweep" / "results.parquet"
    (row,) = pq.read_table(table).to_pylist()
    assert row["status"] == "ok" and row["model"] == f"org/tiny@{published.commit('main')}"
    fetched = [request for request in hub.requests if "/resolve/" in request]
    made = (table.parent / row["output"] / "config.json").stat().st_mtime_ns
    assert cli.main(command) == 0
    assert (table.parent / row["output"] / "config.json").stat().st_mtime_ns == made, "finished cells are not run again"
    assert [request for request in hub.requests if "/resolve/" in request] == fetched, "nor is the model fetched again"
