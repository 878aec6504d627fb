"""One small sweep that the tests of this folder look at."""

from pathlib import Path

import pytest

from exl2jax.lab import SweepPlan, SweepResult, read_plan, run_sweep

TEXT = """
models = ["{model}"]
targets = [3.0, 4.5]
[settings]
dataset_rows = 3
length = 48
measurement_rows = 2
measurement_length = 48
[evaluation]
rows = 5
length = 64
[variants.stock]
preset = "stock"
[variants.fast]
preset = "fast"
[variants.gentle]
preset = "fast"
propagation = 0.25
"""


@pytest.fixture(scope="session")
def plan(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    """Stock cannot reach three bits on this model: one of the six cells fails."""
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    path.write_text(TEXT.format(model=tiny_llama))
    return read_plan(path)


@pytest.fixture(scope="session")
def sweep(plan: SweepPlan, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """The plan, run without a break."""
    return run_sweep(plan, tmp_path_factory.mktemp("sweep"))
