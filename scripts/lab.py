#!/usr/bin/env python3
"""Run the laboratory's sweep on the demo model: examples/lab.toml into demo/lab, with a report to open.

python scripts/lab.py [OUT]     finished cells in OUT are not run again
"""

import os
import sys
from pathlib import Path

from exl2jax.cli import main

ROOT = Path(__file__).resolve().parents[1]


def run(out: Path) -> int:
    """Run the sweep; returns the exit code of the command."""
    os.chdir(ROOT)  # the plan names the demo model from here
    return main(["sweep", "examples/lab.toml", "--out", str(out)])


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else ROOT / "demo" / "lab"))
