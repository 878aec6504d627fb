"""The laboratory: plans of many conversions, run reproducibly, in one table and one page."""

from exl2jax.lab.plan import Cell, SweepPlan, read_plan
from exl2jax.lab.results import read_results, reproducible, write_results
from exl2jax.lab.sweep import SweepResult, run_sweep

__all__ = [
    "Cell",
    "SweepPlan",
    "SweepResult",
    "read_plan",
    "read_results",
    "reproducible",
    "run_sweep",
    "write_results",
]
