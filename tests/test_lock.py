"""The hashed lock names the versions that `constraints.txt` pins, every one with hashes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_agrees_with_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_name(n): v.strip() for n, _, v in (line.partition("==") for line in lines if "==" in line)}
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\\n]+)(.*(?:\n    --hash=.*)*)", text, re.MULTILINE)
    locked = {_name(name): version for name, version, _ in entries}
    assert {name: pinned[name] for name in locked.keys() & pinned.keys()} == {
        name: locked[name] for name in locked.keys() & pinned.keys()
    }
    assert not pinned.keys() - locked.keys()
    assert all("--hash=sha256:" in rest for _, _, rest in entries)
    assert "://" not in text, "no place of download is fixed"
