"""Output for people: progress while a run goes on, tables and pages when it is over."""

from exl2jax.report.progress import StatusProgress, make_progress
from exl2jax.report.tables import (
    calibration_table,
    conversion_table,
    device_table,
    evaluation_table,
    harness_table,
    inspection_table,
    plan_table,
    verify_table,
)

__all__ = [
    "StatusProgress",
    "calibration_table",
    "conversion_table",
    "device_table",
    "evaluation_table",
    "harness_table",
    "inspection_table",
    "make_progress",
    "plan_table",
    "verify_table",
]
