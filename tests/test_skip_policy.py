"""A missing part is a skip for a developer and a failure in continuous integration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skip_policy import OF_THE_MACHINE, REQUIRE_ALL

ROOT = Path(__file__).parents[1]
CASES = """
import pytest

{whole}

def test_a_part_is_missing():
    pytest.importorskip("no_such_part_at_all")

@pytest.mark.parametrize("reason", {allowed!r})
def test_the_machine_is_another(reason):
    pytest.skip(f"because {{reason}} here")

@pytest.mark.xfail(strict=True)
def test_expected():
    assert False

def test_passes():
    pass
"""


@pytest.mark.parametrize("required", ["0", "1"])
@pytest.mark.parametrize("whole", ["", 'pytest.skip("no such file", allow_module_level=True)'])
def test_skips(tmp_path: Path, required: str, whole: str) -> None:
    (tmp_path / "test_cases.py").write_text(CASES.format(whole=whole, allowed=OF_THE_MACHINE))
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "tests.skip_policy", str(tmp_path)]
    environment = {**os.environ, REQUIRE_ALL: required, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    ended = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "-p", "no:cacheprovider"], capture_output=True, text=True, env=environment
    )
    last = ended.stdout.splitlines()[-1]
    if whole:
        assert ("1 skipped" if required == "0" else "1 error") in last, ended.stdout
    else:
        assert "1 passed" in last and "1 xfailed" in last, ended.stdout
        skipped = len(OF_THE_MACHINE) + (required == "0")
        assert f"{skipped} skipped" in last and ("1 failed" in last) == (required == "1"), ended.stdout
    missing = "no such file" if whole else "no_such_part_at_all"
    assert missing in ended.stdout, "the reason is printed either way"
