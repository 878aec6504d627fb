"""A model of more blocks needs no more memory: whole conversions, each in a process of its own."""

import dataclasses
from pathlib import Path

import pytest

from scripts.bench.memory import Shape, conversion_peak

BLOCKS = Shape(width=256, inner=512, heads=4, rows=2, length=32)
FLAGS = ("-b", "5", "--preset", "fast", "--pin", "*=4")
"""Everything at 4 bits, and more of them than that takes: all linears in the same groups, so that the functions that
are compiled do not depend on what is allocated.
"""


@pytest.mark.slow
def test_peak_is_the_same_for_4_and_32_blocks(tmp_path: Path) -> None:
    """28 blocks more are 37 MB of weights as stored and 73 MB in float32; kept, either would show.

    The first conversion compiles, which no other does: what that takes is not the model's.
    """
    few, many = (dataclasses.replace(BLOCKS, layers=layers) for layers in (4, 32))
    conversion_peak(few, *FLAGS, cache=tmp_path)
    shallow, deep = (conversion_peak(shape, *FLAGS, cache=tmp_path).resident for shape in (few, many))
    more = (many.layers - few.layers) * 2 * BLOCKS.states  # inputs of every module, kept in a file that is mapped
    assert deep - more <= 1.05 * shallow
