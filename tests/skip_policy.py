"""The allowed skips: with EXL2JAX_REQUIRE_ALL=1 a test that skips because a part is missing fails."""

import os
from collections.abc import Iterator

import pytest

REQUIRE_ALL = "EXL2JAX_REQUIRE_ALL"

# A machine cannot be made to have these; everything else can be installed or built.
OF_THE_MACHINE = ("no CUDA device", "root may write everywhere", "namespaces", "/proc", "../shared")


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")


def enforce[Report: (pytest.TestReport, pytest.CollectReport)](report: Report) -> Report:
    """Turn a skip for a missing part into a failure, where all parts are required."""
    required = os.environ.get(REQUIRE_ALL, "0") not in ("", "0")
    if not required or not report.skipped or hasattr(report, "wasxfail"):
        return report
    why = reason(report)
    if not any(words in why for words in OF_THE_MACHINE):
        report.outcome = "failed"
        report.longrepr = f"{REQUIRE_ALL} is set, and a part is missing: {why}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """For the tests themselves and their fixtures."""
    return enforce((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """For files that skip as a whole."""
    return enforce((yield))
